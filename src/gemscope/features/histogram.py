"""Histograms of activations on one fixed scale, so that parts of a pass add up; and quantile groups.

Eight bins an octave from 2**-12 to 2**20: a bin is a stretch of float32 values with the same exponent and the same
first three bits of the fraction. What lies outside counts in the first or last bin.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from gemscope.core.arrays import Float, Int, Tensor

BINS = 256
_SHIFT = 20
_FIRST = (127 - 12) << 3


def bin_of(values: Float[Tensor, " entries"]) -> Int[Tensor, " entries"]:
    """The bin of each positive value."""
    return ((values.float().view(torch.int32) >> _SHIFT) - _FIRST).clamp(0, BINS - 1)


def edges() -> npt.NDArray[np.float32]:
    """Lower edge of each bin, and the upper edge of the last."""
    bits = (np.arange(BINS + 1, dtype=np.int32) + _FIRST) << _SHIFT
    return bits.view(np.float32)


def centres() -> npt.NDArray[np.float64]:
    """Middle of each bin."""
    at = edges().astype(np.float64)
    return (at[1:] + at[:-1]) / 2


def columns(bars: Sequence[tuple[float, int]], most: int) -> list[int]:
    """Counts of (middle, count) bars, in rising order, on an axis of at most ``most`` columns, the empty ones too: as
    many bins each where the bars are bins, as long a stretch of activation each where others made them.
    """
    at = np.array([middle for middle, _ in bars], np.float64)
    place = bin_of(torch.from_numpy(at)).numpy().astype(np.int64)
    if not np.allclose(centres()[place], at, rtol=1e-6):
        levels, which = np.unique(at, return_inverse=True)
        gaps = np.diff(levels)  # of rounded middles, so their sum in units of the smallest is rounded gap by gap
        place = np.append(0, np.rint(gaps / gaps.min(initial=np.inf)).cumsum()).astype(np.int64)[which]
    place -= place.min()
    merged = -(-(int(place.max()) + 1) // most)
    return np.bincount(place // merged, weights=[count for _, count in bars]).astype(np.int64).tolist()


def groups_of_sample(
    counts: Int[Tensor, "latents bins"], values: Float[Tensor, "latents sample"], groups: int
) -> Int[Tensor, "latents sample"]:
    """Quantile group of each value of a random sample; -1 where it is 0, which is none.

    Group g of G holds the activations with a share in [g/G, (g+1)/G) of all below them, half of those that equal them
    counted. What lies in lower bins is known; within a bin the sampled values stand for all of it, so the groups are
    exact where the sample holds every activation or a bin no two that differ.
    """
    none = values <= 0
    ordered = values.masked_fill(none, torch.inf).sort(dim=1).values
    bins = bin_of(ordered.reshape(-1)).view(values.shape).masked_fill(ordered.isinf(), BINS)
    mine = bin_of(values.reshape(-1)).view(values.shape)
    first, end = torch.searchsorted(bins, mine), torch.searchsorted(bins, mine, right=True)
    middle = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True) - 2 * first
    mine, twice = mine.long(), 2 * (end - first).clamp(min=1)
    before = (counts.cumsum(1) - counts).gather(1, mine)
    total = counts.sum(1, keepdim=True).clamp(min=1)
    rank = twice * before + counts.gather(1, mine) * middle
    group = torch.div(rank * groups, twice * total, rounding_mode="floor").clamp(max=groups - 1)
    return group.masked_fill(none, -1)
