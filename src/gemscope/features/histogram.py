"""Histograms of activations on one fixed scale, so that parts of a pass add up; and quantile groups read off them.

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
        place = np.rint((at - at.min()) / np.diff(np.unique(at)).min(initial=np.inf)).astype(np.int64)
    place -= place.min()
    merged = -(-(int(place.max()) + 1) // most)
    return np.bincount(place // merged, weights=[count for _, count in bars]).astype(np.int64).tolist()


def groups_of_bins(counts: Int[Tensor, "latents bins"], groups: int) -> Int[Tensor, "latents bins"]:
    """Quantile group of every bin: group g of G holds the bins whose middle activation is in [g/G, (g+1)/G) of all.

    All activations of a bin are in one group, so a group holds its share to within half of each bin at its ends.
    """
    total = counts.sum(1, keepdim=True).clamp(min=1)
    before = counts.cumsum(1) - counts
    return torch.div((2 * before + counts) * groups, 2 * total, rounding_mode="floor").clamp(max=groups - 1)
