"""JumpReLU and the step function, with gradients for the threshold.

Both are flat in the threshold almost everywhere, so its gradient is a straight-through estimate with a
rectangular kernel K of the given bandwidth (Rajamanoharan et al. 2024, "Jumping Ahead", eqs. 11 and 12):

    d JumpReLU(z) / d threshold = -(threshold / bandwidth) K((z - threshold) / bandwidth)
    d step(z - threshold) / d threshold = -(1 / bandwidth) K((z - threshold) / bandwidth)

By default the estimate reaches the threshold only; z gets the ordinary gradient, which is the mask z > threshold
for JumpReLU and zero for the step. With ``to_input`` it reaches z too: both functions depend on the threshold's
distance from z, so z gets the step's estimate, and JumpReLU's, with the opposite sign (Anthropic, January 2025
update, lets it reach all parameters).
"""

from typing import Any, cast

import torch
from torch.autograd import Function

from gemscope.core.arrays import Bool, Float, Tensor


def in_window(
    pre_acts: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float
) -> Bool[Tensor, "*batch d_sae"]:
    """Where K is 1: less than half a bandwidth from the threshold, the ends excluded."""
    return (pre_acts - threshold).abs() < bandwidth / 2


class _JumpReLU(Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        active = pre_acts > threshold
        ctx.save_for_backward(pre_acts, threshold, active)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return pre_acts * active

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        pre_acts, threshold, active = ctx.saved_tensors
        window = in_window(pre_acts, threshold, ctx.bandwidth)
        estimate = (threshold / ctx.bandwidth) * window * grad
        grad_input = grad * active + estimate if ctx.to_input else grad * active
        return grad_input, -estimate.sum_to_size(threshold.shape), None, None


class _Step(Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return (pre_acts > threshold).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (grad,) = grads
        pre_acts, threshold = ctx.saved_tensors
        estimate = (1 / ctx.bandwidth) * in_window(pre_acts, threshold, ctx.bandwidth) * grad
        return estimate if ctx.to_input else None, -estimate.sum_to_size(threshold.shape), None, None


def jump_relu(
    pre_acts: Float[Tensor, "*batch d_sae"],
    threshold: Float[Tensor, " d_sae"],
    bandwidth: float,
    to_input: bool = False,
) -> Float[Tensor, "*batch d_sae"]:
    """``pre_acts`` where above ``threshold``, else 0; the threshold gets the straight-through gradient."""
    return cast(Tensor, _JumpReLU.apply(pre_acts, threshold, bandwidth, to_input))


def step(
    pre_acts: Float[Tensor, "*batch d_sae"],
    threshold: Float[Tensor, " d_sae"],
    bandwidth: float,
    to_input: bool = False,
) -> Float[Tensor, "*batch d_sae"]:
    """1 where ``pre_acts`` is above ``threshold``, else 0; its sum over latents is a differentiable L0."""
    return cast(Tensor, _Step.apply(pre_acts, threshold, bandwidth, to_input))


def mask_above(
    pre_acts: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, " d_sae"]
) -> Float[Tensor, "*batch d_sae"]:
    """JumpReLU for a finished dictionary: the same values, the threshold a constant."""
    return torch.where(pre_acts > threshold, pre_acts, 0.0)
