"""Whether features are found and steer as they should, on microworld-it, whose concepts are known.

Wanted: for at least 80 % of the concepts, a text of the concept finds among the first 5 features one with an AUROC of
at least 0.9 for it; steering the best feature of a concept raises the concept's probability in the next tokens at least
fivefold in 80 % of the concepts tried, random latents with as large a push do not.

The suite is ./suites/microworld-it if it is there, else it is built. Texts are held out and of another seed than those
of the index and of the AUROCs. The text of a concept is the held-out documents with the largest share of its tokens, up
to 240 tokens, and the search is at its tokens.

A concept's tokens are those of which nine in ten are marked with it, in a third text. Its prompts are beginnings of
documents that have not mentioned it, after which it is possible but not likely: its tokens have a probability within
one of ``BASELINES``. Feature and strength are chosen on prompts of one seed and measured on prompts of another; all
content is steered, and the probability after the prompt counts. Random latents are of the same dictionary, were active
at some time, and get the same strength and as long a push; in the stricter control the best of as many random ones as
were tried is chosen on the same prompts. Intervals: 95 %, concepts drawn anew.
"""

import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _common import Result, arguments, machine, report

from gemscope.activations.positions import bucketed
from gemscope.artifacts.config import Loaded
from gemscope.evaluation.concepts import FOUND_AUROC, MIN_POSITIVES, ActiveEntries, auroc_matrix
from gemscope.features.effective import best_to_steer, shortlist, tried
from gemscope.features.effects import directions
from gemscope.features.index import FeatureIndex
from gemscope.features.search import by_text
from gemscope.features.steering import Steer
from gemscope.microworld.concepts import words
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Tokens
from gemscope.suites.config import QuickstartConfig
from gemscope.suites.corpus import LabelledText, heldout_text
from gemscope.suites.indexing import dictionaries_of, open_index
from gemscope.suites.quickstart import quickstart
from gemscope.suites.suite import Suite

TEXT_TOKENS = 240
BASELINES = ((0.002, 0.02), (0.005, 0.05))
"""Least and largest probability of a concept after a prompt; fivefold is then 1 % at least, or 2.5 %."""
PROMPTS, LEAST, SHORTEST, LONGEST = 16, 8, 4, 24
"""Prompts of a concept, how few are enough, and their tokens."""
POOL = 100_000
"""Content tokens that prompts are looked for in."""
RANDOM = 10
"""Random latents of a concept."""
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


def tokens_of_concepts(text: LabelledText, names: Sequence[str], vocabulary: int) -> list[list[int]]:
    """Tokens that occur three times at least, nine in ten of them marked with the concept."""
    ids, marks = torch.cat([item.ids for item in text.items]), torch.cat(list(text.labels.marks))
    count = torch.bincount(ids, minlength=vocabulary)
    found: list[list[int]] = []
    for name in names:
        marked = torch.bincount(ids[marks[:, text.labels.names.index(name)]], minlength=vocabulary)
        found.append(((marked >= 0.9 * count) & (count >= 3)).nonzero()[:, 0].tolist())
    return found


def prompts_of(
    gemma: Gemma,
    text: LabelledText,
    names: Sequence[str],
    groups: Sequence[Sequence[int]],
    baseline: tuple[float, float],
) -> list[list[Tokens]]:
    """Of each concept, beginnings of documents that are no chats; one of a document, cut at random where it may be."""
    pairs = [pair for pair in zip(text.items, text.labels.marks, strict=True) if "<start_of_turn>" not in pair[0].text]
    items = [gemma.tokens_of(item.ids[:LONGEST]) for item, _ in pairs]
    columns = [text.labels.names.index(name) for name in names]
    found: list[list[Tokens]] = [[] for _ in names]
    draw = random.Random(0)
    for chosen, batch in bucketed(gemma, items, 2048):
        shares = gemma.logits(batch).float().softmax(-1)
        chances = torch.stack([shares[..., list(group)].sum(-1) for group in groups], dim=-1)
        for row, document in enumerate(chosen):
            size = len(items[document])
            at = chances[row, :size]
            fits = (at >= baseline[0]) & (at <= baseline[1]) & items[document].content_mask[:, None]
            fits &= pairs[document][1][:size, columns].cumsum(0) == 0
            fits[: SHORTEST - 1] = False
            for concept in range(len(names)):
                ends = fits[:, concept].nonzero()[:, 0].tolist()
                if ends:
                    found[concept].append(gemma.tokens_of(items[document].ids[: draw.choice(ends) + 1]))
    return [draw.sample(one, min(PROMPTS, len(one))) for one in found]


@dataclass
class Effects:
    """Of each concept that was steered: how many times as likely it became, by our latent and by random ones."""

    ours: list[float] = field(default_factory=list)
    others: list[list[float]] = field(default_factory=list)
    lucky: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)

    def results(self, on: str) -> list[Result]:
        """Shares that were raised fivefold."""
        shares = {
            "latents": [float(one >= 5) for one in self.ours],
            "random latents of equal length": [sum(one >= 5 for one in some) / len(some) for some in self.others],
            "the best of as many random latents, chosen alike": [float(one >= 5) for one in self.lucky],
        }
        found = [
            Result("concepts steered", len(self.ours), "", on),
            Result("mean probability of a concept before", float(np.mean(self.before)), "", on),
            Result("median factor by latents", float(np.median(self.ours)), "", on),
            Result(
                "median factor by random latents", float(np.median([one for s in self.others for one in s])), "", on
            ),
        ]
        for kind, values in shares.items():
            drawn = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
            low, high = np.quantile(drawn, (0.025, 0.975))
            found += [
                Result(f"share raised fivefold by {kind}", float(np.mean(values)), "", on),
                Result(f"share raised fivefold by {kind}, low", float(low), "", on),
                Result(f"share raised fivefold by {kind}, high", float(high), "", on),
            ]
        return found


def steering(
    gemma: Gemma,
    suite: Suite,
    dictionaries: Mapping[str, Loaded],
    texts: tuple[LabelledText, LabelledText, LabelledText],
    names: list[str],
    baseline: tuple[float, float],
    told: Callable[[str], object] = lambda _: None,
) -> list[Result]:
    """Share of the concepts whose probability rises fivefold on the second text's prompts, by the latent and strength
    that raised it most on the first's; beside random latents with an equal push, and the best of as many, chosen alike.
    The third text says which tokens are a concept's.
    """
    index, draw, effects = open_index(suite), random.Random(0), Effects()
    asked = [name for name in names if words(name)]
    groups = tokens_of_concepts(texts[2], asked, len(gemma.unembedding()))
    pools = [prompts_of(gemma, text, asked, groups, baseline) for text in texts[:2]]
    for name, ids, choosing, measuring in zip(asked, groups, *pools, strict=True):
        if not ids or min(len(choosing), len(measuring)) < LEAST:
            told(f"{name}: too few prompts")
            continue
        best = best_to_steer(gemma, index, dictionaries, ids, choosing)[0].steer
        count = len(shortlist(gemma, index, dictionaries, ids, gemma.batch(choosing)))
        others = [_random(index, dictionaries, best, draw) for _ in range(count)]
        lucky = tried(gemma, dictionaries, others, ids, gemma.batch(choosing))[0].steer
        ours, luck, *rest = (
            tried(gemma, dictionaries, [one], ids, gemma.batch(measuring))[0] for one in (best, lucky, *others[:RANDOM])
        )
        effects.ours.append(ours.factor)
        effects.lucky.append(luck.factor)
        effects.others.append([one.factor for one in rest])
        effects.before.append(ours.before)
        by_chance = sum(one.factor >= 5 for one in rest)
        told(
            f"{name}: {best.dictionary}/{best.latent}={best.strength:g}, {ours.before:.4f} x {ours.factor:.1f};"
            f" random fivefold {by_chance} of {RANDOM}"
        )
    on = f"{PROMPTS} prompts a concept, baseline {baseline[0]:g} to {baseline[1]:g}, microworld-it; {machine()}"
    return [Result("concepts asked", len(asked), "", on), *effects.results(on)]


def _random(index: FeatureIndex, dictionaries: Mapping[str, Loaded], one: Steer, draw: random.Random) -> Steer:
    """Another latent of the same dictionary that was active at some time, with a push that is as long."""
    active = index.latents(one.dictionary).records["peak"].nonzero()[0].tolist()
    other = replace(one, latent=draw.choice([latent for latent in active if latent != one.latent]))
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
        size = config.heldout_tokens if options.quick else POOL
        texts = [heldout_text(gemma, size, config.seed + shift) for shift in (78, 77, 79)]
        told = partial(print, file=sys.stderr, flush=True)
        for baseline in BASELINES:
            three = (texts[0], texts[1], texts[2])
            report(steering(gemma, suite, dictionaries, three, names, baseline, told), options.json)


if __name__ == "__main__":
    main()
