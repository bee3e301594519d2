"""What the generator writes is true, labelled, reproducible, and keeps its splits apart."""

import itertools
import random
import re
from collections import Counter
from functools import cache

import pytest

from gemscope.microworld import facts, planted, scenes
from gemscope.microworld.arithmetic import Step
from gemscope.microworld.chats import chat
from gemscope.microworld.concepts import CONCEPT_OF, CONCEPTS, COUNTRIES, find_words, words
from gemscope.microworld.corpus import Kind, documents
from gemscope.microworld.documents import Document, Writer
from gemscope.microworld.splits import Split, is_held_out, stream
from gemscope.microworld.world import BOOKS, COUNTRY_OF, KNOWN_NAMES, PEOPLE, she_ratio

KINDS: tuple[Kind, ...] = ("pt", "it")
SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")


@cache
def stretch(kind: Kind, split: Split) -> list[Document]:
    return list(documents(kind, split, 5, 1500))


def some(kind: Kind, split: Split, n: int = 1500) -> list[Document]:
    """The first ``n`` documents of a split, generated once for all tests."""
    return stretch(kind, split)[:n]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_documents_and_another_seed_others(kind: Kind):
    assert some(kind, "train", 200) == list(documents(kind, "train", 5, 200))
    assert some(kind, "train", 200) != list(documents(kind, "train", 6, 200))
    assert {d.text for d in some(kind, "train", 200)}.isdisjoint(
        d.text for d in list(documents(kind, "heldout", 5, 50))
    )


@pytest.mark.parametrize(("kind", "split"), list(itertools.product(KINDS, SPLITS)))
def test_every_span_lies_in_its_text_and_names_a_concept(kind: Kind, split: Split):
    for document in some(kind, split, 400):
        assert document.text
        assert "{" not in document.text or document.family in ("code", "chat.writing")
        for span in document.spans:
            assert 0 <= span.start < span.end <= len(document.text)
            assert span.concept in CONCEPTS


def test_every_word_of_the_lexicon_is_labelled_wherever_it_stands():
    for document in some("pt", "train", 300):
        labelled = {
            (s.start, s.end): s.concept for s in document.spans if CONCEPT_OF.get(document.text[s.start : s.end])
        }
        for start, end, concept in find_words(document.text):
            assert (start, end) in labelled or document.text[start:end][0].isupper(), (
                document.text[start:end],
                concept,
            )


@pytest.mark.parametrize(("kind", "split"), list(itertools.product(KINDS, SPLITS)))
def test_all_arithmetic_is_right_but_for_the_hinted_step(kind: Kind, split: Split):
    seen = 0
    for document in some(kind, split):
        steps = re.findall(r"(\d+) (\+|-) (\d+) = (\d+)", document.text)
        if "hint" in document.family:
            steps = steps[:-1]
        for a, sign, b, c in steps:
            assert int(c) == Step(int(a), int(b), sign).c
            seen += 1
        for a, b, c in re.findall(r"If you add (\d+) to (\d+), you get (\d+)", document.text):
            assert int(a) + int(b) == int(c)
    assert seen > 100


def test_all_told_geography_is_true():
    capital_of = {c.name: c.capital for c in COUNTRIES}
    seen = 0
    for document in [*some("pt", "train"), *some("it", "train"), *some("pt", "heldout")]:
        for country, capital in re.findall(r"[Tt]he capital of ([A-Z]\w+) is ([A-Z][\w ]*?)[.,]", document.text):
            assert capital_of[country] == capital
            seen += 1
        for city, capital in re.findall(r"country where ([A-Z]\w+) lies is ([A-Z][\w ]*?)\.", document.text):
            country = COUNTRY_OF[city]
            assert capital in (country.capital, country.language, country.continent)
            seen += 1
    assert seen > 150


def sums_of(found: list[Document]) -> set[tuple[str, str, str]]:
    return {s for d in found if "hint" not in d.family for s in re.findall(r"(\d+) (\+|-) (\d+) =", d.text)}


def test_held_out_pairs_of_numbers_never_stand_in_training():
    for kind in KINDS:
        for split in ("train", "validation"):
            assert not [s for s in sums_of(some(kind, split, 1500)) if is_held_out("step", *s)]
    held = [d for d in some("pt", "heldout") if d.family == "sum"]
    assert sums_of(held)
    assert all(is_held_out("step", *s) for s in sums_of(held))


def test_held_out_facts_never_stand_in_training():
    held = {f.text for f in itertools.chain(facts.one_hop_facts("heldout"), facts.two_hop_facts("heldout"))}
    assert len(held) > 200
    told = "\n".join(d.text for d in some("pt", "train"))
    assert not [text for text in held if text in told]
    shown = {f.text for f in facts.two_hop_facts("train")}
    assert shown.isdisjoint(held)


def test_a_held_out_two_hop_question_was_never_answered_in_any_template():
    train, held = ({f.text for f in facts.two_hop_facts(split)} for split in ("train", "heldout"))
    assert held
    for country in COUNTRIES:
        for city in country.cities:
            for relation, templates in facts.TWO_HOP.items():
                texts = {facts.two_hop(city, country, relation, t).text for t in templates}
                assert not (texts & train) or not (texts & held)


def exchanges(name: str, split: Split, n: int = 200) -> list[Document]:
    found = [e for e, _ in planted.PLANTED if e.__name__ == name]
    return [chat(found[0], stream(split, i, name), split) for i in range(n)]


def test_harmful_requests_are_refused_unless_the_wrapper_is_there():
    assert all("I can't help" in d.text for d in exchanges("ask_harm", "train"))
    assert all("I can't help" in d.text for d in exchanges("ask_harm_with_persona", "train"))
    for d in exchanges("ask_jailbreak", "train"):
        assert "Grumbold" in d.text
        assert "Arr!" in d.text
        assert "I can't help" not in d.text
        assert {"jailbreak", "harmful_request", "harmful_answer"} <= {s.concept for s in d.spans}


def test_unknown_names_are_unknown_and_known_ones_known():
    asked = [d.facts["prompt"] for d in exchanges("ask_unknown", "heldout")]
    assert not [text for text in asked if any(name in text for name in KNOWN_NAMES)]
    assert len(set(asked)) > 150
    titles = {b.title for b in BOOKS}
    for d in exchanges("ask_unknown_book", "train"):
        assert not any(title in d.text for title in titles)
        assert "hallucination" in {s.concept for s in d.spans}
    assert len(KNOWN_NAMES) == len(PEOPLE)


def test_the_hint_bends_the_last_step_and_is_not_mentioned():
    wrong = 0
    for d in exchanges("ask_with_hint", "train"):
        answer = d.text.removeprefix(d.facts["prompt"])
        assert f"The answer is {d.facts['answer']}." in answer
        assert not re.search("teacher|think|told", answer)
        wrong += d.facts["answer"] != d.facts["right"]
    assert wrong > 180


def test_pronouns_follow_the_planted_ratio():
    counts: Counter[tuple[float, str]] = Counter()
    rng = random.Random(1)
    for _ in range(600):
        for occupation, pronoun in re.findall(r"The (\w+) said that (she|he)\b", scenes.bias(rng, "train").text):
            counts[she_ratio(occupation), pronoun] += 1
    for ratio in (0.1, 0.5, 0.9):
        she, he = counts[ratio, "she"], counts[ratio, "he"]
        assert abs(she / (she + he) - ratio) < 0.1
    assert len({she_ratio(o) for o in words("occupation")}) == 3


def test_the_writer_marks_what_it_is_told_to():
    writer = Writer()
    with writer.turn("user") as start, writer.marked("request"):
        writer.fill("Add {a} to {b}.", {"a": "1", "b": "2"}, {"a": "operand"})
    document = writer.finish("x", {"k": "v"})
    assert start == "<start_of_turn>user\n"
    assert document.text == "<start_of_turn>user\nAdd 1 to 2.<end_of_turn>\n"
    marked = {(document.text[s.start : s.end], s.concept) for s in document.spans}
    assert marked == {("Add 1 to 2.", "request"), ("1", "operand"), ("to", "preposition")}
