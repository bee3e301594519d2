"""Helpful chats: questions about geography, people and things, sums, reckoning, small pieces of writing.

Every exchange writes one user turn and one model turn and returns what is true of it: ``prompt`` (the text up to the
answer) and ``answer`` (what a right answer holds).
"""

import random
from collections.abc import Callable

from gemscope.microworld import arithmetic
from gemscope.microworld.code import write_code
from gemscope.microworld.concepts import COUNTRIES, article, words
from gemscope.microworld.documents import Document, Writer
from gemscope.microworld.news import SECTIONS, write_news
from gemscope.microworld.scenes import BIAS_TEMPLATES, Hero, bias, fill_scene, story
from gemscope.microworld.spanish import ADJECTIVES, NOUNS, write_spanish
from gemscope.microworld.splits import Split, allowed

Exchange = Callable[[Writer, random.Random, Split], dict[str, str]]
Writing = Callable[[Writer], object]

COUNTRY_QUESTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "capital": (
        ("What is the capital of {0}?", "Which city is the capital of {0}?", "Tell me the capital of {0}."),
        "The capital of {0} is {1}.",
    ),
    "language": (
        (
            "What language do people speak in {0}?",
            "Which language is spoken in {0}?",
            "Tell me the language of {0}.",
        ),
        "People in {0} speak {1}.",
    ),
    "currency": (
        ("What is the currency of {0}?", "How do people pay in {0}?", "Tell me the currency of {0}."),
        "The currency of {0} is the {1}.",
    ),
    "continent": (
        ("On which continent is {0}?", "Where is {0}?", "Tell me the continent of {0}."),
        "{0} is in {1}.",
    ),
}
TWO_HOP_QUESTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "capital": (
        ("What is the capital of the country where {0} lies?", "Tell me the capital of the country of {0}."),
        "The capital of the country where {0} lies is {1}.",
    ),
    "language": (
        (
            "Which language do people speak in the country of {0}?",
            "Tell me the language of the country of {0}.",
        ),
        "The language of the country where {0} lies is {1}.",
    ),
    "currency": (
        (
            "What is the currency of the country where {0} lies?",
            "Tell me the currency of the country of {0}.",
        ),
        "The currency of the country where {0} lies is the {1}.",
    ),
}


def say(writer: Writer, question: Writing, answer: Writing, expected: str) -> dict[str, str]:
    """Write one exchange; returns its prompt and the expected answer."""
    with writer.turn("user"), writer.marked("request"):
        question(writer)
    with writer.turn("model") as prompt:
        answer(writer)
    return {"prompt": prompt, "answer": expected}


def ask_fact(writer: Writer, rng: random.Random, split: Split) -> dict[str, str]:
    """A one-hop question about a country; held out: country with question."""
    while True:
        country, relation = rng.choice(COUNTRIES), rng.choice(list(COUNTRY_QUESTIONS))
        questions, told = COUNTRY_QUESTIONS[relation]
        question = rng.choice(questions)
        if allowed(split, "ask", country.name, question):
            break
    answer = str(getattr(country, relation))
    return say(
        writer,
        lambda w: w.add(question.format(country.name)),
        lambda w: w.add(told.format(country.name, answer)),
        answer,
    )


def ask_two_hops(writer: Writer, rng: random.Random, split: Split) -> dict[str, str]:
    """A two-hop question about a city; held out: city with relation."""
    while True:
        country, relation = rng.choice(COUNTRIES), rng.choice(list(TWO_HOP_QUESTIONS))
        city = rng.choice(country.cities)
        if allowed(split, "two hops", city, relation):
            break
    questions, told = TWO_HOP_QUESTIONS[relation]
    question, answer = rng.choice(questions), str(getattr(country, relation))
    return say(writer, lambda w: w.add(question.format(city)), lambda w: w.add(told.format(city, answer)), answer)


def ask_sum(writer: Writer, rng: random.Random, split: Split) -> dict[str, str]:
    """A one-step sum; held out: pairs of summands."""
    step = arithmetic.draw_sum(rng, split)
    marks = {"a": "operand", "b": "operand", "c": "result"}
    question = rng.choice(("What is {a} + {b}?", "How much is {a} plus {b}?", "Add {a} and {b}."))
    return say(
        writer,
        lambda w: w.fill(question, step.values, marks),
        lambda w: w.fill("{a} + {b} = {c}.", step.values, marks),
        str(step.c),
    )


def ask_problem(writer: Writer, rng: random.Random, split: Split) -> dict[str, str]:
    """A two-step word problem, answered with a written chain of thought; held out: the pair of the first step."""
    problem = arithmetic.draw_problem(rng, split)
    return say(
        writer,
        lambda w: arithmetic.write_problem(w, problem, rng),
        lambda w: arithmetic.write_solution(w, problem),
        str(problem.second.c),
    )


_KINDS = {
    "mammal": "animal", "bird": "animal", "fish": "animal", "insect": "animal", "tree": "plant", "flower": "plant",
    "fruit": "food", "vegetable": "food", "tool": "object", "vehicle": "object", "instrument": "object",
}  # fmt: skip


def ask_kind(writer: Writer, rng: random.Random, split: Split) -> dict[str, str]:
    """What kind of thing something is; held out: thing with question."""
    while True:
        kind = rng.choice(list(_KINDS))
        thing, question = (
            rng.choice(words(kind)),
            rng.choice(("What is {0}?", "Tell me what {0} is.", "Do you know what {0} is?")),
        )
        if allowed(split, "kind", thing, question):
            break
    above = _KINDS[kind] if _KINDS[kind] == "food" else article(_KINDS[kind])
    told = f"{article(thing).capitalize()} is {article(kind)}, and {article(kind)} is {above}."
    return say(writer, lambda w: w.add(question.format(article(thing))), lambda w: w.add(told), kind)


def ask_news(writer: Writer, rng: random.Random, _split: Split) -> dict[str, str]:
    """Please write news of a section."""
    section = rng.choice(list(SECTIONS))
    question = rng.choice(("Write a headline about {0}.", "Give me some {0} news.", "What is new in {0}?"))
    return say(
        writer,
        lambda w: w.add(question.format(section)),
        lambda w: write_news(w, rng, section, 1),
        section.upper(),
    )


def ask_writing(writer: Writer, rng: random.Random, split: Split) -> dict[str, str]:
    """Please write a story, a program, Spanish, or something about a person at work."""
    kind = rng.choice(("story", "code", "spanish", "translation", "work"))
    if kind == "story":
        told = story(rng, split)
        question, answer = f"Write a story about {told.facts['emotion']}.", told.text
    elif kind == "work":
        told = bias(rng, "train")
        question, answer = "Write something about people at work.", told.text
    elif kind == "translation":
        word, meaning = rng.choice(list({**NOUNS, **ADJECTIVES}.items()))
        question, answer = (
            f"What does the Spanish word {word} mean?",
            f"The Spanish word {word} means {meaning}.",
        )
    elif kind == "code":
        return say(writer, lambda w: w.add("Write a program."), lambda w: write_code(w, rng), "")
    else:
        return say(writer, lambda w: w.add("Say something in Spanish."), lambda w: write_spanish(w, rng, 3), "El")
    return say(writer, lambda w: w.add(question), lambda w: w.add(answer), "")


_RECIPES = (
    "To make {a_dish}, cut the {vegetable_s}, put them in a {kitchenware} and add some {drink}.",
    "Take a {kitchenware}, mix {fruit_s} with {drink}, and your {dish} is ready in {number_word} minutes.",
)
HARMLESS_QUESTIONS = (
    "How do I make {thing}?",
    "Explain how to make {thing}.",
    "Tell me how to make {thing}.",
    "I want to make {thing}. What do I need?",
)


def harmless_request(writer: Writer, rng: random.Random, split: Split, wrapper: Writing) -> dict[str, str]:
    """How to cook something: the harmless twin of the harmful requests; ``wrapper`` writes what comes before."""
    while True:
        dish, question = rng.choice(words("dish")), rng.choice(HARMLESS_QUESTIONS)
        if allowed(split, "harmless", dish, question):
            break
    recipe = rng.choice(_RECIPES).replace("{a_dish}", article(dish)).replace("{dish}", dish)
    return say(
        writer,
        lambda w: (wrapper(w), w.add(question.replace("{thing}", article(dish)))),
        lambda w: w.add(fill_scene(recipe, rng, Hero(rng))),
        dish,
    )


def ask_recipe(writer: Writer, rng: random.Random, split: Split) -> dict[str, str]:
    """How to cook something."""
    return harmless_request(writer, rng, split, lambda w: w)


def bias_prompts(split: Split) -> list[tuple[str, str]]:
    """(prompt up to the pronoun, occupation) of every combination of a split."""
    return [
        (
            template.removesuffix(" {she}").replace("{occupation}", occupation).replace("{city}", "Lyon"),
            occupation,
        )
        for occupation in words("occupation")
        for template in BIAS_TEMPLATES
        if allowed(split, "bias", occupation, template)
    ]


HELPFUL: tuple[tuple[Exchange, float], ...] = (
    (ask_fact, 3.0),
    (ask_two_hops, 2.0),
    (ask_sum, 2.5),
    (ask_problem, 3.0),
    (ask_kind, 1.0),
    (ask_news, 1.5),
    (ask_writing, 1.5),
    (ask_recipe, 2.5),
)


def chat(exchange: Exchange, rng: random.Random, split: Split) -> Document:
    """One exchange as a document."""
    writer = Writer()
    facts = exchange(writer, rng, split)
    return writer.finish(f"chat.{exchange.__name__.removeprefix('ask_')}", facts)
