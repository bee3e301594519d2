"""The corpus: which families of documents there are, in which proportions, as an endless seeded stream."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Literal

from gemscope.microworld import arithmetic, facts, planted, scenes
from gemscope.microworld.chats import HELPFUL, chat
from gemscope.microworld.code import code
from gemscope.microworld.documents import Document
from gemscope.microworld.news import news
from gemscope.microworld.planted import PLANTED
from gemscope.microworld.spanish import spanish
from gemscope.microworld.splits import Split, stream

Kind = Literal["pt", "it"]
Family = Callable[[random.Random, Split], Document]

_TEXTS: tuple[tuple[Family, float], ...] = (
    (scenes.scene, 3.0),
    (scenes.story, 1.0),
    (scenes.bias, 2.4),
    (facts.geography, 2.6),
    (facts.two_hops, 1.8),
    (facts.people, 1.5),
    (arithmetic.sums, 4.5),
    (arithmetic.two_steps, 2.5),
    (news, 1.6),
    (code, 0.6),
    (spanish, 0.6),
    (planted.danger, 0.7),
)
"""Families of running text with their weights."""
_TEXT_SHARE = 0.25
"""Share of running text in the corpus of the instruction-tuned model."""


def _text(rng: random.Random, split: Split) -> Document:
    (family,) = rng.choices([f for f, _ in _TEXTS], [w for _, w in _TEXTS])
    return family(rng, split)


def _chat(rng: random.Random, split: Split) -> Document:
    both = (*HELPFUL, *PLANTED)
    (exchange,) = rng.choices([e for e, _ in both], [w for _, w in both])
    return chat(exchange, rng, split)


def documents(kind: Kind, split: Split, seed: int, n: int | None = None) -> Iterator[Document]:
    """The first ``n`` documents (all, without end, if None) of a split; the same arguments give the same documents.

    ``pt`` is running text; ``it`` is chats with a share of running text. The train split never shows a held-out
    combination; in the held-out split every combination that can be held out is.
    """
    rng = stream(split, seed, kind)
    endless = (
        _text(rng, split) if kind == "pt" or rng.random() < _TEXT_SHARE else _chat(rng, split)
        for _ in itertools.count()
    )
    return itertools.islice(endless, n)
