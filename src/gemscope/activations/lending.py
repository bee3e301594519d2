"""Memory that is used again once nobody holds it: what is allocated anew is cleared by the system page by page, which
takes longer than filling it.
"""

import weakref

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Lender:
    """Lends memory; it comes back by itself when the last array or tensor that shares it is gone."""

    def __init__(self, spare_bytes: int) -> None:
        """Of each size, up to ``spare_bytes`` are kept for later, as long as the lender is there."""
        self._spare: dict[int, list[Bytes]] = {}
        self._spare_bytes = spare_bytes

    def rows(self, count: int, width: int) -> Bytes:
        """[count, width], holding anything."""
        spare = self._spare.setdefault(count * width, [])
        memory = spare.pop() if spare else np.empty(count * width, np.uint8)
        lent = np.frombuffer(memory.data, np.uint8)  # views hold it; those of an array would hold what is below
        weakref.finalize(lent, _give_back, weakref.ref(self), memory).atexit = False
        return lent.reshape(count, width)

    def take_back(self, memory: Bytes) -> None:
        """Keep it for later, or let it go."""
        spare = self._spare[memory.size]
        if memory.size * len(spare) < self._spare_bytes:
            spare.append(memory)


def _give_back(lender: weakref.ref[Lender], memory: Bytes) -> None:
    if (owner := lender()) is not None:
        owner.take_back(memory)
