"""Tokens as a person reads them, from the spellings that an index keeps."""

from collections.abc import Mapping, Sequence

from gemscope.models.tokens import spelled


def readable(pieces: Sequence[str]) -> list[str]:
    """What each piece adds to the text: together they are the text.

    A character that was split into bytes stands whole at its first byte, and its other bytes add nothing; a byte that
    belongs to no character is U+FFFD.
    """
    if not any(piece.startswith("<0x") for piece in pieces):
        return [piece.replace("▁", " ") for piece in pieces]
    text, spans = spelled(pieces, part=True)
    found, done = list[str](), 0
    for start, end in spans:
        found.append(text[start:end] if start >= done else "")
        done = max(done, end)
    return found


class Reader:
    """What tokens add to a text, where each may come many times."""

    def __init__(self, pieces: Mapping[int, str], *, marked: bool) -> None:
        """``pieces``: token id -> spelling; ``marked``: as the vocabulary writes it, not as text."""
        self._pieces = pieces
        self._alone = {i: piece.replace("▁", " ") for i, piece in pieces.items()} if marked else pieces
        self._bytes = {i for i, piece in pieces.items() if piece[:3] == "<0x"} if marked else set[int]()

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """What each of some tokens in a row adds; those without a spelling nothing."""
        if self._bytes.isdisjoint(ids):
            return [self._alone.get(i, "") for i in ids]
        return readable([self._pieces.get(i, "") for i in ids])
