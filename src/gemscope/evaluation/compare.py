"""Whether one dictionary is better than another, and where.

Both are measured on the same documents, so documents are drawn in pairs: the same draw for both, and the interval is
that of the difference. A difference counts when its interval leaves out 0.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gemscope.core.errors import InputError
from gemscope.evaluation.bootstrap import Interval, central, draws, ratios
from gemscope.evaluation.intervals import RATIOS
from gemscope.evaluation.result import Evaluation

LOWER_IS_BETTER = {"fvu": True, "delta_loss": True, "kl": True, "top1": False, "l0": None}
"""L0 is a price and not a merit: a difference in it is shown, and neither side wins."""

WHERE = ("fvu", "delta_loss")
"""Figures that are compared by position and by speaker too."""


@dataclass(frozen=True)
class Difference:
    """One figure of both, second minus first."""

    figure: str
    where: str
    """``everywhere``, a stretch of positions, or a speaker."""
    first: float
    second: float
    difference: float
    interval: tuple[float, float] | None
    better: str | None
    """``first`` or ``second``; None when the interval holds 0, or for L0."""


@dataclass(frozen=True)
class Comparison:
    """All figures of two dictionaries."""

    first: str
    second: str
    documents: int
    differences: tuple[Difference, ...]
    concepts: Difference | None
    """Mean AUROC of the best latents; here concepts are drawn instead of documents. None without labels."""
    gained: tuple[tuple[str, float], ...] = ()
    """Concepts whose AUROC is higher in the second, the largest difference first."""
    lost: tuple[tuple[str, float], ...] = ()
    """Concepts whose AUROC is lower."""

    @property
    def verdict(self) -> str:
        """One sentence."""
        overall = [one for one in self.differences if one.where == "everywhere" and one.figure != "l0"]
        won = {side: [one.figure for one in overall if one.better == side] for side in ("first", "second")}
        l0 = next(one for one in self.differences if (one.figure, one.where) == ("l0", "everywhere"))
        price = f" at an L0 of {l0.first:.1f} against {l0.second:.1f}"
        if not won["first"] and not won["second"]:
            return f"No difference that the documents can tell{price}."
        names = {"first": self.first, "second": self.second}
        parts = [f"{names[side]} is better in {', '.join(figures)}" for side, figures in won.items() if figures]
        return "; ".join(parts) + price + "."

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"verdict": self.verdict}


def compare(first: Evaluation, second: Evaluation, seed: int = 0) -> Comparison:
    """Two evaluations on the same documents; raises InputError when they are not."""
    documents = len(first.documents.get("rows", ()))
    if documents == 0 or any(first.documents[n] != second.documents.get(n) for n in ("rows", "predictions")):
        raise InputError(
            f"{first.name} and {second.name} were not measured on the same documents; evaluate both in one command."
        )
    found = [_difference(first, second, figure, "everywhere", seed) for figure in RATIOS]
    places = dict.fromkeys(name.split("@")[1] for name in first.documents if "@" in name)
    for place in places:
        for figure in WHERE:
            if f"{RATIOS[figure][0]}@{place}" in second.documents:
                found.append(_difference(first, second, figure, place, seed))
    gained, lost, concepts = _concepts(first, second, seed)
    return Comparison(first.name, second.name, documents, tuple(found), concepts, gained, lost)


def _columns(one: Evaluation, figure: str, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    suffix = "" if where == "everywhere" else f"@{where}"
    above, below = (one.documents[name + suffix] for name in RATIOS[figure])
    return torch.tensor(above, dtype=torch.float64), torch.tensor(below, dtype=torch.float64)


def _difference(first: Evaluation, second: Evaluation, figure: str, where: str, seed: int) -> Difference:
    pairs = [_columns(one, figure, where) for one in (first, second)]
    values = [float(above.sum() / below.sum()) for above, below in pairs]
    drawn = [ratios(above, below, seed) for above, below in pairs]
    few = min(int((below != 0).sum()) for _, below in pairs) < 2
    return _judged(figure, where, values, None if few else central(drawn[1] - drawn[0]), LOWER_IS_BETTER[figure])


def _judged(figure: str, where: str, values: list[float], interval: Interval, lower: bool | None) -> Difference:
    better = None
    if lower is not None and interval is not None and (interval[0] > 0 or interval[1] < 0):
        better = "second" if (interval[1] < 0) == lower else "first"
    return Difference(figure, where, values[0], values[1], values[1] - values[0], interval, better)


Changes = tuple[tuple[str, float], ...]


def _concepts(first: Evaluation, second: Evaluation, seed: int) -> tuple[Changes, Changes, Difference | None]:
    both = [_best(one) for one in (first, second)]
    names = [name for name in both[0] if name in both[1]]
    if len(names) < 2:
        return (), (), None
    a, b = (torch.tensor([one[name] for name in names], dtype=torch.float64) for one in both)
    drawn = draws(len(names), seed) @ (b - a) / len(names)
    whole = _judged("concept AUROC", "concepts", [float(a.mean()), float(b.mean())], central(drawn), False)
    change = dict(zip(names, [float(d) for d in b - a], strict=True))
    ordered = sorted(change, key=lambda name: -change[name])
    gained = tuple((name, change[name]) for name in ordered if change[name] > 0)
    lost = tuple((name, change[name]) for name in reversed(ordered) if change[name] < 0)
    return gained, lost, whole


def _best(one: Evaluation) -> Mapping[str, float]:
    return {} if one.concepts is None else {score.concept: score.auroc for score in one.concepts.scores}
