"""The texts that an index was made over: token ids, where contexts begin, which tokens are control tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemscope.features import layout

_CHARACTER = 8
"""Tokens that a character may be split into, at most, and some more."""
_HEAD = 1 << 18
"""Bytes that hold where contexts begin, unless there are very many."""


@dataclass(frozen=True)
class Span:
    """Part of a context: tokens ``low`` to ``high`` are shown, ``ids`` are those from ``start`` on."""

    first: int
    """Of the context."""
    low: int
    high: int
    start: int
    ids: list[int]
    special: tuple[bool, ...]
    """Which of the shown ones are control tokens."""
    doc: int


class Contexts:
    """The contexts of an index, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Raises FormatError when a file is missing or damaged."""
        self.starts = layout.load(folder / "starts.npy")
        self.docs = layout.load(folder / "docs.npy")
        self.tokens = layout.load(folder / "tokens.npy", scattered=True)
        self._special = layout.load(folder / "special.npy", scattered=True)

    @staticmethod
    def prefetch(folder: Path) -> None:
        """Ask for what opening reads."""
        layout.prefetch_heads((folder / f"{name}.npy" for name in ("starts", "docs")), _HEAD)
        layout.prefetch_heads((folder / f"{name}.npy" for name in ("tokens", "special")), layout.HEAD)

    def spans(self, tokens: Sequence[int], before: int | None, after: int | None) -> list[Span]:
        """What of their contexts is shown around some tokens, and read: a few more, so that no character is cut."""
        around, marked = _CHARACTER + (before or 0), np.array(tokens, np.int64)
        begin = np.maximum(marked - around, 0)
        layout.prefetch(self.tokens, begin, 2 * around)
        layout.prefetch(self._special, begin // 8, around // 4 + 2)
        number = np.searchsorted(self.starts, marked, side="right") - 1
        following = np.minimum(number + 1, len(self.starts) - 1)
        first = self.starts[number].astype(np.int64)
        last = np.where(following > number, self.starts[following], len(self.tokens))
        low = first if before is None else np.maximum(first, marked - before)
        high = last if after is None else np.minimum(last, marked + after + 1)
        start, stop = np.maximum(first, low - _CHARACTER), np.minimum(last, high + _CHARACTER)
        ids = np.asarray(self.tokens)
        places = zip(*(x.tolist() for x in (first, low, high, start, stop, self.docs[number])), strict=True)
        return [Span(a, b, c, d, ids[d:e].tolist(), self._specials(b, c), doc) for a, b, c, d, e, doc in places]

    def _specials(self, low: int, high: int) -> tuple[bool, ...]:
        bits = np.unpackbits(np.asarray(self._special)[low // 8 : high // 8 + 1])[low % 8 :][: high - low]
        return tuple(bits.astype(bool).tolist())
