"""Rows of a file, read straight to their places: what would first be read and then permuted is copied once."""

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gemscope.activations.lending import Bytes
from gemscope.core.errors import FormatError


class Places:
    """Places for rows in arrays, which stay in memory while there is one of these."""

    def __init__(self, memory: Sequence[Bytes], width: int, skipped: int = 0) -> None:
        """Place ``skipped`` is the first row of the arrays, and so on through them; the places before it are nowhere.

        The arrays are [places, ``width``].
        """
        if not all(one.flags.c_contiguous and one.flags.writeable and one.shape[1] == width for one in memory):
            raise ValueError(f"memory for rows of {width} bytes is not writable, contiguous and that wide")
        nowhere = np.empty(width, np.uint8)
        self._memory, self._width = [*memory, nowhere], width
        spots = [one.ctypes.data + width * np.arange(len(one)) for one in memory]
        none = np.array([nowhere.ctypes.data])
        self._spots = np.concatenate([none.repeat(skipped), *spots, none]).astype(np.uintp)

    def read(self, handle: int, offset: int, place: npt.NDArray[np.integer[Any]]) -> None:
        """Row i of those that begin at byte ``offset`` goes to ``place[i]``, or nowhere where that is -1.

        Raises FormatError when the file cannot be read or ends too early, and ValueError, before anything is read, for
        a place that there is not.
        """
        if len(place) and not -1 <= place.min() <= place.max() < len(self._spots) - 1:
            raise ValueError(f"there are not all the places among {len(self._spots) - 1}")
        parts = np.empty((len(place), 2), np.uintp)  # struct iovec: where it goes, how many bytes
        parts[:, 0], parts[:, 1] = self._spots[place], self._width
        preadv, at_once = _system()
        done = read = 0
        while done < len(parts):
            now = parts[done : done + at_once]
            count = preadv(handle, now.ctypes.data, len(now), offset)
            if count < 0:
                if (number := ctypes.get_errno()) == errno.EINTR:
                    continue
                raise FormatError(f"cannot read a shard ({os.strerror(number)}); verify the store.")
            if count == 0:
                raise FormatError("a shard ends before its last row; it was truncated while open: verify the store.")
            offset += count
            rows, rest = divmod(read + count, self._width)
            done, read = done + rows, rest
            if rest:  # of this row the last bytes are missing
                parts[done] = int(self._spots[place[done]]) + rest, self._width - rest


@cache
def _system() -> tuple[Callable[..., int], int]:
    """(preadv, places that it takes at once)."""
    preadv = ctypes.CDLL(None, use_errno=True).preadv
    preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
    preadv.restype = ctypes.c_ssize_t
    return preadv, os.sysconf("SC_IOV_MAX")
