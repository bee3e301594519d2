"""Rows of a file, read straight to their places: what would first be read and then permuted is copied once."""

import ctypes
import errno
import os
from collections.abc import Sequence

import numpy as np

from gemscope.activations.lending import Bytes
from gemscope.activations.order import Ints
from gemscope.core.errors import FormatError

_AT_ONCE = os.sysconf("SC_IOV_MAX")
"""Places that one call of the system takes."""

_preadv = ctypes.CDLL(None, use_errno=True).preadv
_preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_preadv.restype = ctypes.c_ssize_t


class Places:
    """Places for rows in arrays, which stay in memory while there is one of these."""

    def __init__(self, memory: Sequence[Bytes], place: Ints) -> None:
        """Row i goes to row ``place[i]`` of the arrays, counted through them, or nowhere where ``place[i]`` is -1.

        The arrays are [places, bytes a row]. Raises ValueError for a place that they do not have.
        """
        (self._width,) = {one.shape[1] for one in memory}
        spots = np.concatenate([one.ctypes.data + self._width * np.arange(len(one)) for one in memory])
        fit = all(one.flags.c_contiguous and one.flags.writeable for one in memory)
        if not fit or np.any((place < -1) | (place >= len(spots))):
            raise ValueError(f"there are not all the places in {len(spots)} rows of memory")
        nowhere = np.empty(self._width, np.uint8)
        self._memory = [*memory, nowhere]
        self._vectors = np.empty((len(place), 2), np.uintp)  # struct iovec: where it goes, how many bytes
        self._vectors[:, 0] = np.append(spots, nowhere.ctypes.data)[place]
        self._vectors[:, 1] = self._width

    def read(self, handle: int, offset: int, first: int, last: int) -> None:
        """Read rows ``first`` to ``last`` from byte ``offset`` on; raises FormatError when the file cannot be read or
        ends too early.
        """
        if not 0 <= first <= last <= len(self._vectors):
            raise ValueError(f"rows {first} to {last} of {len(self._vectors)}")
        while first < last:
            count = _preadv(
                handle,
                self._vectors.ctypes.data + self._vectors.strides[0] * first,
                min(last - first, _AT_ONCE),
                offset,
            )
            if count < 0:
                if (number := ctypes.get_errno()) == errno.EINTR:
                    continue
                raise FormatError(f"cannot read a shard ({os.strerror(number)}); verify the store.")
            if count < self._width:
                raise FormatError("a shard ends before its last row; it was truncated while open: verify the store.")
            rows = count // self._width
            first, offset = first + rows, offset + rows * self._width
