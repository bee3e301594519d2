"""What any other word in that place would do to attention: the scores of random replacements of the changed tokens, or
of those that were put in where none stood before.
"""

from dataclasses import dataclass

import torch

from gemscope.core.arrays import Bool, Float, Tensor
from gemscope.lens.alignment import Alignment, collapse
from gemscope.lens.attention import Kind, read_maps
from gemscope.lens.heads import words
from gemscope.lens.inputs import Target, padded
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Tokens

SPREAD_FLOOR = 0.05
"""Least standard deviation that a score is measured in, in mean scores of the null band over all heads: a head that no
replacement moves would otherwise have a z without end.
"""


@dataclass(frozen=True, eq=False)
class NullBand:
    """Scores of random replacements, or insertions, of as many tokens at the same place."""

    scores: Float[Tensor, "sample layer head"]
    seed: int
    """Of the random tokens."""

    def z(self, scores: Float[Tensor, "layer head"]) -> Float[Tensor, "layer head"]:
        """Scores in standard deviations of the band (at least ``SPREAD_FLOOR`` of its mean) from its mean."""
        least = max(SPREAD_FLOOR * float(self.scores.mean()), torch.finfo(self.scores.dtype).tiny)
        return (scores - self.scores.mean(0)) / self.scores.std(0).clamp(min=least)


@dataclass(frozen=True, eq=False)
class Runs:
    """Reads the same maps of several texts, all filled up to one length."""

    gemma: Gemma
    layers: tuple[int, ...]
    kind: Kind
    target: Target | None
    length: int

    def __call__(self, tokens: Tokens) -> Float[Tensor, "layer head query key"]:
        return read_maps(self.gemma, padded(self.gemma, tokens, self.length), self.layers, self.kind, self.target)


def later_queries(alignment: Alignment) -> Bool[Tensor, " group"]:
    """Groups after the changed one, or the changed one alone when none is; all when nothing was changed."""
    place, changed = torch.arange(len(alignment.groups)), alignment.changed
    if changed is None:
        return torch.ones(len(place), dtype=torch.bool)
    return place > changed if changed + 1 < len(place) else place == changed


def can_move(alignment: Alignment) -> bool:
    """Whether something was changed, and a later query stands in both texts."""
    return alignment.changed is not None and bool(alignment.comparable[later_queries(alignment)].any())


def movement(
    difference: Float[Tensor, "layer head query key"], queries: Bool[Tensor, " query"]
) -> Float[Tensor, "layer head"]:
    """Mean over ``queries`` of half the sum of |difference|."""
    return 0.5 * difference[:, :, queries].abs().sum(-1).mean(-1)


def null_band(runs: Runs, a: Tokens, b: Tokens, alignment: Alignment, n: int, seed: int) -> NullBand:
    """Random tokens of the same kind in the place of the changed ones of ``a``, or of those put in in ``b``, against
    the text before the edit.
    """
    assert alignment.changed is not None
    text, spans = (b, alignment.spans("b")) if alignment.inserts else (a, alignment.spans("a"))
    places = range(*spans[alignment.changed])
    pools = [_alike(runs.gemma, int(text.ids[i])) for i in places]
    generator = torch.Generator().manual_seed(seed)
    later = later_queries(alignment)
    before = collapse(runs(a), alignment.spans("a"))
    scores: list[Tensor] = []
    for _ in range(n):
        ids = text.ids.clone()
        for i, pool in zip(places, pools, strict=True):
            ids[i] = pool[int(torch.randint(len(pool), (), generator=generator))]
        after = collapse(runs(runs.gemma.tokens_of(ids)), spans)
        scores.append(movement(after - before, later))
    return NullBand(torch.stack(scores), seed)


def _alike(gemma: Gemma, token: int) -> list[int]:
    """Other tokens of the same make: with or without a space, a capital, letters, digits or neither."""
    pieces: dict[str, int] = gemma.tokenizer.get_vocab()
    special, size = gemma.vocabulary.special_ids, gemma.shape.vocab_size
    make = _make(gemma.tokenizer.convert_ids_to_tokens(token))
    found = sorted(i for p, i in pieces.items() if i < size and i not in special and i != token and _make(p) == make)
    return found or words(gemma)


def _make(piece: object) -> tuple[bool, bool, bool, bool]:
    text = str(piece)
    bare = text.removeprefix("▁")
    return text.startswith("▁"), bare.isalpha(), bare.isdigit(), bare[:1].isupper()
