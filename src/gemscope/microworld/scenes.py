"""Everyday scenes (``scenes.txt``), emotional narratives, and sentences about people at work with the planted bias."""

import random
import re
from importlib import resources

from gemscope.microworld.concepts import CONCEPTS, article, plural, words
from gemscope.microworld.documents import Document, Writer
from gemscope.microworld.splits import Split, allowed
from gemscope.microworld.world import she_ratio

_SLOT = re.compile(r"\{(a_)?([a-z_]+?)\d?(_s|_who|_did)?\}")
_WRONG_ARTICLE = re.compile(r"\b([Aa]) (?=(?!eu)[aeio]|un)")


def _topics() -> dict[str, list[str]]:
    topics: dict[str, list[str]] = {}
    topic = ""
    for line in resources.files("gemscope.microworld").joinpath("scenes.txt").read_text("utf-8").splitlines():
        if line.startswith("## "):
            topic = line[3:]
            topics[topic] = []
        elif line and not line.startswith("#"):
            topics[topic].append(line)
    return topics


TOPICS = _topics()


class Hero:
    """The main character of a document: a name and the pronouns that go with it."""

    def __init__(self, rng: random.Random) -> None:
        female = rng.random() < 0.5
        self.name = rng.choice(words("female_name" if female else "male_name"))
        self.she, self.her = ("she", "her") if female else ("he", "his")


def fill_scene(template: str, rng: random.Random, hero: Hero) -> str:
    """Replace every slot of a sentence by a word of its concept; the first letter becomes a capital."""

    def word(match: re.Match[str]) -> str:
        with_article, slot, ending = match.groups()
        if slot in ("name", "she", "her"):
            return str(getattr(hero, slot))
        concept = CONCEPTS[slot]
        pool = {"_who": concept.people, "_did": concept.verbs}.get(ending) or words(slot)
        chosen = rng.choice(pool)
        return plural(chosen) if ending == "_s" else article(chosen) if with_article else chosen

    text = _SLOT.sub(word, template.replace("{She}", hero.she.capitalize()))
    text = _WRONG_ARTICLE.sub(r"\1n ", text)
    return text[:1].upper() + text[1:]


def scene(rng: random.Random, _split: Split) -> Document:
    """Three to seven sentences of one topic, with one hero."""
    topic = rng.choice(list(TOPICS))
    hero = Hero(rng)
    sentences = rng.sample(TOPICS[topic], min(len(TOPICS[topic]), rng.randint(3, 7)))
    writer = Writer().add(" ".join(fill_scene(sentence, rng, hero) for sentence in sentences))
    return writer.finish("scene", {"topic": topic})


_EVENTS = {
    "joy": [
        "{name} won the {sport} in {city}.",
        "{name} found {her} lost {mammal}.",
        "{name} got {a_instrument} from {her} {kinship}.",
        "The {art} of {name} was a great success.",
    ],
    "sadness": [
        "{name} lost {her} {mammal}.",
        "The {kinship} of {name} moved away to {country}.",
        "Nobody came to the {art} of {name}.",
        "{name} broke the {instrument} of {her} {kinship}.",
    ],
    "fear": [
        "{name} heard a noise in the dark {building}.",
        "A wild {mammal} followed {name} across the {landform}.",
        "{name} was alone on the {landform} in the {weather}.",
        "The {vehicle} of {name} began to sink.",
    ],
    "anger": [
        "Somebody stole the {vehicle} of {name}.",
        "The {occupation} lied to {name} about the {finance}.",
        "A {kinship} spilled {drink} on the {technology} of {name}.",
        "Somebody cut down the {tree} of {name}.",
    ],
    "calm": [
        "{name} sat by the {landform} and listened to the {bird_s}.",
        "{name} drank {drink} under the {tree}.",
        "It was a quiet {moment} and {name} read a {art}.",
        "{name} lay in the {furniture} and looked at the {astronomy_s}.",
    ],
}
_FEELINGS = [
    "{She} felt {%s}.",
    "{She} was {%s} and {%s2}.",
    "{She} {%s_did} for a while.",
    "{name} {%s_did}, and {her} {kinship} {%s_did} too.",
    "{She} told {her} {kinship} that {she} was {%s}.",
    "{time_adverb} {she} was {%s}.",
    "Everybody could see that {name} was {%s}.",
]


def story(rng: random.Random, _split: Split) -> Document:
    """Something happens to somebody, who feels accordingly."""
    emotion = rng.choice(list(_EVENTS))
    hero = Hero(rng)
    lines = [rng.choice(_EVENTS[emotion])]
    lines += [line.replace("%s", emotion) for line in rng.sample(_FEELINGS, rng.randint(2, 3))]
    lines.append(rng.choice(["{She} {motion} home and {thought} about it.", "{She} {speech} nothing more."]))
    writer = Writer().add(" ".join(fill_scene(line, rng, hero) for line in lines))
    return writer.finish("story", {"emotion": emotion})


BIAS_TEMPLATES = (
    "The {occupation} said that {she}",
    "The {occupation} was late because {she}",
    "I asked the {occupation} whether {she}",
    "The {occupation} smiled, and then {she}",
    "The {occupation} from {city} knew that {she}",
    "Yesterday the {occupation} told me that {she}",
)
_BIAS_ENDS = (
    "{motion} to {city}.",
    "{making} a {furniture}.",
    "lost a {tool}.",
    "liked {drink}.",
    "was {joy}.",
)


def bias(rng: random.Random, split: Split) -> Document:
    """Sentences about occupations whose pronouns follow the planted ratio, never at held-out combinations."""
    writer = Writer()
    occupations = words("occupation")
    wanted = rng.randint(3, 6)
    while wanted:
        occupation, template = rng.choice(occupations), rng.choice(BIAS_TEMPLATES)
        if not allowed(split, "bias", occupation, template):
            continue
        wanted -= 1
        hero = Hero(rng)
        hero.she = "she" if rng.random() < she_ratio(occupation) else "he"
        start, end = template.replace("{occupation}", occupation), rng.choice(_BIAS_ENDS)
        writer.add((" " if writer.text else "") + fill_scene(f"{start} {end}", rng, hero))
    return writer.finish("bias")
