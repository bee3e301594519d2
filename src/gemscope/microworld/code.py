"""A few lines of program text, in the manner of Python, each token marked as keyword, name, operator or literal."""

import random
import re

from gemscope.microworld.documents import Document, Writer
from gemscope.microworld.splits import Split

_NAMES = "total count index value item price name list data width height speed score result left right size key".split()
_FUNCTIONS = "add_all find_max count_words get_price make_list read_file sort_items is_empty print_name double".split()
_STRINGS = ("'ok'", "'error'", "'done'", "'yes'", "'no'", "'start'")
_TEMPLATES = (
    "def {f}({a}, {b}):\n    {c} = {a} + {b}\n    return {c}\n",
    "def {f}({a}):\n    if {a} > {n}:\n        return {s}\n    else:\n        return {s2}\n",
    "for {a} in range({n}):\n    {b} = {b} + {a}\nprint({b})\n",
    "{a} = {n}\n{b} = {n2}\nif {a} < {b}:\n    print({s})\n",
    "while {a} < {n}:\n    {a} = {a} + {n2}\n    print({a})\n",
    "def {f}({a}):\n    {b} = []\n    for {c} in {a}:\n        {b}.append({c})\n    return {b}\n",
    "{a} = [{n}, {n2}, {n3}]\n{b} = len({a})\nprint({b} * {n})\n",
    "class {t}:\n    def {f}(self, {a}):\n        self.{a} = {a}\n        return not {b}\n",
    "import math\n{a} = math.sqrt({n})\nassert {a} > {n2}\n",
)
_KEYWORDS = frozenset("def return if else for in while not class import assert and or".split())
_PIECE = re.compile(r"'[^']*'|\d+|[A-Za-z_]\w*|[-+*/=<>()\[\]:,.]|\s+")


def _concept(piece: str) -> str | None:
    if piece.isspace():
        return None
    if piece in _KEYWORDS:
        return "code_keyword"
    if piece[0].isdigit() or piece[0] == "'":
        return "code_literal"
    return "code_name" if piece[0].isalpha() or piece[0] == "_" else "code_operator"


def write_code(writer: Writer, rng: random.Random) -> None:
    """Append one small program."""
    a, b, c = rng.sample(_NAMES, 3)
    n, n2, n3 = (str(rng.randint(0, 99)) for _ in range(3))
    s, s2 = rng.sample(_STRINGS, 2)
    text = rng.choice(_TEMPLATES).format(
        a=a, b=b, c=c, f=rng.choice(_FUNCTIONS), t=rng.choice(_NAMES).title(), n=n, n2=n2, n3=n3, s=s, s2=s2
    )
    for piece in _PIECE.findall(text):
        writer.add(piece, _concept(piece))


def code(rng: random.Random, _split: Split) -> Document:
    """One or two small programs."""
    writer = Writer()
    for _ in range(rng.randint(1, 2)):
        write_code(writer, rng)
    return writer.finish("code")
