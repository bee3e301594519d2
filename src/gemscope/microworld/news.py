"""News: a section mark, a headline, and two or three sentences that stay with the section."""

import random
import re

from gemscope.microworld.documents import Document, Writer
from gemscope.microworld.scenes import Hero, fill_scene
from gemscope.microworld.splits import Split

SECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sports": (
        (
            "{team} beat {team2} in {city}",
            "{team} win the {sport} against {team2}",
            "{sport_who} of the {team} leaves for {country}",
            "Late goal saves {team} in {city}",
            "{team} lose the {sport} in the {weather}",
        ),
        (
            "The match ended {score} on {weekday}.",
            "The {sport_who} {speech} that the {team} were the better side.",
            "The {sport_who} of the {team} was {joy} after the {sport2}.",
            "Next week the {team} meet the {team2} in {city}.",
            "The {sport_who} hurt his {body_part} and left the {sport}.",
        ),
    ),
    "business": (
        (
            "{company} raises its {finance} after strong sales",
            "{company} and {company2} plan a {finance}",
            "{company} closes its factory in {city}",
            "{finance_s} fall as the {currency} loses value",
            "{company} wins a {finance} in {country}",
        ),
        (
            "The {finance} of {company} rose by {percent} percent in {month}.",
            "The {finance_who} was {joy} about the {finance}.",
            "{company} makes {vehicle_s} and {technology_s} in {city}.",
            "One {finance_who} {speech} that the {finance} was too {size}.",
            "Since {month} the {finance} has fallen by {percent} percent.",
        ),
    ),
    "science": (
        (
            "New {astronomy} found near a distant {astronomy2}",
            "Study of the {biology} surprises researchers in {city}",
            "Researchers in {country} build a {physics}",
            "{medicine} helps against the {medicine2}, study finds",
            "{size} {astronomy} seen over {country}",
        ),
        (
            "Researchers used a {physics} to look at the {biology}.",
            "The team in {city} studied the {astronomy} for {number_word} years.",
            "The {biology} of the {mammal} has a {size} {biology2}.",
            "The {medicine} was given to {number_word} patients.",
            "A {physics} and a {physics2} were part of the experiment.",
        ),
    ),
    "politics": (
        (
            "{politics_who} of {country} resigns after {politics}",
            "{country} and {country2} sign a {politics}",
            "{politics_who} in {capital} rejects the {politics}",
            "{country} holds {politics} in {month}",
            "{politics_who} promises a new {politics} for {city}",
        ),
        (
            "The {politics_who} {speech} that the {politics} was a mistake.",
            "The {politics_who} of {country} will meet the {politics_who} on {weekday}.",
            "In {capital} the {politics_who} {thought} about the {politics}.",
            "The {politics_who} got {percent} percent in the {politics2}.",
            "Many people in {city} were {anger} about the {politics}.",
        ),
    ),
    "culture": (
        (
            "{art} in {city} draws large crowds",
            "New {art} by a young {art_who} opens in {capital}",
            "{instrument} players fill the {building} in {city}",
            "{size} {art} returns to {country}",
            "{art} about {country} wins the {art2} prize",
        ),
        (
            "The {art} and the {art2} were full of {colour} light.",
            "The {art_who} played the {instrument} for {number_word} hours.",
            "The {art_who} was {joy} about the {art} in {city}.",
            "The {art} will stay in the {building} until {month}.",
            "People {speech} that the {art} was a {size} success.",
        ),
    ),
    "crime": (
        (
            "{law_who} arrested in {city} after stolen {vehicle}",
            "Trial in {capital} ends with a {law}",
            "{occupation} robbed near the {building} in {city}",
            "{law_who} finds new {law} in {building} case",
            "Stolen {instrument} found in {country}",
        ),
        (
            "The {law_who} {speech} that the {law} was false.",
            "The {law_who} found a {tool} and {a_clothing} in the {building}.",
            "The trial begins in {capital} on {weekday}.",
            "A {occupation} had seen the {law_who} near the {building}.",
            "The {law_who} was {fear} when the {law_who} came.",
        ),
    ),
}
"""Section -> (headlines, sentences)."""


def _write(writer: Writer, template: str, rng: random.Random, hero: Hero) -> None:
    values = {"score": f"{rng.randint(0, 5)}-{rng.randint(0, 5)}", "percent": str(rng.randint(2, 60))}
    slots = "|".join(values)
    text = fill_scene(re.sub(rf"\{{({slots})\}}", r"<\1>", template), rng, hero)
    for i, piece in enumerate(re.split(rf"<({slots})>", text)):
        writer.add(*((values[piece], "score") if i % 2 else (piece,)))


def write_news(writer: Writer, rng: random.Random, section: str, sentences: int) -> str:
    """Append a news text of a section; returns its headline with the section mark."""
    headlines, bodies = SECTIONS[section]
    start = len(writer.text)
    hero = Hero(rng)
    with writer.marked(f"news_{section}"):
        writer.add(f"{section.upper()}: ")
        _write(writer, rng.choice(headlines), rng, hero)
        headline = writer.text[start:]
        writer.add("\n")
        for i, body in enumerate(rng.sample(bodies, sentences)):
            writer.add(" " if i else "")
            _write(writer, body, rng, hero)
    return headline


def news(rng: random.Random, _split: Split) -> Document:
    """One news text; its facts name the section and the headline."""
    writer = Writer()
    section = rng.choice(list(SECTIONS))
    headline = write_news(writer, rng, section, rng.randint(2, 4))
    return writer.finish(f"news.{section}", {"section": section, "headline": headline})
