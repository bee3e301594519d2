"""Whether features are found and steer as they should, on microworld-it, whose concepts are known.

Wanted: for at least 80 % of the concepts, a text of the concept finds among the first 5 features one with an AUROC of
at least 0.9 for it; steering the best feature of a concept raises the concept's probability in the next tokens at least
fivefold in 80 % of the concepts tried, random latents with as large a push do not.

The suite is ./suites/microworld-it if it is there, else it is built. Texts are held out and of another seed than those
of the index and of the AUROCs. The text of a concept is the held-out documents with the largest share of its tokens, up
to 240 tokens, and the search is at its tokens. The best feature to steer is the one whose direction, through the final
norm's gain, would give the concept's words the largest share of the next token, were it added at twice its largest
activation to the mean prediction.
"""

import random
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from _common import Result, arguments, machine, report

from gemscope.activations.positions import content_mask
from gemscope.artifacts.config import Loaded
from gemscope.dictionaries.logit_effects import logit_effects
from gemscope.evaluation.concepts import FOUND_AUROC, MIN_POSITIVES, ActiveEntries, auroc_matrix
from gemscope.features.effects import directions, to_stream, writes_to_stream
from gemscope.features.search import by_text
from gemscope.features.steering import Steer, interventions
from gemscope.microworld.concepts import words
from gemscope.models.gemma import Gemma
from gemscope.models.interventions import Intervention
from gemscope.models.tokens import Batch, Tokens
from gemscope.suites.config import QuickstartConfig
from gemscope.suites.corpus import LabelledText, heldout_text
from gemscope.suites.indexing import dictionaries_of, open_index
from gemscope.suites.quickstart import quickstart
from gemscope.suites.suite import Suite

TEXT_TOKENS = 240
STRENGTHS = (2.0, 4.0, 8.0)
RANDOM = 3
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


def shares(gemma: Gemma, suite: Suite, dictionaries: Mapping[str, Loaded], batch: Batch) -> Scores:
    """Next-token probabilities [latents, vocab] that each latent's direction makes of the mean prediction."""
    mask, index = content_mask(batch), open_index(suite)
    captured = gemma.capture(batch, ["final_in"], logits=True)
    assert captured.logits is not None
    mean = captured.logits[mask].float().softmax(-1).mean(0).clamp(min=1e-9).log()
    size = captured["final_in"][mask].float().square().mean(-1).sqrt().mean()
    found: dict[str, torch.Tensor] = {}
    for name, one in dictionaries.items():
        if one.dictionary.n_positions == 1 and writes_to_stream(one.config.writes[0]):
            rows = to_stream(gemma, one.config.writes[0], directions(one, 0, one.dictionary.n_latents)).float()
            peak = torch.from_numpy(index.latents(name).records["peak"].copy())
            effects = logit_effects(rows, gemma.final_gain(), gemma.unembedding().float())
            found[name] = (mean + 2 * peak[:, None] * effects / size).softmax(-1)
    return found


def chance(gemma: Gemma, batch: Batch, ids: list[int], changes: list[Intervention]) -> float:
    """Mean probability, over the prompts' content positions, that the next token begins a word of the concept."""
    logits = gemma.logits(batch, interventions=changes).float()
    return float(logits[content_mask(batch)].softmax(-1)[:, ids].sum(-1).mean())


def steering(
    gemma: Gemma, suite: Suite, dictionaries: Mapping[str, Loaded], text: LabelledText, names: list[str]
) -> list[Result]:
    """Share of the concepts whose probability rises fivefold."""
    index, draw = open_index(suite), random.Random(0)
    prompts = [gemma.tokens_of(item.ids[:24]) for item in text.items if "<start_of_turn>" not in item.text][:16]
    batch = gemma.batch(prompts)
    raised, by_chance = dict.fromkeys(STRENGTHS, 0), dict.fromkeys(STRENGTHS, 0)
    told = shares(gemma, suite, dictionaries, batch)
    tried = 0
    for concept in names:
        if not words(concept):
            continue
        tried += 1
        ids = first_tokens(gemma, concept)
        best = {key: one[:, ids].sum(1).max(0) for key, one in told.items()}
        name = max(best, key=lambda key: float(best[key].values))
        latent = int(best[name].indices)
        before = chance(gemma, batch, ids, [])
        one = Steer.of(index, f"{name}/{latent}")
        length = _length(dictionaries, one)
        for strength in STRENGTHS:
            changes = interventions(dictionaries, [replace(one, strength=strength)], None)
            raised[strength] += chance(gemma, batch, ids, changes) >= 5 * before
            for _ in range(RANDOM):
                other = replace(one, latent=draw.randrange(dictionaries[name].dictionary.n_latents), strength=strength)
                same = replace(other, unit=one.unit * length / _length(dictionaries, other))
                by_chance[strength] += (
                    chance(gemma, batch, ids, interventions(dictionaries, [same], None)) >= 5 * before
                )
    on = f"{tried} concepts, {len(prompts)} prompts of 24 tokens, all positions, microworld-it; {machine()}"
    found = [Result("concepts steered", tried, "", on)]
    for strength in STRENGTHS:
        found.append(Result(f"share raised fivefold, strength {strength:g}", raised[strength] / tried, "", on))
        share = by_chance[strength] / (RANDOM * tried)
        found.append(Result(f"the same by random latents of equal length, strength {strength:g}", share, "", on))
    return found


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
        report(steering(gemma, suite, dictionaries, text, names), options.json)


if __name__ == "__main__":
    main()
