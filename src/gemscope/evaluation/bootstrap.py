"""Intervals by drawing documents anew.

Tokens of one document resemble each other, so that an interval over tokens would be far too narrow; documents are drawn
with replacement (Efron 1979; the cluster bootstrap). Every measure here is a ratio of sums over documents, so a draw is
a vector of counts, and the interval is the central 95 % of the ratios. All measures of all dictionaries use the same
draws, so that the difference of two dictionaries is drawn in pairs.
"""

from functools import lru_cache

import torch

from gemscope.core.arrays import Float, Tensor

RESAMPLES = 1000
LEVEL = 0.95

Interval = tuple[float, float] | None
"""Lower and upper end; None where fewer than two documents have anything to measure."""


@lru_cache(maxsize=4)
def draws(documents: int, seed: int = 0, resamples: int = RESAMPLES) -> Float[Tensor, "resamples documents"]:
    """How often each document is in each draw; rows sum to ``documents``."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(documents, (resamples, documents), generator=generator)
    counts = torch.zeros(resamples, documents, dtype=torch.float64)
    return counts.scatter_add_(1, picked, torch.ones_like(picked, dtype=torch.float64))


def ratios(
    above: Float[Tensor, "documents *several"], below: Float[Tensor, "documents *several"], seed: int = 0
) -> Float[Tensor, "resamples *several"]:
    """Sum of ``above`` over sum of ``below`` in each draw; NaN where nothing was drawn that counts."""
    counts = draws(len(above), seed)
    return (counts @ above.double()) / (counts @ below.double())


def central(values: Float[Tensor, " resamples"]) -> Interval:
    """The central 95 % of drawn values, without those that are not finite; None when more than half are not."""
    finite = values[values.isfinite()]
    if len(finite) * 2 < len(values) or len(finite) == 0:
        return None
    tail = (1 - LEVEL) / 2
    low, high = finite.quantile(torch.tensor([tail, 1 - tail], dtype=finite.dtype)).tolist()
    return low, high


def interval(above: Float[Tensor, " documents"], below: Float[Tensor, " documents"], seed: int = 0) -> Interval:
    """Of a ratio of sums over documents."""
    if int((below != 0).sum()) < 2:
        return None
    return central(ratios(above, below, seed))
