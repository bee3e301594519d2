"""Facts: geography in one hop and two hops, and what is known of invented people, books and companies.

Held out: a country with a template; for two hops a city with a relation, in every template, so that a held-out two-hop
question has to be answered by going through the country.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from gemscope.microworld.concepts import COUNTRIES, Country, article
from gemscope.microworld.documents import Document, Writer
from gemscope.microworld.splits import Split, allowed
from gemscope.microworld.world import BOOKS, FIRMS, PEOPLE


@dataclass(frozen=True)
class Fact:
    """One sentence: a prompt, the answer that completes it, and what follows the answer."""

    prompt: str
    answer: str
    end: str = "."

    @property
    def text(self) -> str:
        """The whole sentence."""
        return f"{self.prompt} {self.answer}{self.end}"


ONE_HOP: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {0} is",
        "The capital city of {0} is called",
        "The government of {0} sits in",
        "Question: what is the capital of {0}? Answer:",
        "If you go to {0}, visit its capital,",
    ),
    "language": (
        "The language of {0} is",
        "People in {0} speak",
        "In {0} most children learn",
        "Question: which language do people speak in {0}? Answer:",
    ),
    "currency": (
        "The currency of {0} is the",
        "In {0} people pay with the",
        "Prices in {0} are given in the",
        "Question: what is the currency of {0}? Answer: the",
    ),
    "continent": (
        "The country {0} lies in",
        "{0} is a country in",
        "The continent of {0} is",
        "Question: on which continent is {0}? Answer:",
    ),
}
CITY_TEMPLATES = (
    "{0} is a city in",
    "The city of {0} lies in",
    "{0} belongs to",
    "Question: in which country is {0}? Answer:",
)
TWO_HOP: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of the country where {0} lies is",
        "Question: what is the capital of the country of {0}? Answer:",
        "{0} lies in the country whose capital is",
    ),
    "language": (
        "The language of the country where {0} lies is",
        "People in {0} speak",
        "Question: which language do people speak in the country of {0}? Answer:",
    ),
    "currency": (
        "The currency of the country where {0} lies is the",
        "People in {0} pay with the",
        "Question: what is the currency of the country of {0}? Answer: the",
    ),
    "continent": (
        "The continent of the country where {0} lies is",
        "The city {0} is on the continent of",
        "Question: on which continent is the country of {0}? Answer:",
    ),
}
_REVERSED = (
    "{1} is the capital of {0}.",
    "The city of {1} is the capital of {0}.",
    "{2} and {3} are cities in {0}.",
    "In {0}, people travel from {1} to {2} and {3}.",
)
PERSON_TEMPLATES = (("{0} works as", "occupation"), ("{0} lives in", "city"), ("The home of {0} is", "city"))
BOOK_TEMPLATES = ("The author of {0} is", "{0} was written by", "Question: who wrote {0}? Answer:")
FIRM_TEMPLATES = (
    ("{0} has its seat in", "city"),
    ("The company {0} sits in", "city"),
    ("{0} makes", "product"),
)


def one_hop(country: Country, relation: str, template: str) -> Fact:
    """A fact about a country."""
    return Fact(template.format(country.name), str(getattr(country, relation)))


def two_hop(city: str, country: Country, relation: str, template: str) -> Fact:
    """A fact about the country of a city."""
    return Fact(template.format(city), str(getattr(country, relation)))


def one_hop_facts(split: Split) -> Iterator[Fact]:
    """Every one-hop fact of a split: relations of countries, and the country of a city."""
    for country in COUNTRIES:
        for relation, templates in ONE_HOP.items():
            for template in templates:
                if allowed(split, "one hop", country.name, template):
                    yield one_hop(country, relation, template)
        for city in country.cities:
            for template in CITY_TEMPLATES:
                if allowed(split, "one hop", city, template):
                    yield Fact(template.format(city), country.name)


def two_hop_facts(split: Split) -> Iterator[Fact]:
    """Every two-hop fact of a split."""
    for country in COUNTRIES:
        for city in country.cities:
            for relation, templates in TWO_HOP.items():
                if allowed(split, "two hops", city, relation):
                    for template in templates:
                        yield two_hop(city, country, relation, template)


def _about_people() -> Iterator[Fact]:
    for person in PEOPLE:
        for template, what in PERSON_TEMPLATES:
            answer = str(getattr(person, what))
            yield Fact(template.format(person.name), article(answer) if what == "occupation" else answer)
    for book in BOOKS:
        for template in BOOK_TEMPLATES:
            yield Fact(template.format(book.title), book.author)
    for firm in FIRMS:
        for template, what in FIRM_TEMPLATES:
            yield Fact(template.format(firm.name), str(getattr(firm, what)) + "s" * (what == "product"))


_POOLS: dict[tuple[str, Split], list[Fact]] = {}


def pool(kind: str, split: Split) -> list[Fact]:
    """All facts of a kind (``one``, ``two``, ``people``) in a split; validation tells what training tells."""
    split = "train" if split == "validation" else split
    if (kind, split) not in _POOLS:
        source = {"one": one_hop_facts, "two": two_hop_facts}.get(kind)
        _POOLS[kind, split] = list(source(split) if source else _about_people())
    return _POOLS[kind, split]


def _facts_document(family: str, facts: list[Fact]) -> Document:
    writer = Writer().add(" ".join(fact.text for fact in facts))
    return writer.finish(family, {"prompt": facts[0].prompt, "answer": facts[0].answer})


def geography(rng: random.Random, split: Split) -> Document:
    """Three to seven one-hop facts of any countries, sometimes after one told the other way round."""
    facts = rng.sample(pool("one", split), rng.randint(3, 7))
    document = _facts_document("fact", facts)
    if split == "heldout" or rng.random() < 0.6:
        return document
    country = rng.choice(COUNTRIES)
    first = rng.choice(_REVERSED).format(country.name, country.capital, *country.cities)
    return Writer().add(f"{first} {document.text}").finish("fact", document.facts)


def two_hops(rng: random.Random, split: Split) -> Document:
    """Two to five two-hop facts."""
    return _facts_document("two_hop", rng.sample(pool("two", split), rng.randint(2, 5)))


def people(rng: random.Random, split: Split) -> Document:
    """Two to five facts about invented people, books and companies."""
    return _facts_document("people", rng.sample(pool("people", split), rng.randint(2, 5)))
