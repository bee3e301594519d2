"""A document of the microworld: text with labelled spans, and the writer that builds one."""

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from gemscope.microworld.concepts import CONCEPTS, find_words

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` (exclusive) of a document belong to a concept."""

    start: int
    end: int
    concept: str


@dataclass(frozen=True)
class Document:
    """One text and everything that is true of it."""

    text: str
    """Chats are already rendered with Gemma's turn markers; ``<bos>`` is never part of the text."""
    spans: tuple[Span, ...]
    """Lexical spans (words) and structural ones (marked where the document was written); ancestors are left out."""
    family: str
    """Which generator wrote it, e.g. ``fact`` or ``chat.refusal``."""
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    """What a test needs to know: the expected answer, the occupation, the hint, ..."""


class Writer:
    """Builds a document piece by piece and remembers which characters belong to which structural concept."""

    def __init__(self) -> None:
        self._text = ""
        self._spans: list[Span] = []

    def add(self, text: str, concept: str | None = None) -> "Writer":
        """Append ``text``; all of it belongs to ``concept`` if one is given."""
        start = len(self._text)
        self._text += text
        if concept is not None:
            self._mark(start, concept)
        return self

    def fill(self, template: str, values: Mapping[str, str], marks: Mapping[str, str] | None = None) -> "Writer":
        """Append ``template`` with ``{slot}`` replaced by ``values[slot]``; ``marks`` names the concept of a slot."""
        at = 0
        for slot in _SLOT.finditer(template):
            self.add(template[at : slot.start()])
            self.add(values[slot[1]], (marks or {}).get(slot[1]))
            at = slot.end()
        return self.add(template[at:])

    @contextmanager
    def marked(self, concept: str) -> Generator[None]:
        """Everything added inside belongs to ``concept``."""
        start = len(self._text)
        yield
        self._mark(start, concept)

    @contextmanager
    def turn(self, role: str) -> Generator[str]:
        """A chat turn of ``user`` or ``model``; gives the text up to where the turn's content starts."""
        self.add(f"<start_of_turn>{role}\n")
        yield self._text
        self.add("<end_of_turn>\n")

    @property
    def text(self) -> str:
        """What was written so far."""
        return self._text

    def finish(self, family: str, facts: Mapping[str, str] | None = None) -> Document:
        """The document, with the words of the lexicon labelled too."""
        words = (Span(*found) for found in find_words(self._text))
        spans = sorted([*self._spans, *words], key=lambda s: (s.start, s.end, s.concept))
        return Document(self._text, tuple(spans), family, dict(facts or {}))

    def _mark(self, start: int, concept: str) -> None:
        assert concept in CONCEPTS, concept
        if start < len(self._text):
            self._spans.append(Span(start, len(self._text), concept))
