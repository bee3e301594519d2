"""Lines of a table on a terminal, counted in cells."""

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from gemscope.core.arrays import Tensor
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


def hang(start: str, words: Sequence[str], cells: int, between: str = " ") -> list[str]:
    """Lines of ``cells`` cells: ``start`` and whole words, the further ones indented by as much."""
    rows = [""]
    for word in words:
        longer = f"{rows[-1]}{between}{word}" if rows[-1] else word
        if rows[-1] and cell_len(start + longer) > cells:
            rows.append(word)
        else:
            rows[-1] = longer
    return [start + rows[0], *(" " * cell_len(start) + row for row in rows[1:])]


def short(value: float, most: int, digits: int, sign: str = "-") -> str:
    """``value`` with ``digits`` decimals; where that is more than ``most`` characters, with fewer, or as 1e+07.

    ``sign`` "+" shows that of a positive value too.
    """
    written = [format(value, sign + form) for form in (*(f".{n}f" for n in range(digits, -1, -1)), ".1e", ".0e")]
    return next((one for one in written if len(one) <= most), written[-1])


def number(value: Tensor | float, cells: int, digits: int, sign: str = "-") -> str:
    """``short`` on the right of a column of ``cells`` cells, at least one of them a space in front."""
    return f"{short(float(value), cells - 1, digits, sign):>{cells}}"


def words_of(tokens: Tokens, start: int, stop: int) -> str:
    """Some neighbouring tokens as a person reads them; – for none."""
    if stop - start == 1:
        return shown(tokens.pieces[start])
    text = tokens.text[tokens.offsets[start][0] : tokens.offsets[stop - 1][1]] if stop > start else ""
    return " ".join(text.split()) or "–"
