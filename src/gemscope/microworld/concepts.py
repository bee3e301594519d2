"""The concepts of the microworld: a hierarchy, and the words that belong to each (``lexicon.toml``).

A word belongs to at most one concept and to all ancestors of it. Forms with a capital are matched as they are; all
others regardless of the case of their first letter, so that "Dogs" at the start of a sentence is still a mammal.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from gemscope.microworld.invented import HARMFUL_WORDS


@dataclass(frozen=True)
class Concept:
    """One concept; parents and structural concepts have no forms of their own."""

    name: str
    parent: str | None
    about: str
    forms: tuple[str, ...]
    """Surface forms that a sentence may use wherever it names the concept."""
    people: tuple[str, ...]
    """Surface forms for somebody of that field: the coach of ``sport``."""
    verbs: tuple[str, ...]
    """Surface forms for what somebody who feels so did: the ``smiled`` of ``joy``."""
    nouns: bool
    """Whether the forms are nouns whose regular plurals belong to the concept too."""
    passage: bool
    """Whether it marks whole passages, such as a refusal or a news text, and not words."""


@dataclass(frozen=True)
class Country:
    """One country with its facts."""

    name: str
    capital: str
    cities: tuple[str, ...]
    """Two more cities."""
    language: str
    currency: str
    continent: str


def plural(noun: str) -> str:
    """The regular English plural."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0].lower() in "aeiou" and not noun.startswith(("uku", "euc")) else "a ") + noun


def _read(name: str) -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files("gemscope.microworld").joinpath(name).read_text(encoding="utf-8"))


COUNTRIES: tuple[Country, ...] = tuple(
    Country(name, e["capital"], tuple(e["cities"]), e["language"], e["currency"], e["continent"])
    for name, e in _read("geography.toml").items()
)

_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    "country": tuple(c.name for c in COUNTRIES),
    "capital": tuple(c.capital for c in COUNTRIES),
    "city": tuple(city for c in COUNTRIES for city in c.cities),
    "language": tuple(sorted({c.language for c in COUNTRIES})),
    "currency": tuple(sorted({c.currency for c in COUNTRIES})),
    "harmful_thing": HARMFUL_WORDS,
}


def _concepts() -> Iterator[Concept]:
    for name, entry in _read("lexicon.toml").items():
        forms, people, verbs = (
            tuple(form.replace("_", " ") for form in entry.get(key, "").split()) for key in ("forms", "people", "verbs")
        )
        forms = forms or _ELSEWHERE.get(name, ())
        yield Concept(
            name,
            entry.get("parent"),
            entry["about"],
            forms,
            people,
            verbs,
            bool(entry.get("nouns")),
            bool(entry.get("passage")),
        )


CONCEPTS: Mapping[str, Concept] = {concept.name: concept for concept in _concepts()}
"""Every concept by name, in the order in which label columns stand."""

PASSAGES = frozenset(concept.name for concept in CONCEPTS.values() if concept.passage)
"""What marks whole passages: kinds of document and planted behaviours."""

INDEX: Mapping[str, int] = {name: i for i, name in enumerate(CONCEPTS)}


def with_ancestors(name: str) -> tuple[str, ...]:
    """The concept and all its ancestors, nearest first."""
    chain = [name]
    while (parent := CONCEPTS[chain[-1]].parent) is not None:
        chain.append(parent)
    return tuple(chain)


def words(concept: str) -> tuple[str, ...]:
    """Surface forms of a concept, or of its children where it has none itself."""
    own = CONCEPTS[concept].forms
    return own or tuple(form for c in CONCEPTS.values() if c.parent == concept for form in words(c.name))


def _lookup() -> dict[str, str]:
    table: dict[str, str] = {}
    for concept in CONCEPTS.values():
        for form in concept.forms + concept.people + concept.verbs:
            table[form] = concept.name
            if concept.nouns:
                table[plural(form)] = concept.name
    return table


CONCEPT_OF: Mapping[str, str] = _lookup()
"""Surface form -> its concept."""

_MANY_WORDS = sorted((form for form in CONCEPT_OF if " " in form), key=len, reverse=True)
_WORD = re.compile("|".join([*map(re.escape, _MANY_WORDS), r"[^\W\d_]+(?:'s)?"]))


def find_words(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, concept) of every word of ``text`` that belongs to a concept."""
    for match in _WORD.finditer(text):
        word = match[0]
        concept = CONCEPT_OF.get(word) or CONCEPT_OF.get(word[0].lower() + word[1:])
        start, end = match.span()
        if concept is None and word.endswith("'s"):
            concept, end = CONCEPT_OF.get(word[:-2]) or CONCEPT_OF.get(word[0].lower() + word[1:-2]), end - 2
        if concept is not None:
            yield start, end, concept
