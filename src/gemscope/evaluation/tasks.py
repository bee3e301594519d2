"""Labels made by rule from the text itself: exact, for any language model and any text, with no download.

Each rule is a function of the characters alone, so there is no annotator to be wrong.
"""

import re
from collections.abc import Callable, Sequence

import torch

from gemscope.core.arrays import Bool, Tensor
from gemscope.evaluation.concepts import ConceptLabels
from gemscope.models.tokens import Tokens

Spans = list[tuple[int, int]]

_STOP_WORDS = {
    "english": frozenset("the and of is in that was to it with for his her are on at they".split()),
    "spanish": frozenset("el la los las de y que en un una por con es está del se su".split()),
    "french": frozenset("le la les des et que dans un une est pour sur pas du au".split()),
    "german": frozenset("der die das und ist nicht ein eine mit auf den dem zu von".split()),
}
_SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]*")
_WORD = re.compile(r"[^\W\d_]+")
_CODE = re.compile(
    r"(?m)^(?:[ \t]*(?:def |class |return\b|import |from \w+ import|for \w+ in |while |if .*:$|else:|print\()"
    r"|[ \t]*\w+ [-+*/]?= ).*$"
)


def _matches(pattern: str) -> Callable[[str], Spans]:
    compiled = re.compile(pattern, re.DOTALL)
    return lambda text: [match.span() for match in compiled.finditer(text)]


def _inside(pattern: str) -> Callable[[str], Spans]:
    """What the first group matches."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda text: [match.span(1) for match in compiled.finditer(text) if match.end(1) > match.start(1)]


def language(name: str) -> Callable[[str], Spans]:
    """Sentences with at least two stop words of a language, and more of it than of any other."""

    def find(text: str) -> Spans:
        found: Spans = []
        for match in _SENTENCE.finditer(text):
            words = [word.lower() for word in _WORD.findall(match[0])]
            counts = {one: sum(word in known for word in words) for one, known in _STOP_WORDS.items()}
            others = max(count for one, count in counts.items() if one != name)
            if counts[name] >= 2 and counts[name] > others:
                found.append(match.span())
        return found

    return find


def _code(text: str) -> Spans:
    return [match.span() for match in _CODE.finditer(text)]


RULES: dict[str, Callable[[str], Spans]] = {
    "language: english": language("english"),
    "language: spanish": language("spanish"),
    "language: french": language("french"),
    "language: german": language("german"),
    "digit": _matches(r"\d+"),
    "all capitals": _matches(r"\b[A-Z]{2,}\b"),
    "capital initial": _matches(r"\b[A-Z][a-z]+\b"),
    "inside quotes": _inside(r'"([^"\n]{1,300})"'),
    "inside parentheses": _inside(r"\(([^()\n]{1,300})\)"),
    "code": _code,
    "ends a sentence": _matches(r"[.!?](?=\s|$)"),
}
"""Name -> spans of characters to which it applies."""

REPEAT = "repeats an earlier token"
PREFIX = "rule: "


def rule_labels(items: Sequence[Tokens]) -> ConceptLabels:
    """Every rule as a column, and one for content tokens whose like came before in the same text."""
    names = tuple(PREFIX + name for name in (*RULES, REPEAT))
    return ConceptLabels(names, [_marks(item) for item in items])


def _marks(tokens: Tokens) -> Bool[Tensor, "pos rules"]:
    found = torch.zeros(len(tokens), len(RULES) + 1, dtype=torch.bool)
    owner = torch.full((len(tokens.text),), 0, dtype=torch.bool)
    for column, rule in enumerate(RULES.values()):
        owner.zero_()
        for start, end in rule(tokens.text):
            owner[start:end] = True
        marked = owner.tolist()
        for row, (start, end) in enumerate(tokens.offsets):
            shown = [i for i in range(start, end) if not tokens.text[i].isspace()]
            found[row, column] = any(marked[i] for i in shown)
    seen: set[int] = set()
    for row, (token, content) in enumerate(zip(tokens.ids.tolist(), tokens.content_mask.tolist(), strict=True)):
        found[row, -1] = content and token in seen
        if content:
            seen.add(token)
    return found
