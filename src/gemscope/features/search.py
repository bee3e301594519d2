"""From something a person has in mind to features: a text, words, a token, a direction, another feature, a concept."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from gemscope.artifacts.config import Loaded
from gemscope.core.arrays import Float, Int, Tensor
from gemscope.core.errors import InputError
from gemscope.features import layout
from gemscope.features.effects import directions
from gemscope.features.histogram import BINS, bin_of
from gemscope.features.index import FeatureIndex
from gemscope.features.passing import check_widths, sites_of
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Tokens

HERE = 0.25
"""How often a chosen token is compared with another one of its text, and not with one of the index."""


@dataclass(frozen=True)
class Hit:
    """A feature that was found."""

    id: str
    score: float
    """What hits are ordered by; its meaning is that of the search."""
    density: float
    labels: tuple[str, ...]
    """Best first; the one made from its strongest tokens last."""
    values: tuple[float, ...] = ()
    """Of a search by text: the activation on each token."""
    strength: float | None = None
    """Of a search by trying: the strength that it was added with."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class TextHits:
    """What a text activates."""

    tokens: Tokens
    hits: tuple[Hit, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"text": self.tokens.text, "tokens": self.tokens.pieces, "hits": [one.as_dict() for one in self.hits]}


def by_words(index: FeatureIndex, words: str, top: int = 20, *, source: str | None = None) -> list[Hit]:
    """Features whose labels have all the words (stemmed; ``cat*`` is a beginning), one hit a feature.

    The score is the label's place, from 1 down. Raises InputError without a word.
    """
    found: dict[int, float] = {}
    labels = index.database.search(words, top, source)
    for rank, label in enumerate(labels):
        found.setdefault(label.feature, 1 - rank / len(labels))
    return hits_of(index, list(found.items()))


def by_concept(index: FeatureIndex, concept: str, top: int = 20) -> list[Hit]:
    """Features that carry the label of a known concept; the score is the label's. Raises InputError with the concepts
    there are.
    """
    labels = index.database.labelled("concept", concept.replace("_", " "))
    if not labels:
        known = index.database.texts_of("concept")
        raise InputError(
            f"no feature is labelled with the concept {concept!r}; "
            + (f"there are {', '.join(known)}." if known else "this index has no concept labels: search by words.")
        )
    return hits_of(index, [(one.feature, one.score or 0.0) for one in labels[:top]])


@torch.no_grad()
def by_text(
    index: FeatureIndex,
    gemma: Gemma,
    dictionaries: Mapping[str, Loaded],
    text: str | Tokens,
    top: int = 20,
    *,
    at: Sequence[int] | None = None,
    max_density: float = 1.0,
) -> TextHits:
    """Features of all dictionaries that a text activates, the most telling first.

    Activations are compared with those on all tokens of the index, by the latent's histogram. With tokens ``at``, the
    score is the chance that the latent is more active on one of them than on another token, ties counting half: the
    AUROC of "is one of these", 0.5 for what tells nothing. The other token is drawn from the index, and one time in
    ``1 / HERE`` from the text's other content: that tells what these tokens have in common from what the text is like.
    Without ``at``, the score is the mean over content tokens of -log of the share of all tokens with such an activation
    or more, in nats. Raises InputError for a position outside the text, the errors of ``indexed``, and those of
    ``check_widths``.
    """
    dictionaries = indexed(index, dictionaries)
    check_widths(gemma, dictionaries)
    tokens = gemma.tokens(text) if isinstance(text, str) else text
    chosen = _positions(tokens, at)
    others = tokens.content_mask.clone()
    others[chosen] = False
    captured = gemma.capture(tokens, sites_of(dictionaries))
    found: list[tuple[float, str, int, Tensor]] = []
    for name, loaded in dictionaries.items():
        reads = [captured[site][0].float() for site in loaded.config.reads]
        x = reads[0] if loaded.dictionary.n_positions == 1 else torch.stack(reads, dim=1)
        acts = loaded.dictionary.encode(x.to(next(loaded.dictionary.parameters()).device)).flatten(1).cpu()
        latents = ((acts[chosen] > 0).any(0) & (_density(index, name) <= max_density)).nonzero()[:, 0]
        mine = acts[chosen][:, latents]
        above = _share_above(index, name, latents, mine)
        if at is None:
            score = (-above.log()).masked_fill(mine <= 0, 0).mean(0)
        else:
            score = (1 - _mixed(above, _share_above_here(mine, acts[others][:, latents]))).mean(0)
        best = score.topk(min(top, len(score)))
        for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            found.append((value, name, int(latents[place]), acts[:, latents[place]]))
    found.sort(key=lambda one: (-one[0], index.firsts[one[1]] + one[2]))
    hits = (
        hit_of(index, index.firsts[name] + latent, score, acts.tolist()) for score, name, latent, acts in found[:top]
    )
    return TextHits(tokens, tuple(hits))


def indexed(index: FeatureIndex, dictionaries: Mapping[str, Loaded]) -> dict[str, Loaded]:
    """Those of the index; raises InputError when none is, or one is not the one that was indexed."""
    found = {name: loaded for name, loaded in dictionaries.items() if name in index.sizes}
    if not found:
        raise InputError(
            f"none of the dictionaries ({', '.join(dictionaries) or 'none'}) is in the index in {index.folder}, which"
            f" is of {', '.join(index.names)}; a folder's name is its dictionary's."
        )
    for name, loaded in found.items():
        if loaded.dictionary.n_latents != index.sizes[name]:
            raise InputError(
                f"{name} has {loaded.dictionary.n_latents} latents, in the index {index.sizes[name]}; give the"
                " dictionary that was indexed."
            )
    return found


def _positions(tokens: Tokens, at: Sequence[int] | None) -> Int[Tensor, " chosen"]:
    if at is None:
        return tokens.content_mask.nonzero()[:, 0]
    for one in at:
        if not -len(tokens) <= one < len(tokens):
            raise InputError(f"position {one} is outside a text of {len(tokens)} tokens; give 0 to {len(tokens) - 1}.")
    return torch.tensor([one % len(tokens) for one in at], dtype=torch.long)


def _density(index: FeatureIndex, name: str) -> Float[Tensor, " latents"]:
    return torch.from_numpy(np.ascontiguousarray(index.latents(name).records["density"]))


def _share_above(
    index: FeatureIndex, name: str, latents: Int[Tensor, " chosen"], acts: Float[Tensor, "pos chosen"]
) -> Float[Tensor, "pos chosen"]:
    """The share of the index's tokens on which a latent is more active, those in the same bin counting half; never
    below half a token's, since what none of so many tokens had is no rarer than that for sure.

    Where an index has no histogram, all activations of a latent count as being in one bin.
    """
    parts, which = index.latents(name), latents.numpy()
    records = parts.records[which]
    counts = records["n_bins"].astype(np.int64)
    row = np.repeat(np.arange(len(which)), counts)
    first = np.cumsum(counts) - counts
    flat = np.repeat(records["bins"].astype(np.int64) - first, counts) + np.arange(len(row))
    bins = parts.bins[flat]
    there = (
        bins["bin"] if "bin" in (bins.dtype.names or ()) else bin_of(torch.from_numpy(bins["centre"].copy())).numpy()
    )
    histogram = np.zeros((len(which), BINS))
    np.add.at(histogram, (row, there.astype(np.int64)), bins["count"])
    active = histogram.sum(1)
    total = np.maximum(active / np.maximum(records["density"], 1e-12), np.maximum(active, 1))
    above = (active[:, None] - np.cumsum(histogram, axis=1) + histogram / 2) / total[:, None]
    above = np.where(counts[:, None] > 0, above, records["density"][:, None] / 2)
    inactive = (1 + records["density"]) / 2
    table = torch.from_numpy(np.concatenate([inactive[:, None], above], axis=1)).clamp(min=_half_a_token(index, name))
    place = torch.where(acts > 0, bin_of(acts.reshape(-1)).view(acts.shape).long() + 1, 0)
    return table.gather(1, place.T).T


def _half_a_token(index: FeatureIndex, name: str) -> float:
    """The share of half a token; where nobody knows how many there were, half of the rarest latent's density."""
    if index.about["tokens"]:
        return 0.5 / index.about["tokens"]
    density = _density(index, name)
    return 0.5 * float(density[density > 0].min()) if bool((density > 0).any()) else 1e-9


def _share_above_here(
    acts: Float[Tensor, "pos chosen"], others: Float[Tensor, "others chosen"]
) -> Float[Tensor, "pos chosen"] | None:
    """The share of the text's other tokens on which a latent is more active, equal ones counting half."""
    if not len(others):
        return None
    values, ordered = acts.T.contiguous(), others.T.contiguous().sort(dim=1).values
    below = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return 1 - below.T / (2 * len(others))


def _mixed(
    everywhere: Float[Tensor, "pos chosen"], here: Float[Tensor, "pos chosen"] | None
) -> Float[Tensor, "pos chosen"]:
    return everywhere if here is None else (1 - HERE) * everywhere + HERE * here


def tokens_to_features(
    index: FeatureIndex,
    gemma: Gemma,
    dictionary: str,
    loaded: Loaded,
    text: str,
    top: int = 5,
    max_density: float = 0.1,
) -> list[tuple[str, list[Hit]]]:
    """For each content token of a text (as spelled) the features of one dictionary that are strongest on it."""
    tokens = gemma.tokens(text)
    found: list[tuple[str, list[Hit]]] = []
    for at in tokens.content_mask.nonzero()[:, 0].tolist():
        one = by_text(index, gemma, {dictionary: loaded}, tokens, top, at=[at], max_density=max_density)
        found.append((tokens.pieces[at], list(one.hits)))
    return found


@torch.no_grad()
def by_direction(
    index: FeatureIndex, dictionaries: Mapping[str, Loaded], direction: Float[Tensor, " width"], top: int = 20
) -> list[Hit]:
    """Features with the largest cosine of decoder and direction, in all dictionaries that write vectors of its width.

    Raises InputError when there is none, and for a direction of length zero; the errors of ``indexed``.
    """
    wanted = direction.float().reshape(-1)
    if not float(wanted.norm()) > 0:
        raise InputError("the direction has length zero; give another one.")
    found: list[tuple[float, int]] = []
    for name, loaded in indexed(index, dictionaries).items():
        if loaded.dictionary.d_out != len(wanted):
            continue
        rows = directions(loaded, 0, loaded.dictionary.n_latents).float()
        cosines = rows @ wanted.to(rows.device) / (rows.norm(dim=1).clamp(min=1e-30) * wanted.norm())
        best = cosines.topk(min(top, len(cosines)))
        found += [(v, index.firsts[name] + i) for v, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    if not found:
        raise InputError(f"no dictionary of the index writes vectors of width {len(wanted)}.")
    best = sorted(found, key=lambda one: (-one[0], one[1]))[:top]
    return hits_of(index, [(number, score) for score, number in best])


def like(index: FeatureIndex, dictionaries: Mapping[str, Loaded], feature: str, top: int = 20) -> list[Hit]:
    """Features whose decoder points where that of another feature does; itself left out.

    Raises InputError when the other feature's dictionary is not among those given; the errors of ``by_direction``.
    """
    found = index.find_id(feature)
    if found.dictionary not in dictionaries:
        raise InputError(
            f"the direction of {found} is in {found.dictionary}, which is not among the dictionaries given"
            f" ({', '.join(dictionaries)}); give its folder too."
        )
    direction = directions(dictionaries[found.dictionary], found.latent, found.latent + 1)[0]
    return [hit for hit in by_direction(index, dictionaries, direction, top + 1) if hit.id != str(found)][:top]


def by_promoted(index: FeatureIndex, token: str, top: int = 20) -> list[Hit]:
    """Features among whose most promoted tokens is one that spells ``token``, with a space in front or not; the score
    is the change of its logit.

    Raises InputError when no token is spelled so.
    """
    ids = spelled(index, token)
    found: list[tuple[float, int]] = []
    for name in index.names:
        records = index.latents(name).records
        latent, rank = np.isin(records["promoted"], ids).nonzero()
        by = records["promoted_by"][latent, rank]
        found += [(float(v), index.firsts[name] + int(i)) for v, i in zip(by, latent, strict=True)]
    best: dict[int, float] = {}
    for score, number in sorted(found, key=lambda one: (-one[0], one[1])):
        best.setdefault(number, score)
    return hits_of(index, list(best.items())[:top])


def spelled(index: FeatureIndex, token: str) -> list[int]:
    """Tokens that spell this, with a space in front or not; raises InputError for no word, or when there is none."""
    word = token.strip()
    if not word:
        raise InputError("the token is empty; give one with a letter or a sign.")
    ids = index.pieces.ids_of([word, f"▁{word}", f" {word}"])
    if not ids:
        raise InputError(f"{token!r} is no single token of this model's vocabulary that the index knows; give another.")
    return ids


def hits_of(index: FeatureIndex, scores: Sequence[tuple[int, float]]) -> list[Hit]:
    """The hits for latents by their numbers over all dictionaries, whose records are read from the disk at once."""
    for name in index.names:
        first = index.firsts[name]
        mine = [number - first for number, _ in scores if 0 <= number - first < index.sizes[name]]
        if mine:
            layout.prefetch(index.latents(name).records, np.array(mine), 1)
    return [hit_of(index, number, score) for number, score in scores]


def hit_of(index: FeatureIndex, number: int, score: float, values: Sequence[float] = ()) -> Hit:
    """The hit for a latent, by its number over all dictionaries."""
    found = index.id_of(number)
    density = float(index.latents(found.dictionary).records["density"][found.latent])
    labels = tuple(one.text for one in index.database.labels(number))
    return Hit(str(found), float(score), density, labels, tuple(values))
