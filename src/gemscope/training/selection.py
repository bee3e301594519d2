"""A crosscoder or CLT to begin from, put together from single-layer dictionaries (Gemma Scope 2, section 3.4).

Layers are gone through from early to late. Of each single-layer dictionary the first latents that are still free are
chosen, for Matryoshka training puts the general ones first. For every chosen latent, the latent of each later layer
whose encoder is most similar to its decoder is marked off: it would see what the chosen one has written, so the
chosen one writes to that layer in its stead, with the decoder of the latent it replaces times the slope of the one's
activation on the other's.
"""

from collections.abc import Sequence

import torch

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.core.errors import InputError
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.multilayer import Crosscoder, CrossLayerTranscoder
from gemscope.dictionaries.single import SingleLayer

_ROWS, _LATENTS = 512, 2048


@torch.no_grad()
def from_single_layers(
    kind: str,
    dictionaries: Sequence[SingleLayer],
    d_sae: int,
    x: Sequence[Float[Tensor, "rows d_in"]],
    prefixes: Sequence[int] = (),
) -> tuple[Crosscoder | CrossLayerTranscoder, list[Int[Tensor, " d_sae"]]]:
    """A dictionary of ``d_sae`` latents per layer for raw activations, and which latents were chosen.

    ``dictionaries`` are one per layer, early to late, all of one size and JumpReLU or ReLU; ``x`` are calibration rows
    of each. Raises InputError when one has fewer than ``d_sae`` latents or an activation that compares latents.
    """
    for one in dictionaries:
        if one.d_sae < d_sae:
            raise InputError(f"a dictionary of {one.d_sae} latents cannot give {d_sae}; ask for fewer per layer.")
        if one.threshold is None:
            raise InputError(f"a dictionary with activation {one.activation.kind!r} has no thresholds to take over.")
    n = len(dictionaries)
    free = [torch.ones(one.d_sae, dtype=torch.bool, device=one.b_enc.device) for one in dictionaries]
    chosen: list[Tensor] = []
    tables: list[Tensor] = []
    for at, one in enumerate(dictionaries):
        mine = free[at].nonzero()[:d_sae, 0]
        chosen.append(mine)
        rows = one.W_dec[mine].float()
        table = torch.zeros(n - at, d_sae, rows.shape[1], device=rows.device)
        table[0] = rows
        for later in range(at + 1, n):
            match, marked = _mark(rows, dictionaries[later], free[later], d_sae)
            if bool(marked.any()):
                taken = dictionaries[later].W_dec[match[marked]].float()
                slope = _slopes(one, dictionaries[later], mine[marked], match[marked], x[at], x[later])
                table[later - at][marked] = taken * slope[:, None]
        tables.append(table)
    skips = [one.W_skip for one in dictionaries if one.W_skip is not None]
    given = {
        "W_enc": [one.W_enc[:, c].float() for one, c in zip(dictionaries, chosen, strict=True)],
        "b_enc": [one.b_enc[c].float() for one, c in zip(dictionaries, chosen, strict=True)],
        "W_dec": tables,
        "b_dec": [one.b_dec.float() for one in dictionaries],
        "threshold": [_threshold(one)[c].float() for one, c in zip(dictionaries, chosen, strict=True)],
    }
    jump = Activation("jumprelu")
    if kind == "crosscoder":
        return Crosscoder(**given, activation=jump, prefixes=prefixes), chosen
    skip = [s.float() for s in skips] if len(skips) == n else None
    return CrossLayerTranscoder(**given, W_skip=skip, activation=jump, prefixes=prefixes), chosen


def _threshold(one: SingleLayer) -> Tensor:
    assert one.threshold is not None
    return one.threshold


def _mark(
    rows: Float[Tensor, "chosen d"], later: SingleLayer, free: Bool[Tensor, " latents"], keep: int
) -> tuple[Int[Tensor, " chosen"], Bool[Tensor, " chosen"]]:
    """For each decoder row the most similar encoder of a later layer, and whether it was marked off in ``free`` for
    it: once each, the most similar first, while ``keep`` latents stay free.
    """
    if rows.shape[1] != later.d_in:
        raise InputError(f"what is written has {rows.shape[1]} numbers, what is read later {later.d_in}.")
    encoders = later.W_enc.float()
    similar = torch.full((len(rows),), -float("inf"), device=rows.device)
    match = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for start in range(0, later.d_sae, _LATENTS):
        found, where = (rows @ encoders[:, start : start + _LATENTS]).max(1)
        better = found > similar
        similar, match = torch.where(better, found, similar), torch.where(better, where + start, match)
    marked = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    room = int(free.sum()) - keep
    for i in similar.argsort(descending=True).tolist():
        latent = int(match[i])
        if room <= 0 or float(similar[i]) <= 0:
            break
        if bool(free[latent]):
            free[latent], marked[i], room = False, True, room - 1
    return match, marked


def _slopes(
    one: SingleLayer, later: SingleLayer, mine: Tensor, match: Tensor, x: Tensor, x_later: Tensor
) -> Float[Tensor, " pairs"]:
    """sum(a b) / sum(a^2) over rows: how active the later latent is per unit of the earlier one's activation."""
    both = torch.zeros(len(mine), device=mine.device)
    own = torch.zeros_like(both)
    for part, part_later in zip(x.split(_ROWS), x_later.split(_ROWS), strict=True):
        a, b = one.encode(part, mine), later.encode(part_later, match)
        both += (a * b).sum(0)
        own += a.square().sum(0)
    return both / own.clamp_min(1e-12)
