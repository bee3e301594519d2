"""Which tokens of an edited text stand for which tokens of the text before.

One region was changed, so what is common at the start and at the end is found by comparing token ids from both sides,
and the rest is grown to whole words: a change of one letter may cut the same word into other pieces.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

import torch

from gemscope.core.arrays import Bool, Float, Tensor
from gemscope.core.errors import InputError
from gemscope.models.tokens import Role, Tokens

GroupKind = Literal["equal", "replace", "insert", "delete"]

_NO_SPACES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Scripts that write no spaces between words: Thai, Lao, Burmese, Khmer, kana, Han."""
_NUMBERED = re.compile(r"(.+)#(\d+)")


@dataclass(frozen=True)
class Group:
    """Tokens ``a_start`` to ``a_stop`` before the edit stand against ``b_start`` to ``b_stop`` after it."""

    a_start: int
    a_stop: int
    b_start: int
    b_stop: int
    kind: GroupKind


@dataclass(frozen=True, eq=False)
class Alignment:
    """Groups that cover all tokens of both texts once, in order; all but one are ``equal``, one token each."""

    groups: tuple[Group, ...]

    @property
    def changed(self) -> int | None:
        """Which group was changed; None when the texts are equal."""
        return next((i for i, group in enumerate(self.groups) if group.kind != "equal"), None)

    @property
    def inserts(self) -> bool:
        """Whether the change is words put in where none stood before."""
        return self.changed is not None and self.groups[self.changed].kind == "insert"

    @property
    def comparable(self) -> Bool[Tensor, " group"]:
        """Groups with tokens on both sides."""
        return torch.tensor([g.kind not in ("insert", "delete") for g in self.groups])

    @property
    def length_change(self) -> int:
        """Tokens of the edited text less tokens of the text before."""
        return sum((g.b_stop - g.b_start) - (g.a_stop - g.a_start) for g in self.groups)

    @property
    def swapped(self) -> "Alignment":
        """The same with the two texts exchanged."""
        other: dict[GroupKind, GroupKind] = {"insert": "delete", "delete": "insert"}
        return Alignment(
            tuple(Group(g.b_start, g.b_stop, g.a_start, g.a_stop, other.get(g.kind, g.kind)) for g in self.groups)
        )

    def spans(self, side: Literal["a", "b"]) -> list[tuple[int, int]]:
        """Start and stop of every group in one of the texts."""
        return [(g.a_start, g.a_stop) if side == "a" else (g.b_start, g.b_stop) for g in self.groups]

    def as_dict(self) -> list[dict[str, Any]]:
        """Plain JSON values."""
        return [{"a": [g.a_start, g.a_stop], "b": [g.b_start, g.b_stop], "kind": g.kind} for g in self.groups]


def edited(text: str, edit: str) -> str:
    """``text`` with ``word=other`` carried out; ``word#2=other`` changes the second place where the word stands.

    ``word`` may be several words; an empty ``other`` deletes it. Raises InputError when there is no ``=``, the word is
    not in the text, or it is there more than once and none was chosen.
    """
    word, equals, other = edit.partition("=")
    if not equals or not word:
        raise InputError(f"cannot read the edit {edit!r}; write word=other.")
    wanted: int | None = None
    places = _places(text, word)
    if not places and (numbered := _NUMBERED.fullmatch(word)) is not None:
        word, wanted = numbered[1], int(numbered[2])
        places = _places(text, word)
    if not places:
        raise InputError(f"the word {word!r} is not in the text; give one that is, as word=other.")
    if wanted is None and len(places) > 1:
        raise InputError(f"{word!r} is {len(places)} times in the text; write {word}#1={other} to change the first.")
    if wanted is not None and not 1 <= wanted <= len(places):
        raise InputError(f"{word!r} is {len(places)} times in the text, so there is no {word}#{wanted}; count from 1.")
    start = places[(wanted or 1) - 1]
    stop = start + len(word)
    if not other and text[stop : stop + 1] == " ":
        stop += 1
    elif not other and stop == len(text) and text[:start].endswith(" "):
        start -= 1
    new = text[:start] + other + text[stop:]
    if not new:
        raise InputError("the edit leaves no text; keep at least one character.")
    return new


def align(a: Tokens, b: Tokens) -> Alignment:
    """Common start, changed words, common end."""
    before, after = a.ids.tolist(), b.ids.tolist()
    shorter = min(len(before), len(after))
    prefix = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    limit = shorter - prefix
    suffix = next((i for i in range(limit) if before[-1 - i] != after[-1 - i]), limit)
    if prefix + suffix < max(len(before), len(after)):
        while prefix > 0 and not (_starts_word(a, prefix) and _starts_word(b, prefix)):
            prefix -= 1
        while suffix > 0 and not (_starts_word(a, len(a) - suffix) and _starts_word(b, len(b) - suffix)):
            suffix -= 1
    groups = [Group(i, i + 1, i, i + 1, "equal") for i in range(prefix)]
    rest_a, rest_b = len(a) - suffix, len(b) - suffix
    if rest_a > prefix or rest_b > prefix:
        kind: GroupKind = "insert" if rest_a == prefix else "delete" if rest_b == prefix else "replace"
        groups.append(Group(prefix, rest_a, prefix, rest_b, kind))
    groups += [Group(rest_a + i, rest_a + i + 1, rest_b + i, rest_b + i + 1, "equal") for i in range(suffix)]
    return Alignment(tuple(groups))


def collapse(
    values: Float[Tensor, "layer head query key"], spans: list[tuple[int, int]]
) -> Float[Tensor, "layer head group group"]:
    """Keys of a group summed, queries of a group averaged, so that rows that sum to one still do.

    A group without tokens has a row and a column of zeros.
    """
    if all(stop - start == 1 for start, stop in spans):
        return values
    summed = torch.stack([values[..., start:stop].sum(-1) for start, stop in spans], dim=-1)
    rows = [
        summed[..., start:stop, :].mean(-2) if stop > start else torch.zeros_like(summed[..., 0, :])
        for start, stop in spans
    ]
    return torch.stack(rows, dim=-2)


def _places(text: str, word: str) -> list[int]:
    """Where ``word`` stands in ``text`` as whole words."""
    found: list[int] = []
    at = text.find(word)
    while at >= 0:
        whole = not _inside_word(text, at) and not _inside_word(text, at + len(word))
        found += [at] if whole else []
        at = text.find(word, at + (len(word) if whole else 1))
    return found


def _inside_word(text: str, at: int) -> bool:
    """Whether the characters before and after place ``at`` belong together: two letters or digits of a script that puts
    spaces between words, marks (Unicode category M) on the first left aside; or a mark and what it stands on.
    """
    if not 0 < at < len(text):
        return False
    base = at - 1
    while base > 0 and _is_mark(text[base]):
        base -= 1
    left, right = text[base], text[at]
    if _is_mark(right):
        return not left.isspace()
    return left.isalnum() and right.isalnum() and not _NO_SPACES.match(left) and not _NO_SPACES.match(right)


def _is_mark(char: str) -> bool:
    return unicodedata.category(char).startswith("M")


def _starts_word(tokens: Tokens, at: int) -> bool:
    """Whether a word begins at token ``at``: not inside one, nor inside a character."""
    if at >= len(tokens) or at == 0 or tokens.roles[at] is Role.SPECIAL or tokens.roles[at - 1] is Role.SPECIAL:
        return True
    start = tokens.offsets[at][0]
    if start == tokens.offsets[at - 1][0] and tokens.offsets[at - 1][1] > start:
        return False  # another byte of the same character
    return not _inside_word(tokens.text, start)
