"""The terms of the objective against scalar loops in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.dictionaries.sparse import Support, encode_above
from gemscope.training.objectives import (
    aux_error,
    dead_penalty,
    end_to_end,
    frequency_penalty,
    linear_l0,
    matryoshka_error,
    quadratic_l0,
    soft_count,
    squared_error,
)


@given(seed=st.integers(0, 10_000), target=st.floats(0.5, 30))
@settings(max_examples=25, deadline=None)
def test_error_and_quadratic_l0_equal_scalar_loops(seed: int, target: float) -> None:
    torch.manual_seed(seed)
    x, recon = torch.randn(2, 5, 3, dtype=torch.float64)
    l0 = torch.randint(0, 40, (5,)).double()
    error = sum((x[b, k] - recon[b, k]).item() ** 2 for b in range(5) for k in range(3)) / 5
    penalty = sum(2 / target * (n - target) ** 2 for n in l0.tolist()) / 5
    assert squared_error(x, recon).item() == pytest.approx(error, rel=1e-12)
    assert quadratic_l0(l0, target).item() == pytest.approx(penalty, rel=1e-12)


def test_nested_errors_count_alike() -> None:
    """Errors of 4 + 9 and of 1 + 0: their mean is 7."""
    x = torch.tensor([[2.0, 3.0]])
    assert matryoshka_error(x, [torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])]).item() == 7.0


def test_the_quadratic_l0_is_taken_row_by_row() -> None:
    """Rows of 0 and 2 target L0 are on target in the mean, and are still penalised: 2 / 4 * 16 = 8."""
    assert quadratic_l0(torch.tensor([0.0, 8.0]), 4.0).item() == 8.0


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
    mean_pre_acts = (x.mean(0) @ W_enc + b_enc)[dead]
    found = dead_penalty(support, pre_acts, mean_pre_acts, threshold, dead)
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-11)
    for a, b in zip(torch.autograd.grad(found, weights), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_frequency_penalty_by_hand() -> None:
    """Four rows; latent 0 fires on 2 of them, latent 2 on 1: 0.5 (1 + 5) + 0.25 (1 + 2.5) with scale 0.1. Its gradient
    to one entry is (1 + 2 p / scale) / 4."""
    support = Support(torch.tensor([0, 1, 3]), torch.tensor([0, 0, 2]), 4, 3)
    active = torch.ones(3, dtype=torch.float64, requires_grad=True)
    penalty = frequency_penalty(support, active, 0.1)
    assert penalty.item() == pytest.approx(0.5 * 6 + 0.25 * 3.5, rel=1e-12)
    (grad,) = torch.autograd.grad(penalty, active)
    assert grad.tolist() == pytest.approx([11 / 4, 11 / 4, 6 / 4], rel=1e-12)


def test_linear_and_soft_counts() -> None:
    assert linear_l0(torch.tensor([1.0, 3.0])).item() == 2.0
    found = soft_count(torch.tensor([0.0, 0.5, 10.0], dtype=torch.float64), 4.0)
    assert found.tolist() == pytest.approx([0.0, math.tanh(2.0), 1.0], rel=1e-12)


def test_aux_error_has_no_gradient_to_the_reconstruction() -> None:
    left = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    own = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    aux_error(left, own).backward()
    assert left.grad is None
    torch.testing.assert_close(own.grad, (own - left).detach() * 2 / 4, rtol=1e-12, atol=0)


@given(error=st.floats(0.01, 10), divergence=st.floats(0.01, 10), beta=st.floats(0, 5))
@settings(max_examples=30, deadline=None)
def test_end_to_end_balances_the_sizes(error: float, divergence: float, beta: float) -> None:
    """At its value the divergence counts beta times as much as the error, whatever its own size."""
    e, d = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (error, divergence))
    loss = end_to_end(e, d, beta)
    assert loss.item() == pytest.approx(error, rel=1e-5)
    of_e, of_d = torch.autograd.grad(loss, [e, d])
    assert of_e.item() == pytest.approx(1 / (1 + beta), rel=1e-9)
    assert of_d.item() == pytest.approx(error / (divergence + 1e-8) * beta / (1 + beta), rel=1e-9)
