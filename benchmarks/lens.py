"""What the lens costs and what it finds on the built-in model.

Times of one text through each reader; whether the topics of held-out headlines are true of them (a topic is true when
a word of the headline, or its section, carries that concept or one below it). The suite is the one in
suites/microworld-it (``gemscope quickstart``); without it only the times are measured.
"""

from collections.abc import Callable

from _common import Result, arguments, interleaved, machine, report

from gemscope.lens.attention import attend
from gemscope.lens.difference import attend_edit
from gemscope.lens.formation import form
from gemscope.lens.heads import find_heads
from gemscope.microworld.concepts import find_words, with_ancestors
from gemscope.microworld.documents import Document
from gemscope.microworld.news import news
from gemscope.microworld.splits import stream
from gemscope.models.gemma import Gemma
from gemscope.suites.headlines import read_headlines
from gemscope.suites.suite import Suite, default_folder

MODEL = "microworld-it"
TEXT = "The capital of the country where Lyon lies is Paris. The capital of Japan is"


def costs(gemma: Gemma, rounds: int) -> list[Result]:
    """Milliseconds of each reader on one text."""
    modes: dict[str, Callable[[], object]] = {
        "attend": lambda: attend(gemma, TEXT),
        "attend, written": lambda: attend(gemma, TEXT, kind="written"),
        "attend, effect": lambda: attend(gemma, TEXT, kind="effect"),
        "find_heads": lambda: find_heads(gemma, TEXT),
        "attend_edit without a null band": lambda: attend_edit(gemma, TEXT, "Lyon=Osaka", null_samples=0),
        "attend_edit, null band of 16": lambda: attend_edit(gemma, TEXT, "Lyon=Osaka"),
        "form": lambda: form(gemma, TEXT),
    }
    n = len(gemma.tokens(TEXT))
    on = f"{MODEL}, {n} tokens, best of {rounds}; {machine()}"
    return [Result(name, 1e3 * seconds, "ms", on) for name, seconds in interleaved(modes, rounds).items()]


def topics(gemma: Gemma, suite: Suite, n: int) -> list[Result]:
    """How many of the topics that are named are true, and how many true ones are named."""
    rng = stream("heldout", 0, "headlines")
    documents = [news(rng, "heldout") for _ in range(n)]
    read = read_headlines(gemma, suite, [document.facts["headline"] for document in documents])
    known = {one.topic for one in read.detectors}
    named = [{feature.detector.topic for feature in found} for found in read.features]
    true = [_true(document) for document in documents]
    hits = sum(len(a & b) for a, b in zip(named, true, strict=True))
    precision = hits / max(1, sum(map(len, named)))
    recall = hits / max(1, sum(len(b & known) for b in true))
    on = f"{MODEL}, {read.detectors[0].site}, {n} held-out headlines, {len(known)} concepts with a feature"
    return [
        Result("headlines: named topics that are true", precision, "share", on),
        Result("headlines: true topics that are named", recall, "share", on),
    ]


def _true(document: Document) -> set[str]:
    section = with_ancestors(f"news_{document.facts['section']}")
    words = (name for *_, word in find_words(document.facts["headline"]) for name in with_ancestors(word))
    return {*section, *words}


def main() -> None:
    """Run and print."""
    options = arguments(__doc__ or "")
    gemma = Gemma.load(MODEL)
    results = costs(gemma, 2 if options.quick else 10)
    folder = default_folder(MODEL)
    if (folder / "suite.json").is_file():
        results += topics(gemma, Suite.open(folder), 20 if options.quick else 200)
    report(results, options.json)


if __name__ == "__main__":
    main()
