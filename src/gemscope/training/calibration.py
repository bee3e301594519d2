"""Thresholds from quantiles: every latent starts alive, and the finished mean L0 is the target's."""

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.sparse import encode_above

_LATENTS = 1024
"""Latents whose pre-activations on all calibration rows are held at a time."""


def first_thresholds(
    x: Float[Tensor, "rows d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    target_l0: float,
) -> tuple[Float[Tensor, " d_sae"], float]:
    """Thresholds that each latent exceeds on target_l0 / d_sae of the rows, and the pre-activation scale.

    All latents begin equally frequent, so none begins dead and the mean L0 is the target's. Thresholds are at
    least 0. The scale is the root mean square over latents of the standard deviation over rows.
    """
    count = max(1, round(len(x) * target_l0 / len(b_enc)))
    thresholds: list[Tensor] = []
    variances: list[Tensor] = []
    for W, b in zip(W_enc.split(_LATENTS, dim=1), b_enc.split(_LATENTS), strict=True):
        pre_acts = torch.addmm(b, x, W)
        thresholds.append(torch.topk(pre_acts, count, dim=0)[0][-1])
        variances.append(pre_acts.var(0))
    return torch.cat(thresholds).clamp(min=0), torch.cat(variances).mean().sqrt().item()


def threshold_factor(sae: SAE, x: Float[Tensor, "rows d_in"], target_l0: float) -> float:
    """The factor on all thresholds that gives ``sae`` the mean L0 ``target_l0`` on ``x``.

    It is a quantile: an entry stays active while its pre-activation exceeds factor * threshold, so the factor
    lies between the two ratios pre_act / threshold around the (rows * target_l0)-th largest. One number
    fitted on thousands of rows cannot overfit; on new rows the mean L0 differs by its standard error. 1 when
    no factor can reach the target (a latent with threshold 0 is active wherever it is positive).
    """
    assert sae.threshold is not None
    wanted = round(len(x) * target_l0)
    for floor in (0.5, 0.125, 0.0):
        support, values = encode_above(x, sae.W_enc, sae.b_enc, sae.threshold * floor)
        if len(values) > wanted:
            ratios = values / sae.threshold[support.latents]
            around = torch.topk(ratios, wanted + 1)[0][-2:]
            factor = around.double().mean().item()
            return factor if factor < float("inf") else 1.0
    return 1.0
