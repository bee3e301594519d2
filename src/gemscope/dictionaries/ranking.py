"""The k-th largest of each row and the entries that reach a floor, by numpy where few CPU threads share the work.

Numpy's selection takes half the time of ``topk``, its comparison and search of a block a fifth of torch's. It knows no
bf16, whose bits are compared as integers instead.
"""

import numpy as np
import numpy.typing as npt
import torch

from gemscope.core.arrays import Float, Int, Shaped, Tensor

_FEW = 2
"""Threads up to which numpy, which has one, is ahead."""
_MAGNITUDE = 0x7FFF
"""All bits of a bf16 number but the sign."""


def _for_numpy(table: Tensor) -> bool:
    return table.device.type == "cpu" and torch.get_num_threads() <= _FEW


def kth_largest(table: Shaped[Tensor, "rows n"], k: int) -> Shaped[Tensor, " rows"]:
    """The k-th largest of each row."""
    if not _for_numpy(table):
        return table.topk(k, dim=1, sorted=False).values.amin(1)
    at = table.shape[1] - k
    return torch.from_numpy(np.partition(table.numpy(), at, axis=1)[:, at].copy())


def kth_of_groups(block: Float[Tensor, "rows n"], group: int, k: int) -> Float[Tensor, " rows"]:
    """The k-th largest of the maxima of groups of ``group`` entries, in each row; 0 where it is negative.

    k groups reach it, hence k entries do: the k-th largest entry is no smaller.
    """
    if block.dtype == torch.bfloat16 and _for_numpy(block):  # bits are in order as integers but for negative numbers
        maxima = block.view(torch.int16).view(len(block), group, -1).amax(1)
        return kth_largest(maxima, k).view(torch.bfloat16).clamp(min=0)
    return kth_largest(block.view(len(block), group, -1).amax(1), k).clamp(min=0)


def reaching(block: Float[Tensor, "rows n"], floor: Float[Tensor, "rows 1"]) -> Int[Tensor, " entries"]:
    """The flat places, in order, of the entries that are at least the floor of their row."""
    if not _for_numpy(block):
        return (block >= floor).view(-1).nonzero()[:, 0]
    found = _bf16_reaches(block, floor) if block.dtype == torch.bfloat16 else block.numpy() >= floor.numpy()
    return torch.from_numpy(np.flatnonzero(found))


def _bf16_reaches(block: Tensor, floor: Tensor) -> npt.NDArray[np.bool_]:
    """Signed integers compare where no floor is negative; where all are, the bits without sign, the other way."""
    low = floor.bfloat16()
    low = torch.where(low < floor, low.nextafter(torch.full_like(low, torch.inf)), low)  # none lies between
    low = torch.where(low == 0, -0.0, low)  # which 0.0 reaches too
    bits, level = (one.view(torch.int16).numpy() for one in (block, low))
    if (level >= 0).all():
        return bits >= level
    if not (level < 0).all():
        bits, level = bits ^ (turned := np.where(level < 0, np.int16(0), np.int16(_MAGNITUDE))), level ^ turned
    return bits.view(np.uint16) <= level.view(np.uint16)
