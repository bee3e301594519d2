"""JumpReLU and step: values, and straight-through gradients against the written-out formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.dictionaries.activations import jump_relu, mask_above, step

BANDWIDTH = 0.25


def _kernel(u: float) -> float:
    return 1.0 if abs(u) < 0.5 else 0.0


def _expected(pre_acts: torch.Tensor, threshold: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Loops over the formulas of the paper: gradients of JumpReLU to z and theta, and of the step to theta."""
    to_pre = torch.zeros_like(pre_acts)
    jump, heaviside = torch.zeros_like(threshold), torch.zeros_like(threshold)
    for b in range(pre_acts.shape[0]):
        for i in range(pre_acts.shape[1]):
            z, theta, g = pre_acts[b, i].item(), threshold[i].item(), upstream[b, i].item()
            to_pre[b, i] = g if z > theta else 0.0
            jump[i] += -g * theta / BANDWIDTH * _kernel((z - theta) / BANDWIDTH)
            heaviside[i] += -g / BANDWIDTH * _kernel((z - theta) / BANDWIDTH)
    return to_pre, jump, heaviside


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_gradients_equal_the_written_out_formula(seed: int) -> None:
    torch.manual_seed(seed)
    threshold = torch.rand(5, dtype=torch.float64).requires_grad_()
    pre_acts = (threshold + 0.3 * torch.randn(7, 5, dtype=torch.float64)).detach().requires_grad_()
    upstream = torch.randn(7, 5, dtype=torch.float64)
    to_pre, jump, heaviside = _expected(pre_acts, threshold, upstream)

    jump_relu(pre_acts, threshold, BANDWIDTH).backward(upstream)
    torch.testing.assert_close(pre_acts.grad, to_pre, rtol=0, atol=1e-12)
    torch.testing.assert_close(threshold.grad, jump, rtol=0, atol=1e-12)

    pre_acts.grad = threshold.grad = None
    step(pre_acts, threshold, BANDWIDTH).backward(upstream)
    assert pre_acts.grad is None
    torch.testing.assert_close(threshold.grad, heaviside, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("offset", "inside"),
    [
        (0.0, True),
        (0.124, True),
        (-0.124, True),
        (0.125, False),
        (-0.125, False),
        (0.2, False),
        (-0.2, False),
    ],
)
def test_the_window_is_open_and_one_bandwidth_wide(offset: float, inside: bool) -> None:
    threshold = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)  # 0.5 +- 0.125 are exact in binary
    pre_acts = torch.tensor([[0.5 + offset]], dtype=torch.float64)
    step(pre_acts, threshold, BANDWIDTH).sum().backward()
    assert threshold.grad is not None
    assert threshold.grad.item() == (-4.0 if inside else 0.0)
    threshold.grad = None
    jump_relu(pre_acts, threshold, BANDWIDTH).sum().backward()
    assert threshold.grad is not None
    assert threshold.grad.item() == (-2.0 if inside else 0.0)


def test_a_latent_exactly_at_its_threshold_is_not_active() -> None:
    pre_acts = torch.tensor([[0.5, 0.5, -1.0, 0.7]])
    threshold = torch.tensor([0.5, 0.4, 0.0, 0.5])
    expected = torch.tensor([[0.0, 0.5, 0.0, 0.7]])
    assert torch.equal(jump_relu(pre_acts, threshold, BANDWIDTH), expected)
    assert torch.equal(mask_above(pre_acts, threshold), expected)
    assert torch.equal(step(pre_acts, threshold, BANDWIDTH), (expected > 0).float())


def test_step_estimates_the_derivative_of_the_expected_l0() -> None:
    """For z uniform around the threshold, d E[L0] / d theta is minus the density, which the estimate must
    average to.
    """
    z = torch.linspace(-1, 1, 200_001, dtype=torch.float64).unsqueeze(1)
    threshold = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    step(z, threshold, 0.1).mean().backward()
    assert threshold.grad is not None
    assert threshold.grad.item() == pytest.approx(-0.5, rel=1e-3)
