"""Lines of a table on a terminal, counted in cells."""

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from gemscope.models.pieces import shown
from gemscope.models.tokens import Tokens

TOKEN = 14
"""Cells of a token's column."""


def pad(text: str, cells: int) -> str:
    """``text`` in exactly ``cells`` terminal cells with at least one space at the end, cut with … when longer."""
    if cell_len(text) >= cells:
        text = set_cell_size(text, cells - 2).rstrip() + "…"
    return set_cell_size(text, cells)


def cut(text: str, cells: int) -> str:
    """``text``, ended with … when it is longer than ``cells``."""
    return text if cell_len(text) <= cells else set_cell_size(text, cells - 1).rstrip() + "…"


def fit(words: Sequence[str], cells: int, between: str = " ") -> str:
    """As many whole words as fit."""
    line = ""
    for word in words:
        longer = f"{line}{between}{word}" if line else word
        if cell_len(longer) > cells:
            break
        line = longer
    return line


def words_of(tokens: Tokens, start: int, stop: int) -> str:
    """Some neighbouring tokens as a person reads them; – for none."""
    if stop - start == 1:
        return shown(tokens.pieces[start])
    text = tokens.text[tokens.offsets[start][0] : tokens.offsets[stop - 1][1]] if stop > start else ""
    return " ".join(text.split()) or "–"
