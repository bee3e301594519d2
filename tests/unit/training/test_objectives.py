"""The terms of the objective against scalar loops in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.dictionaries.sparse import encode_above
from gemscope.training.objectives import dead_penalty, l0_penalty, matryoshka_error, squared_error


@given(seed=st.integers(0, 10_000), target=st.floats(0.5, 30))
@settings(max_examples=25, deadline=None)
def test_error_and_l0_penalty_equal_scalar_loops(seed: int, target: float) -> None:
    torch.manual_seed(seed)
    x, recon = torch.randn(2, 5, 3, dtype=torch.float64)
    l0 = torch.randint(0, 40, (5,)).double()
    error = sum((x[b, k] - recon[b, k]).item() ** 2 for b in range(5) for k in range(3)) / 5
    penalty = sum(2 / target * (n - target) ** 2 for n in l0.tolist()) / 5
    assert squared_error(x, recon).item() == pytest.approx(error, rel=1e-12)
    assert l0_penalty(l0, target).item() == pytest.approx(penalty, rel=1e-12)


def test_nested_errors_count_alike() -> None:
    """Errors of 4 + 9 and of 1 + 0: their mean is 7."""
    x = torch.tensor([[2.0, 3.0]])
    assert matryoshka_error(x, [torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])]).item() == 7.0


def test_the_l0_penalty_is_taken_row_by_row() -> None:
    """Rows of 0 and 2 target L0 are on target in the mean, and are still penalised: 2 / 4 * 16 = 8."""
    assert l0_penalty(torch.tensor([0.0, 8.0]), 4.0).item() == 8.0


@given(seed=st.integers(0, 10_000), dead_share=st.sampled_from([0.0, 0.4, 1.0]))
@settings(max_examples=25, deadline=None)
def test_dead_penalty_and_its_gradients_equal_the_dense_formula(seed: int, dead_share: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(6, 4, dtype=torch.float64)
    weights = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in [(4, 9), (9,), (9,)]]
    W_enc, b_enc, threshold = weights
    dead = torch.rand(9) < dead_share
    dense = ((threshold - x @ W_enc - b_enc).relu() * dead).sum(1).mean()
    expected = torch.autograd.grad(dense, weights)

    support, pre_acts = encode_above(x, W_enc, b_enc, threshold.detach() - 0.2)
    found = dead_penalty(x, W_enc, b_enc, threshold, dead, support, pre_acts)
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-11)
    for a, b in zip(torch.autograd.grad(found, weights), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
