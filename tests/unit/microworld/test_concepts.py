import tomllib
from collections import Counter
from importlib import resources

from gemscope.microworld.concepts import (
    CONCEPT_OF,
    CONCEPTS,
    COUNTRIES,
    article,
    find_words,
    plural,
    with_ancestors,
    words,
)

FEWER_THAN_20 = {"continent", "weekday", "month", "moment", "question_word"}
"""Concepts with fewer words: mostly because the world has no more."""


def test_there_is_a_hierarchy_of_at_least_60_concepts():
    assert len(CONCEPTS) >= 60
    assert all(c.parent is None or c.parent in CONCEPTS for c in CONCEPTS.values())
    assert with_ancestors("mammal") == ("mammal", "animal", "living_thing")
    assert max(len(with_ancestors(name)) for name in CONCEPTS) == 3


def test_each_concept_with_words_has_at_least_20():
    for concept in CONCEPTS.values():
        own = concept.forms + concept.people + concept.verbs
        if own and concept.name not in FEWER_THAN_20:
            assert len(own) >= 20, concept.name


def test_no_word_belongs_to_two_concepts():
    entries = tomllib.loads(resources.files("gemscope.microworld").joinpath("lexicon.toml").read_text("utf-8"))
    written = Counter(
        shown
        for entry in entries.values()
        for form in " ".join(entry.get(key, "") for key in ("forms", "people", "verbs")).split()
        for shown in ([form, plural(form)] if entry.get("nouns") else [form])
    )
    places = Counter(x for c in COUNTRIES for x in (c.name, c.capital, *c.cities))
    assert not [word for word, n in (written + places).items() if n > 1]


def test_words_are_found_with_their_concept_and_place():
    text = "Dogs saw an apple tree in Mexico City. She's there with Mara's violin."
    found = {text[start:end]: concept for start, end, concept in find_words(text)}
    assert found["Dogs"] == "mammal"
    assert found["apple"] == "fruit"
    assert found["Mexico City"] == "capital"
    assert found["Mara"] == "female_name"
    assert found["violin"] == "instrument"
    assert found["She's"] == "pronoun"
    assert "tree" not in found


def test_capitals_matter_for_names_only():
    assert CONCEPT_OF["May"] == "month"
    assert [c for *_, c in find_words("It may march.")] == ["pronoun"]


def test_articles_and_plurals():
    assert [article(w) for w in ("apple", "dog", "ukulele", "eucalyptus", "umbrella")] == [
        "an apple",
        "a dog",
        "a ukulele",
        "a eucalyptus",
        "an umbrella",
    ]
    assert [plural(w) for w in ("dog", "daisy", "axe", "bus", "monkey", "finch")] == [
        "dogs", "daisies", "axes", "buses", "monkeys", "finches"
    ]  # fmt: skip


def test_a_parent_has_the_words_of_its_children():
    assert set(words("mammal")) < set(words("animal"))
    assert set(words("capital")) == {c.capital for c in COUNTRIES}
