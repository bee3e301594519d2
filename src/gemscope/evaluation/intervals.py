"""The sums per document that headline figures are ratios of, and their intervals."""

from collections.abc import Mapping

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.evaluation.bootstrap import Interval, central, interval, ratios
from gemscope.evaluation.fidelity import FidelitySums
from gemscope.evaluation.groups import group_name
from gemscope.evaluation.splice import Effect, Spliced

RATIOS = {
    "fvu": ("unexplained", "spread"),
    "l0": ("active", "rows"),
    "delta_loss": ("delta", "predictions"),
    "kl": ("kl", "predictions"),
    "top1": ("same", "predictions"),
}
"""Figure -> the columns it is a ratio of."""


def columns(sums: FidelitySums, spliced: Spliced) -> dict[str, tuple[float, ...]]:
    """Per document; with ``@group``, of the rows or predictions of that group only."""
    effect = spliced.own
    found = _columns(sums, effect, None)
    for group in sorted({*sums.sums.groups, *effect.sums.groups}):
        own = _columns(sums, effect, group)
        found |= {f"{name}@{group_name(group)}": value for name, value in own.items()}
    return {name: tuple(value.tolist()) for name, value in found.items()}


def _columns(sums: FidelitySums, effect: Effect, group: int | None) -> dict[str, Float[Tensor, " documents"]]:
    found: dict[str, Tensor] = {}
    if group is None or group in sums.sums.groups:
        above, below = sums.unexplained(group)
        found |= {"unexplained": above, "spread": below}
        if group is None:
            found |= {name: sums.sums.per_document(name) for name in ("rows", "active")}
    if group is None or group in effect.sums.groups:
        part = {
            name: effect.sums.per_document(name, group) for name in ("predictions", "original", "loss", "kl", "same")
        }
        found |= {"predictions": part["predictions"], "delta": part["loss"] - part["original"]}
        if group is None:
            found |= {"kl": part["kl"], "same": part["same"]}
    return found


def intervals(sums: FidelitySums, spliced: Spliced, seed: int) -> Mapping[str, Interval]:
    """Of FVU, L0, delta loss, KL, top-1, cosine, and of the shares recovered against both ablations."""
    table = _columns(sums, spliced.own, None)
    found = {name: interval(table[above], table[below], seed) for name, (above, below) in RATIOS.items()}
    cosine = torch.stack([error.sums.per_document("cosine") for error in sums.errors]).mean(0)
    found["cosine"] = interval(cosine, table["rows"], seed)
    for name, ablated in (("recovered_zero", spliced.zero), ("recovered_mean", spliced.mean)):
        cost = ablated.sums.per_document("loss") - ablated.sums.per_document("original")
        two = int((table["predictions"] > 0).sum()) > 1
        found[name] = central(1 - ratios(table["delta"], cost, seed)) if two and float(cost.sum()) > 0 else None
    return found
