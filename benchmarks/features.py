"""Whether features are found and steer as they should, on microworld-it, whose concepts are known.

Wanted: for at least 80 % of the concepts, a text of the concept finds among the first 5 features one with an AUROC of
at least 0.9 for it; steering the best feature of a concept raises the concept's probability in the next tokens at least
fivefold in 80 % of the concepts tried, random latents with as large a push do not.

The suite is ./suites/microworld-it if it is there, else it is built. Texts are held out and of another seed than those
of the index and of the AUROCs. The text of a concept is the held-out documents with the largest share of its tokens, up
to 240 tokens, and the search is at its tokens. The feature to steer is the one of 12 that raises the concept's words
most on prompts of a third seed; what it does is measured on prompts of the second.
"""

import random
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from _common import Result, arguments, machine, report

from gemscope.artifacts.config import Loaded
from gemscope.evaluation.concepts import FOUND_AUROC, MIN_POSITIVES, ActiveEntries, auroc_matrix
from gemscope.features.effective import STRENGTH, most_promising, promised, tried
from gemscope.features.effects import directions
from gemscope.features.search import by_text
from gemscope.features.steering import Steer
from gemscope.microworld.concepts import words
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Batch, Tokens
from gemscope.suites.config import QuickstartConfig
from gemscope.suites.corpus import LabelledText, heldout_text
from gemscope.suites.indexing import dictionaries_of, open_index
from gemscope.suites.quickstart import quickstart
from gemscope.suites.suite import Suite

TEXT_TOKENS = 240
STRENGTHS = (2.0, 4.0, STRENGTH)
PROMPTS, TRIED, RANDOM = 16, 12, 3
Scores = Mapping[str, torch.Tensor]


def aurocs(gemma: Gemma, dictionaries: Mapping[str, Loaded], text: LabelledText) -> tuple[list[str], Scores]:
    """(concepts with enough tokens, passages left out; AUROC [latents, concepts] of each dictionary)."""
    marks = [m[item.content_mask] for item, m in zip(text.items, text.labels.marks, strict=True)]
    labels = torch.cat(marks)
    count = labels.sum(0)
    names = text.labels.names
    kept = [i for i, n in enumerate(names) if count[i] >= MIN_POSITIVES and n not in text.labels.passages]
    parts: dict[str, list[ActiveEntries]] = {name: [] for name in dictionaries}
    sites = list({site for one in dictionaries.values() for site in one.config.reads})
    for item in text.items:
        captured = gemma.capture(item, sites)
        for name, one in dictionaries.items():
            reads = [captured[site][0][item.content_mask] for site in one.config.reads]
            x = reads[0] if len(reads) == 1 else torch.stack(reads, dim=1)
            support, values = one.dictionary.encode_sparse(x)
            shape = (len(x), one.dictionary.n_latents)
            parts[name].append(ActiveEntries(shape, support.rows, support.latents, values))
    chosen = labels[:, kept]
    return [names[i] for i in kept], {name: auroc_matrix(ActiveEntries.stack(p), chosen) for name, p in parts.items()}


def text_of(gemma: Gemma, text: LabelledText, concept: str) -> tuple[Tokens, list[int]] | None:
    """Held-out documents full of a concept, as one text, and the places of its tokens."""
    column = text.labels.names.index(concept)
    marks = [m[:, column] & item.content_mask for item, m in zip(text.items, text.labels.marks, strict=True)]
    order = sorted(range(len(marks)), key=lambda i: -float(marks[i].float().mean()))
    ids, at = [gemma.vocabulary.bos_id], list[int]()
    for i in order:
        new = text.items[i].ids[1:].tolist()
        if bool(marks[i].any()) and len(ids) + len(new) <= TEXT_TOKENS:
            at += [len(ids) + p for p in marks[i][1:].nonzero()[:, 0].tolist()]
            ids += new
    return (gemma.tokens_of(ids), at) if at else None


def searching(
    gemma: Gemma, suite: Suite, dictionaries: Mapping[str, Loaded], text: LabelledText, names: list[str], scores: Scores
) -> list[Result]:
    """Share of the concepts that are found among the first five features."""
    index, found, possible = open_index(suite), 0, 0
    for column, concept in enumerate(names):
        possible += any(float(one[:, column].max()) >= FOUND_AUROC for one in scores.values())
        one = text_of(gemma, text, concept)
        if one is None:
            continue
        hits = by_text(index, gemma, dictionaries, one[0], 5, at=one[1]).hits
        ids = [index.find_id(hit.id) for hit in hits]
        found += any(float(scores[i.dictionary][i.latent, column]) >= FOUND_AUROC for i in ids)
    on = f"{len(names)} concepts, {len(dictionaries)} dictionaries, microworld-it; {machine()}"
    return [
        Result("concepts measured", len(names), "", on),
        Result("concepts for which any feature has AUROC at least 0.9", possible, "", on),
        Result("concepts found among the first 5 features", found, "", on),
        Result("share of the concepts found", found / len(names), "", on),
        Result("share of the concepts that any feature could give", found / max(possible, 1), "", on),
    ]


def first_tokens(gemma: Gemma, concept: str) -> list[int]:
    """First tokens of the concept's words in running text."""
    ids = {int(gemma.tokens(f"a {form}").ids[2]) for form in words(concept)}
    return sorted(ids)


def prompts_of(gemma: Gemma, text: LabelledText) -> Batch:
    """Beginnings of documents that are no chats."""
    chosen = [gemma.tokens_of(item.ids[:24]) for item in text.items if "<start_of_turn>" not in item.text][:PROMPTS]
    return gemma.batch(chosen)


def steering(
    gemma: Gemma,
    suite: Suite,
    dictionaries: Mapping[str, Loaded],
    texts: tuple[LabelledText, LabelledText],
    names: list[str],
) -> list[Result]:
    """Share of the concepts whose probability rises fivefold on the second text's prompts, by the latent that raised it
    most on the first's; beside random latents with an equal push, and the best of as many of those, chosen alike.
    """
    index, draw = open_index(suite), random.Random(0)
    choosing, prompts = (prompts_of(gemma, text) for text in texts)
    steered = [name for name in names if words(name)]
    groups = [first_tokens(gemma, name) for name in steered]
    told = promised(gemma, index, dictionaries, groups, choosing)
    kinds = ("latents", "random latents of equal length", f"the best of {TRIED} random latents, chosen alike")
    raised = {(kind, strength): 0.0 for kind in kinds for strength in STRENGTHS}
    for column, ids in enumerate(groups):
        best = most_promising({name: one[:, column] for name, one in told.items()}, TRIED)
        steers = [replace(Steer.of(index, feature), strength=STRENGTH) for feature in best]
        found = tried(gemma, dictionaries, steers, ids, choosing)[0].steer
        others = [_random(dictionaries, found, draw) for _ in range(TRIED)]
        lucky = tried(gemma, dictionaries, others, ids, choosing)[0].steer
        for kind, some in zip(kinds, ([found], others[:RANDOM], [lucky]), strict=True):
            for strength in STRENGTHS:
                changed = [replace(one, strength=strength) for one in some]
                effects = tried(gemma, dictionaries, changed, ids, prompts)
                raised[kind, strength] += sum(one.factor >= 5 for one in effects) / len(some)
    on = f"{len(steered)} concepts, {PROMPTS} prompts of 24 tokens, all positions, microworld-it; {machine()}"
    return [
        Result("concepts steered", len(steered), "", on),
        *(
            Result(f"share raised fivefold by {kind}, strength {strength:g}", count / len(steered), "", on)
            for (kind, strength), count in raised.items()
        ),
    ]


def _random(dictionaries: Mapping[str, Loaded], one: Steer, draw: random.Random) -> Steer:
    """A random latent of the same dictionary whose push is as long."""
    other = replace(one, latent=draw.randrange(dictionaries[one.dictionary].dictionary.n_latents))
    return replace(other, unit=one.unit * _length(dictionaries, one) / _length(dictionaries, other))


def _length(dictionaries: Mapping[str, Loaded], one: Steer) -> float:
    """Length of what a latent writes per unit of activation."""
    return float(directions(dictionaries[one.dictionary], one.latent, one.latent + 1).float().norm())


def main() -> None:
    """Run and print."""
    options = arguments(__doc__ or "")
    config = QuickstartConfig()
    if options.quick:
        config = replace(
            config, tokens=8000, heldout_tokens=3000, splice_tokens=500, d_sae=128, steps=60, batch_size=512
        )
    gemma = Gemma.load("microworld-it")
    with tempfile.TemporaryDirectory() as folder:
        there = Path("suites/microworld-it")
        ready = not options.quick and (there / "index" / "index.json").is_file()
        suite = Suite.open(there) if ready else quickstart("microworld-it", folder, config, gemma=gemma)
        dictionaries = dictionaries_of(suite.folder, suite.sites, suite.others)
        names, scores = aurocs(gemma, dictionaries, heldout_text(gemma, config.heldout_tokens, config.seed))
        text = heldout_text(gemma, config.heldout_tokens, config.seed + 77)
        report(searching(gemma, suite, dictionaries, text, names, scores), options.json)
        chosen_on = heldout_text(gemma, config.heldout_tokens, config.seed + 78)
        report(steering(gemma, suite, dictionaries, (chosen_on, text), names), options.json)


if __name__ == "__main__":
    main()
