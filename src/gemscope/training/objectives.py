"""The terms of the objective, each a plain function; a learner adds them with their weights.

Terms on how often latents fire work on the entries of a ``Support``: ``active`` holds a 1 per active entry, with
the straight-through gradient of ``dictionaries.activations.step`` (or a soft count, where an activation has no
threshold). Whatever is not among the entries is 0 and has no gradient.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import mse_loss

from gemscope.core.arrays import Bool, Float, Tensor
from gemscope.dictionaries.sparse import Support


def squared_error(x: Float[Tensor, "batch d"], recon: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """Mean over rows of the squared distance ||x - recon||^2."""
    return mse_loss(recon, x, reduction="sum") / len(x)


def matryoshka_error(x: Float[Tensor, "batch d"], recons: Sequence[Float[Tensor, "batch d"]]) -> Float[Tensor, ""]:
    """Mean over nested dictionaries of the squared error of each (Bussmann et al. 2025, "Matryoshka sparse
    autoencoders", eq. 3, over their number).
    """
    return torch.stack([squared_error(x, recon) for recon in recons]).mean()


def quadratic_l0(l0: Float[Tensor, " batch"], target: float) -> Float[Tensor, ""]:
    """Mean over rows of (2 / target) (l0 - target)^2 (Gemma Scope 2 technical paper, eq. 5, without its
    weight).

    Taken row by row: it penalises the spread of the L0 over rows as well as a mean off the target.
    """
    return (2 / target) * (l0 - target).square().mean()


def linear_l0(l0: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over rows of the number of active latents (Rajamanoharan et al. 2024, eq. 9)."""
    return l0.mean()


def soft_count(sizes: Float[Tensor, " entries"], scale: float) -> Float[Tensor, " entries"]:
    """tanh(scale * size) per entry: nearly 1 for a strong activation, with a gradient everywhere (Anthropic, January
    2025 update); ``sizes`` are activations times the norms of their decoder rows.
    """
    return torch.tanh(scale * sizes)


def frequency_penalty(support: Support, active: Float[Tensor, " entries"], scale: float) -> Float[Tensor, ""]:
    """Sum over latents of p (1 + p / scale), p the share of the rows on which the latent is active.

    Linear below ``scale``, where it is the mean L0, and quadratic above: a latent that is active twice as often as
    ``scale`` costs three times its L0 (Gemma Scope 2 technical paper, section 3.2, which gives it in words).
    """
    counts = active.new_zeros(support.d_sae).index_add(0, support.latents, active)
    frequency = counts / support.batch
    return (frequency * (1 + frequency / scale)).sum()


def dead_penalty(
    support: Support,
    pre_acts: Float[Tensor, " entries"],
    mean_pre_acts: Float[Tensor, " dead"],
    threshold: Float[Tensor, " d_sae"],
    dead: Bool[Tensor, " d_sae"],
) -> Float[Tensor, ""]:
    """Mean over rows of the sum over dead latents of relu(threshold - pre_act) (Anthropic, January 2025
    update).

    relu(a) = a + relu(-a), and the mean of the first part needs only ``mean_pre_acts``, the dead latents'
    pre-activations on the mean row: the cost is one row, not a batch. The entries must hold at least those above
    their thresholds.
    """
    gap = (threshold[dead] - mean_pre_acts).sum()
    above = (pre_acts - threshold[support.latents]).relu()
    return gap + above[dead[support.latents]].sum() / support.batch


def aux_error(left: Float[Tensor, "batch d"], dead_recon: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """What the dead latents leave of the error (AuxK, Gao et al. 2024, appendix A.2): squared_error, with ``left`` =
    target - recon a constant, and ``dead_recon`` without the bias, which ``left`` already lacks.
    """
    return squared_error(left.detach(), dead_recon)


def end_to_end(error: Float[Tensor, ""], divergence: Float[Tensor, ""], beta: float) -> Float[Tensor, ""]:
    """(error + alpha beta KL) / (1 + beta), alpha = error / (KL + 1e-8) held constant, so that beta alone says how much
    the divergence counts (Karvonen 2025, as in the Gemma Scope 2 technical paper, section 3.4).
    """
    alpha = (error / (divergence + 1e-8)).detach()
    return (error + alpha * beta * divergence) / (1 + beta)


Splice = Callable[[Float[Tensor, "batch d"]], Float[Tensor, ""]]
"""The mean KL divergence of the model's predictions when raw reconstructions take the place of what was read from a
batch; ``training.end_to_end`` makes it where the rows come from a running model."""


def sampled_prefixes(d_sae: int, count: int, seed: int, done: int) -> tuple[int, ...]:
    """Up to ``count`` prefix lengths for one step, ascending, from the Pareto law P(length > l) = l^-1/2 cut off at
    ``d_sae`` (Nabeshima 2024); the same for the same seed and step.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + done)
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    lengths = (1 - u * (1 - d_sae**-0.5)).pow(-2).long().clamp(1, d_sae - 1)
    return tuple(sorted(set(lengths.tolist())))
