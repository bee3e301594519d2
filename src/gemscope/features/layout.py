"""The files of an index, and how to read and write them; docs/formats.md describes them."""

import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemscope.core.errors import FormatError
from gemscope.core.files import atomic_path
from gemscope.features.config import IndexConfig
from gemscope.features.tally import STEPS

FORMAT = "gemscope.index"
VERSION = 2
HEAD = 1 << 12
"""Bytes that hold the header of an array."""

Array = npt.NDArray[Any]


def latent_dtype(config: IndexConfig) -> np.dtype[Any]:
    """One record a latent."""
    fields: list[tuple[str, str] | tuple[str, str, int]] = [
        ("count", "<i8"),
        ("density", "<f8"),
        ("peak", "<f4"),
        ("special_count", "<u4"),
        ("special_peak", "<f4"),
        ("steps", "<u4", STEPS),
        ("bins", "<u8"),
        ("n_bins", "<u2"),
        ("examples", "<u8"),
        ("near", "<u8"),
        ("n_top", "<u1"),
        ("n_group", "<u1", config.groups),
        ("promoted", "<i4", config.promoted),
        ("promoted_by", "<f4", config.promoted),
        ("suppressed", "<i4", config.promoted),
        ("suppressed_by", "<f4", config.promoted),
        ("nearest", "<i4", config.nearest),
        ("cosine", "<f4", config.nearest),
        ("elsewhere_in", "<i2", config.nearest),
        ("elsewhere", "<i4", config.nearest),
        ("elsewhere_cosine", "<f4", config.nearest),
        ("partner", "<i4", config.partners),
        ("partner_jaccard", "<f4", config.partners),
        ("partner_count", "<u4", config.partners),
    ]
    return np.dtype(fields)


EXAMPLE = np.dtype([("token", "<u4"), ("value", "<f4"), ("near", "<u2")])
"""One example: its place in the tokens, its activation, how many activations around it are kept."""

OUTPUT = np.dtype([("token", "<i4"), ("by", "<f4"), ("low_token", "<i4"), ("low_by", "<f4")])
"""A token that a latent promotes at one output layer, and one of those that it suppresses there."""

NEAR = np.dtype([("at", "<i1"), ("value", "<u2")])
"""An activation around an example: distance in tokens, and the bits of a bfloat16."""

NEAR_EXACT = np.dtype([("at", "<i2"), ("value", "<f4")])
"""The same as an import writes it."""

BIN = np.dtype([("bin", "<u1"), ("count", "<u4")])
"""A bin of a histogram that is not empty."""

BIN_EXACT = np.dtype([("centre", "<f4"), ("count", "<u4")])
"""The same as an import writes it: bars with their centres."""


def save(path: Path, array: Array) -> None:
    """Write an array as .npy, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def load(path: Path, *, scattered: bool = False) -> Array:
    """An array of the index, memory-mapped; raises FormatError when it is missing or damaged.

    Of one that is read here and there (``scattered``) the disk gives what is asked for, not all around it too.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if scattered and hasattr(mmap, "MADV_RANDOM"):
            array._mmap.madvise(mmap.MADV_RANDOM)
        return array
    except ValueError as error:
        if "mmap" not in str(error):  # an array without entries cannot be mapped
            raise FormatError(f"{path} is damaged ({error}); make the index again.") from error
        return np.load(path, allow_pickle=False)
    except OSError as error:
        raise FormatError(f"{path} is missing or damaged ({error}); make the index again.") from error


def prefetch(array: Array, starts: Array, count: int) -> None:
    """Ask for ``count`` entries from each of ``starts`` on: they are read from the disk at the same time."""
    mapped = getattr(array, "_mmap", None)
    if not isinstance(mapped, mmap.mmap) or not hasattr(mmap, "MADV_WILLNEED") or not len(starts):
        return
    head = array.offset if isinstance(array, np.memmap) else 0
    begin = head + np.sort(starts) * array.itemsize
    low, high = begin // mmap.PAGESIZE, (begin + count * array.itemsize - 1) // mmap.PAGESIZE + 1
    first = np.flatnonzero(np.append(True, low[1:] > high[:-1]))  # ranges that touch are asked for as one
    last = np.append(first[1:], len(low)) - 1
    for start, end in zip((low[first] * mmap.PAGESIZE).tolist(), (high[last] * mmap.PAGESIZE).tolist(), strict=True):
        if start < len(mapped):
            mapped.madvise(mmap.MADV_WILLNEED, start, min(end, len(mapped)) - start)


def prefetch_heads(paths: Iterable[Path], size: int) -> None:
    """Ask for the first ``size`` bytes of some files, so that one wait is for all of them; those missing are left."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            os.posix_fadvise(handle, 0, size, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


def bfloat16(bits: Array) -> Array:
    """Numbers from the bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
