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
        """Of each size, up to ``spare_bytes`` are kept for later."""
        self._spare: dict[tuple[int, int], list[Bytes]] = {}
        self._spare_bytes = spare_bytes

    def rows(self, count: int, width: int) -> Bytes:
        """[count, width], holding anything."""
        spare = self._spare.setdefault((count, width), [])
        memory = spare.pop() if spare else np.empty((count, width), np.uint8)
        lent = memory[:]
        weakref.finalize(lent, _give_back, memory, spare, self._spare_bytes).atexit = False
        return lent


def _give_back(memory: Bytes, spare: list[Bytes], limit: int) -> None:
    if memory.nbytes * len(spare) < limit:
        spare.append(memory)
