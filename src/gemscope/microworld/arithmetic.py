"""Sums in one step, and reckoning in two steps with a written chain of thought. Held out: pairs of numbers."""

import random
from dataclasses import dataclass

from gemscope.microworld.concepts import plural, words
from gemscope.microworld.documents import Document, Writer
from gemscope.microworld.splits import Split, allowed

LARGEST = 60
"""Summands go from 0 to this."""
SUM_TEMPLATES = (
    "{a} + {b} = {c}",
    "The sum of {a} and {b} is {c}",
    "{a} plus {b} is {c}",
    "If you add {b} to {a}, you get {c}",
)
_MARKS = {"a": "operand", "b": "operand", "c": "result"}


@dataclass(frozen=True)
class Step:
    """One step of reckoning: ``a`` plus or minus ``b`` is ``c``."""

    a: int
    b: int
    sign: str = "+"

    @property
    def c(self) -> int:
        """The result."""
        return self.a + self.b if self.sign == "+" else self.a - self.b

    @property
    def key(self) -> tuple[object, ...]:
        """The combination that is held out or not."""
        return ("step", self.a, self.sign, self.b)

    @property
    def values(self) -> dict[str, str]:
        """The numbers as text."""
        return {"a": str(self.a), "b": str(self.b), "c": str(self.c), "sign": self.sign}


@dataclass(frozen=True)
class Problem:
    """Two steps, the second from the result of the first."""

    first: Step
    second: Step


def draw_sum(rng: random.Random, split: Split) -> Step:
    """A pair of summands of the split."""
    while True:
        step = Step(rng.randint(0, LARGEST), rng.randint(0, LARGEST))
        if allowed(split, *step.key):
            return step


def _small(rng: random.Random, split: Split, a: int | None = None) -> Step:
    """Add to ``a`` or take away from it a number up to 20, staying between 0 and 99; None draws ``a`` too."""
    while True:
        step = Step(rng.randint(1, 60) if a is None else a, rng.randint(1, 20), rng.choice("+-"))
        if 0 <= step.c <= 99 and allowed(split, *step.key):
            return step


def draw_problem(rng: random.Random, split: Split) -> Problem:
    """A two-step problem; in the held-out split the pair of the first step was never seen in training."""
    first = _small(rng, split)
    return Problem(first, _small(rng, "train" if split == "heldout" else split, first.c))


def write_sum(writer: Writer, step: Step, template: str) -> None:
    """Append a one-step sum in words or signs."""
    writer.fill(template, step.values, _MARKS)


def sums(rng: random.Random, split: Split) -> Document:
    """Five to twelve sums."""
    writer = Writer()
    template = rng.choice(SUM_TEMPLATES)
    for i in range(rng.randint(5, 12)):
        writer.add(" " if i else "")
        write_sum(writer, draw_sum(rng, split), template if rng.random() < 0.8 else rng.choice(SUM_TEMPLATES))
        writer.add(".")
    return writer.finish("sum")


STORY_STARTS = (
    "{name} has {n} {things}.",
    "There are {n} {things} in the {place}.",
    "{name} finds {n} {things}.",
)
_GAINS = ("Then {she} buys {n} more.", "Somebody brings {n} more.", "{Name} gets {n} more.")
_LOSSES = ("Then {she} gives away {n}.", "Somebody takes {n} of them.", "{Name} loses {n}.")
QUESTION = "How many are there now?"


def write_problem(writer: Writer, problem: Problem, rng: random.Random) -> None:
    """Append a two-step word problem that ends with the question."""
    female = rng.random() < 0.5
    name = rng.choice(words("female_name" if female else "male_name"))
    shared = {
        "name": name,
        "Name": name,
        "she": "she" if female else "he",
        "things": plural(rng.choice(words(rng.choice(("fruit", "tool", "mammal", "flower", "clothing"))))),
        "place": rng.choice(words("building")),
    }
    marks = {"n": "operand"}
    writer.fill(rng.choice(STORY_STARTS), {**shared, "n": str(problem.first.a)}, marks)
    for step in (problem.first, problem.second):
        lines = _GAINS if step.sign == "+" else _LOSSES
        writer.add(" ").fill(rng.choice(lines), {**shared, "n": str(step.b)}, marks)
    writer.add(f" {QUESTION}")


def write_solution(writer: Writer, problem: Problem, answer: int | None = None) -> None:
    """Append the written chain of thought and the answer; another ``answer`` bends the last step towards it."""
    shown = str(problem.second.c if answer is None else answer)
    with writer.marked("reasoning"):
        writer.fill("Step 1: {a} {sign} {b} = {c}.", problem.first.values, _MARKS)
        writer.fill(" Step 2: {a} {sign} {b} = {c}.", {**problem.second.values, "c": shown}, _MARKS)
    writer.fill(" The answer is {c}.", {"c": shown}, {"c": "result"})


def two_steps(rng: random.Random, split: Split) -> Document:
    """One or two word problems with their written solutions."""
    writer = Writer()
    for i in range(rng.randint(1, 2)):
        problem = draw_problem(rng, split)
        writer.add("\n" if i else "")
        write_problem(writer, problem, rng)
        writer.add(" ")
        write_solution(writer, problem)
    return writer.finish("reasoning")
