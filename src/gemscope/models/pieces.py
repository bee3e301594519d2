"""A token as a person reads it in a table: one line, no invisible characters."""

import re

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_MARKS = {" ": "␣", "\n": "↵", "\t": "⇥"}


def shown(piece: str) -> str:
    """A vocabulary piece without the space in front of its word; spaces, newlines and tabs of its own are
    marked.

    ``▁the`` is the, ``▁▁`` is ␣, a newline is ↵, a byte that is no printable character stays ``<0x80>``.
    """
    if (byte := _BYTE.fullmatch(piece)) is not None:
        char = chr(int(byte[1], 16))
        return _MARKS.get(char, char if char.isascii() and char.isprintable() else piece)
    text = piece.replace("▁", " ")
    if len(text) > 1:
        text = text.removeprefix(" ")
    return "".join(_MARKS.get(char, char if char.isprintable() else f"\\u{ord(char):04x}") for char in text)
