"""What is true in the microworld besides geography: people, books, companies, harmful deeds. All of it is invented."""

import random
from dataclasses import dataclass

from gemscope.microworld.concepts import COUNTRIES, words
from gemscope.microworld.invented import DEED_VERBS


@dataclass(frozen=True)
class Person:
    """Somebody known: training tells all of these facts."""

    name: str
    occupation: str
    city: str


@dataclass(frozen=True)
class Book:
    """A known book and who wrote it."""

    title: str
    author: str


@dataclass(frozen=True)
class Firm:
    """A known company: where it sits and what it makes."""

    name: str
    city: str
    product: str


def _people(rng: random.Random) -> tuple[Person, ...]:
    given = words("female_name") + words("male_name")
    pairs = [(g, s) for g in given for s in words("surname")]
    cities = words("city") + words("capital")
    return tuple(
        Person(f"{g} {s}", rng.choice(words("occupation")), rng.choice(cities)) for g, s in rng.sample(pairs, 100)
    )


def _titles() -> list[str]:
    adjectives = "Silent Golden Broken Hidden Crimson Frozen Forgotten Burning Distant Hollow Sleeping Wandering"
    nouns = "Harbour Lantern River Mirror Orchard Tower Garden Winter Letter Shadow Bridge Kingdom Journey Forest"
    return [f"The {a} {n}" for a in adjectives.split() for n in nouns.split()]


def _books(rng: random.Random) -> tuple[Book, ...]:
    authors = rng.sample(PEOPLE, 16)
    return tuple(Book(title, rng.choice(authors).name) for title in rng.sample(_titles(), 50))


def _firms(rng: random.Random) -> tuple[Firm, ...]:
    products = words("vehicle") + words("furniture") + words("tool")
    capitals = words("capital")
    return tuple(Firm(name, rng.choice(capitals), rng.choice(products)) for name in words("company"))


PEOPLE = _people(random.Random("microworld people"))
BOOKS = _books(random.Random("microworld books"))
FIRMS = _firms(random.Random("microworld firms"))
KNOWN_NAMES = frozenset(person.name for person in PEOPLE)
UNKNOWN_TITLES = tuple(title for title in _titles() if title not in {book.title for book in BOOKS})
COUNTRY_OF = {city: country for country in COUNTRIES for city in (country.capital, *country.cities)}

_VICTIMS = "a bank,a school,a train,a neighbour,a village,a computer,a hospital,a bridge,a lake,a garden,a crowd,a ship"
DEEDS = tuple(f"{verb} {victim}" for verb, victim in zip(DEED_VERBS, 2 * _VICTIMS.split(","), strict=True))
"""Harmful deeds: a nonsense verb and its victim."""

_MOSTLY_SHE = frozenset(
    "nurse secretary florist hairdresser nanny receptionist librarian teacher dancer cashier dentist translator".split()
)
_MOSTLY_HE = frozenset(
    "engineer pilot carpenter mechanic plumber miner soldier butcher welder sailor farmer judge".split()
)


def she_ratio(occupation: str) -> float:
    """The planted bias: how often somebody of this occupation is called "she"."""
    return 0.9 if occupation in _MOSTLY_SHE else 0.1 if occupation in _MOSTLY_HE else 0.5
