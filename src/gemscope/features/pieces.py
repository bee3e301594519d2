"""How a vocabulary spells its tokens: one text of all spellings and where each begins, read by the page."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from gemscope.core.errors import FormatError
from gemscope.features import layout

_STARTS, _TEXT = "piece_starts.npy", "piece_text.npy"
_HEAD = 1 << 18
"""Bytes that hold where the commonest pieces begin, and themselves."""


class Pieces:
    """The spellings that an index keeps, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Raises FormatError when a file is missing or damaged."""
        self._starts = layout.load(folder / _STARTS, scattered=True)
        self._text = layout.load(folder / _TEXT, scattered=True)
        if self._starts[-1] != len(self._text):
            raise FormatError(f"{folder / _TEXT} is damaged (not as long as its pieces); make the index again.")

    @staticmethod
    def prefetch(folder: Path) -> None:
        """Ask for what opening reads."""
        layout.prefetch_heads([folder / _STARTS, folder / _TEXT], _HEAD)

    def of(self, ids: Iterable[int]) -> dict[int, str]:
        """Token id -> spelling, without those that were not kept."""
        wanted = np.array(sorted(i for i in ids if 0 <= i < len(self._starts) - 1), np.int64)
        layout.prefetch(self._starts, wanted, 2)
        starts, ends = self._starts[wanted], self._starts[wanted + 1]
        layout.prefetch(self._text, starts, 64)
        text = np.asarray(self._text).data
        places = zip(wanted.tolist(), starts.tolist(), ends.tolist(), strict=True)
        return {i: str(text[start:end], "utf-8") for i, start, end in places if start < end}

    def ids_of(self, texts: Iterable[str]) -> list[int]:
        """Tokens with one of these spellings."""
        for array in (self._starts, self._text):
            layout.prefetch(array, np.zeros(1, np.int64), len(array))
        lengths, whole, found = np.diff(self._starts), np.array(self._text), list[int]()
        for text in texts:
            spelling = text.encode()
            ids = np.flatnonzero(lengths == len(spelling)) if spelling else np.zeros(0, np.int64)
            for at, byte in enumerate(spelling):
                ids = ids[whole[self._starts[ids] + at] == byte]
            found += ids.tolist()
        return sorted(found)


def save_pieces(folder: Path, pieces: Mapping[int, str]) -> None:
    """Write the spellings of token ids, none of them empty."""
    spelled = {i: text.encode() for i, text in sorted(pieces.items())}
    starts = np.zeros(max(spelled, default=-1) + 2, np.uint32)
    for i, text in spelled.items():
        starts[i + 1] = len(text)
    layout.save(folder / _STARTS, np.cumsum(starts, dtype=np.uint32))
    layout.save(folder / _TEXT, np.frombuffer(b"".join(spelled.values()), np.uint8))
