"""Tokens as a person reads them, from the spellings that an index keeps."""

from collections.abc import Sequence

from gemscope.models.tokens import spelled


def readable(pieces: Sequence[str]) -> list[str]:
    """What each piece adds to the text: together they are the text.

    A character that was split into bytes stands whole at its first byte, and its other bytes add nothing; a byte that
    belongs to no character is U+FFFD.
    """
    if not any(piece.startswith("<0x") for piece in pieces):
        return [piece.replace("▁", " ") for piece in pieces]
    text, spans = spelled(pieces)
    found, done = list[str](), 0
    for start, end in spans:
        found.append(text[start:end] if start >= done else "")
        done = max(done, end)
    return found
