"""Thresholds from quantiles: every latent starts alive, and the finished mean L0 is the target's."""

from dataclasses import replace

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.screening import top_of_batch
from gemscope.dictionaries.sparse import select

Rows = Float[Tensor, "rows d_in"] | Float[Tensor, "rows positions d_in"]
"""What a dictionary reads; of several layers with their axis."""

_LATENTS = 1024
"""Latents whose pre-activations on all calibration rows are held at a time."""
_ENTRIES = 1 << 26
"""Pre-activations of the rows whose entries are found at a time."""


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


def thresholds(dictionary: Dictionary) -> list[Float[Tensor, " d_sae"]]:
    """Those of every position; none where the activation has no thresholds."""
    found = [_encoder(dictionary, position)[2] for position in range(dictionary.n_positions)]
    return [threshold for threshold in found if threshold is not None]


def mean_l0(dictionary: Dictionary, x: Rows) -> float:
    """Active latents per row, of all positions together, in the mean."""
    return sum(len(dictionary.codes(part)[1]) for part in _by_position(dictionary, x).split(4096)) / len(x)


def threshold_factor(
    dictionary: Dictionary, x: Rows, target_l0: float, least: Float[Tensor, " latents"] | None = None
) -> float:
    """The factor on all thresholds that gives ``dictionary`` the mean L0 ``target_l0`` on ``x``, where none falls below
    ``least``, which is of all positions in turn.

    It is a quantile: an entry stays active while its pre-activation exceeds factor * threshold, so the factor
    lies between the two ratios pre_act / threshold around the (rows * target_l0)-th largest. One number
    fitted on thousands of rows cannot overfit; on new rows the mean L0 differs by its standard error. 1 when
    no factor can reach the target (a latent with threshold 0 is active wherever it is positive).
    """
    threshold = torch.cat(thresholds(dictionary))
    wanted = round(len(x) * target_l0)
    parts = _by_position(dictionary, x).split(max(1, _ENTRIES // len(threshold)))
    for floor in (0.5, 0.125, 0.0):
        floors = threshold * floor
        floors = floors if least is None else torch.maximum(floors, least)
        ratios = torch.cat([_ratios(dictionary, part, threshold, floors) for part in parts])
        if len(ratios) > wanted:
            around = torch.topk(ratios, wanted + 1)[0][-2:]
            factor = around.double().mean().item()
            return factor if factor < float("inf") else 1.0
    return 1.0


_ROOM = 0.9
"""Share of the largest frequency that is allowed on the rows at hand: other documents differ."""


@torch.no_grad()
def set_thresholds(dictionary: Dictionary, x: Rows, target_l0: float, limit: float | None = None) -> float:
    """Multiply all thresholds by the factor that gives the mean L0 ``target_l0`` on ``x``; gives the factor.

    With ``limit`` no latent is then active on more than that share of ``x``: the threshold of one that would be is
    raised to where it is, and the others make up for it.
    """
    tables = thresholds(dictionary)
    before = torch.cat(tables)
    least, most = torch.zeros_like(before), int(_ROOM * (limit or 0) * len(x))

    def put(values: Tensor) -> None:
        for table, part in zip(tables, values.split(dictionary.d_sae), strict=True):
            table.copy_(part)

    while True:
        put(before)
        factor = threshold_factor(dictionary, x, target_l0, least)
        put(torch.maximum(before * factor, least))
        if limit is None:
            return factor
        counts = torch.zeros_like(least, dtype=torch.int64)
        for part in _by_position(dictionary, x).split(4096):
            counts += torch.bincount(dictionary.codes(part)[0].latents, minlength=len(counts))
        which = (counts > most) & (least == 0)
        if not which.any():
            return factor
        for position, own in enumerate(which.split(dictionary.d_sae)):
            W_enc, b_enc, _ = _encoder(dictionary, position)
            for some in own.nonzero()[:, 0].split(256):
                pre_acts = torch.addmm(b_enc[some], _by_position(dictionary, x)[:, position], W_enc[:, some])
                highest = pre_acts.topk(most + 1, dim=0).values[-1]
                least[position * dictionary.d_sae + some] = highest.to(least.dtype)


def _ratios(dictionary: Dictionary, x: Tensor, threshold: Tensor, floors: Tensor) -> Float[Tensor, " entries"]:
    """pre_act / threshold of every entry above its floor."""
    every = dictionary._slices()  # pyright: ignore[reportPrivateUsage]  # the encoder, some latents at a time
    slices = [replace(part, floor=floors[part.first : part.first + len(part.b_enc)]) for part in every]
    support, values = select(x, slices, len(threshold))
    return values / threshold[support.latents]


def _encoder(dictionary: Dictionary, position: int) -> tuple[Tensor, Tensor, Tensor | None]:
    return dictionary._encoder(position)  # pyright: ignore[reportPrivateUsage]


def _by_position(dictionary: Dictionary, x: Rows) -> Float[Tensor, "rows positions d_in"]:
    return x.view(len(x), dictionary.n_positions, dictionary.d_in)


def common_threshold(
    x: Float[Tensor, "rows d_in"], E: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"], target_l0: float
) -> float:
    """The one threshold for all latents above which ``target_l0`` pre-activations x E' + b_enc of a row lie, in the
    mean: what a BatchTopK dictionary uses where it cannot see a batch (Bussmann et al. 2024, section 3.2).

    A quantile of the rows given, half way between two neighbours; not a running mean over training, which lags.
    """
    wanted, share = round(len(x) * target_l0), 1.25
    while True:
        found: list[Tensor] = []
        bottom = 0.0
        for part in x.split(4096):
            count = min(round(share * target_l0 * len(part)) + 1, len(part) * len(b_enc))
            values, smallest = top_of_batch(part, E, b_enc, count)[1:]
            found.append(values)
            bottom = max(bottom, smallest if len(values) == count else 0.0)
        values = torch.cat(found)
        if len(values) <= wanted:
            return 0.0
        around = values.topk(wanted + 1).values[-2:].double()
        if float(around[-1]) >= bottom or share * target_l0 > len(b_enc):
            return around.mean().item()
        share *= 2
