"""The terms of the objective, each a plain function; the trainer adds them with their weights.

The L0 of a row is the sum over latents of ``dictionaries.activations.step``, whose gradient reaches the
thresholds.
"""

from collections.abc import Sequence

import torch

from gemscope.core.arrays import Bool, Float, Tensor
from gemscope.dictionaries.sparse import Support


def squared_error(x: Float[Tensor, "batch d"], recon: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """Mean over rows of the squared distance ||x - recon||^2."""
    return (x - recon).square().sum(-1).mean()


def matryoshka_error(x: Float[Tensor, "batch d"], recons: Sequence[Float[Tensor, "batch d"]]) -> Float[Tensor, ""]:
    """Mean over nested dictionaries of the squared error of each (Bussmann et al. 2025, "Matryoshka sparse
    autoencoders", eq. 3, over their number).
    """
    return torch.stack([squared_error(x, recon) for recon in recons]).mean()


def l0_penalty(l0: Float[Tensor, " batch"], target: float) -> Float[Tensor, ""]:
    """Mean over rows of (2 / target) (l0 - target)^2 (Gemma Scope 2 technical paper, eq. 5, without its
    weight).

    Taken row by row: it penalises the spread of the L0 over rows as well as a mean off the target.
    """
    return (2 / target) * (l0 - target).square().mean()


def dead_penalty(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
    dead: Bool[Tensor, " d_sae"],
    support: Support,
    pre_acts: Float[Tensor, " entries"],
) -> Float[Tensor, ""]:
    """Mean over rows of the sum over dead latents of relu(threshold - pre_act) (Anthropic, January 2025
    update).

    relu(a) = a + relu(-a), and the mean of the first part needs only the mean row: the cost is one row, not a
    batch. ``support`` and ``pre_acts`` must hold at least the entries above their thresholds.
    """
    gap = (threshold - x.mean(0) @ W_enc - b_enc)[dead].sum()
    above = (pre_acts - threshold[support.latents]).relu()
    return gap + above[dead[support.latents]].sum() / len(x)
