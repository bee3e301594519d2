"""Everything an index counts of one dictionary, for all latents at once, from its sparse codes.

Notable: every part is a whole number or a largest one, so tallies of different rows add up to the tally of all rows,
exactly and in any order. The random choices are hashes of seed, document, position and latent: the same whoever made
them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.dictionaries.sparse import Support
from gemscope.features.best import Best, Entries
from gemscope.features.blocks import Where
from gemscope.features.config import IndexConfig
from gemscope.features.histogram import BINS, bin_of

STEPS = 16
"""Ranges of positions: 0, 1-2, 3-6, 7-14, ..., each twice as long as the one before it."""

_COUNTS = ("count", "histogram", "steps", "special_count")
_LARGEST = ("peak", "special_peak")


@dataclass(frozen=True, eq=False)
class Codes:
    """The active latents of the rows of one chunk."""

    rows: Int[Tensor, " entries"]
    latents: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]


def step_range(step: Int[Tensor, "rows"]) -> Int[Tensor, "rows"]:
    """Which range of positions."""
    return torch.frexp((step + 1).double())[1].long().sub(1).clamp(max=STEPS - 1)


class Tally:
    """Of one dictionary."""

    def __init__(self, latents: int, config: IndexConfig, share: float, device: torch.device | None = None) -> None:
        """``share`` of the rows are those on which partners are counted."""
        self.latents, self.config, self.share = latents, config, share
        self.count = torch.zeros(latents, dtype=torch.int64, device=device)
        self.peak = torch.zeros(latents, dtype=torch.float32, device=device)
        self.histogram = torch.zeros(latents, BINS, dtype=torch.int32, device=device)
        self.steps = torch.zeros(latents, STEPS, dtype=torch.int32, device=device)
        self.special_count = torch.zeros(latents, dtype=torch.int32, device=device)
        self.special_peak = torch.zeros(latents, dtype=torch.float32, device=device)
        window = 2 * config.window + 1
        self.top = Best(latents, config.top, window, device)
        self.sample = Best(latents, config.sample, window, device)
        self.pair_rows = 0
        """Rows on which partners were counted."""
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def update(self, support: Support, values: Float[Tensor, " entries"], where: Where) -> None:
        """Count the codes of some whole contexts."""
        device = self.count.device
        if not bool((values > 0).all()):  # a threshold below 0 lets such values through
            keep = values > 0
            support = Support(support.rows[keep], support.latents[keep], support.batch, support.d_sae)
            values = values[keep]
        order = support.by_latent[0]
        codes = Codes(*(x.index_select(0, order) for x in (support.rows, support.latents, values.float())))
        special = where.special.to(device)
        if bool(special.any()):
            codes = self._without_special(codes, special)
        places, context = where.place.to(device), where.context.to(device)
        self.count.index_add_(0, codes.latents, torch.ones_like(codes.latents))
        _largest(self.peak, codes)
        _count(self.histogram, codes.latents, bin_of(codes.values))
        _count(self.steps, codes.latents, step_range(where.step).to(device).index_select(0, codes.rows))
        self._strongest(codes, places, context)
        self._sampled(codes, places, context)
        self._paired(support, places, special)

    def merge(self, other: "Tally") -> None:
        """Add what was counted of other rows."""
        for name in _COUNTS:
            getattr(self, name).add_(getattr(other, name))
        for name in _LARGEST:
            torch.maximum(getattr(self, name), getattr(other, name), out=getattr(self, name))
        self.top.absorb(other.top)
        self.sample.absorb(other.sample)
        self.pair_rows += other.pair_rows
        self._pairs += other._pairs

    @property
    def pairs(self) -> tuple[Int[Tensor, " entries"], Int[Tensor, " entries"]]:
        """(place, latent) of every active latent on the rows where partners are counted, in order."""
        if not self._pairs:
            none = torch.empty(0, dtype=torch.int64)
            return none, none.int()
        place, latent = (torch.cat(column) for column in zip(*self._pairs, strict=True))
        order = latent.argsort(stable=True)
        order = order[place[order].argsort(stable=True)]
        return place[order], latent[order]

    def state(self) -> dict[str, Tensor]:
        """Everything, to go on later."""
        found = {name: getattr(self, name) for name in (*_COUNTS, *_LARGEST)}
        for name in ("top", "sample"):
            found |= {f"{name}.{key}": tensor for key, tensor in getattr(self, name).state().items()}
        place, latent = self.pairs
        return {**found, "pairs.place": place, "pairs.latent": latent, "pairs.rows": torch.tensor([self.pair_rows])}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        for name in (*_COUNTS, *_LARGEST):
            getattr(self, name).copy_(state[name])
        for name in ("top", "sample"):
            keys = [key for key in state if key.startswith(f"{name}.")]
            getattr(self, name).load({key.removeprefix(f"{name}."): state[key] for key in keys})
        self._pairs = [(state["pairs.place"], state["pairs.latent"])]
        self.pair_rows = int(state["pairs.rows"][0])

    def _without_special(self, codes: Codes, special: Bool[Tensor, "rows"]) -> Codes:
        """Count special tokens apart; the rest."""
        apart = special.index_select(0, codes.rows)
        theirs, rest = _chosen(codes, apart), _chosen(codes, ~apart)
        self.special_count.index_add_(0, theirs.latents, torch.ones_like(theirs.latents, dtype=torch.int32))
        _largest(self.special_peak, theirs)
        return rest

    def _strongest(self, codes: Codes, places: Tensor, context: Tensor) -> None:
        """For each latent and context the largest activation, the first of equal ones."""
        score = codes.values.view(torch.int32)
        at = self.top.can_enter(codes.latents, score).nonzero()[:, 0]
        if not len(at):
            return
        latent, where = codes.latents[at], context[codes.rows[at]]
        fresh = torch.ones(len(at), dtype=torch.bool, device=at.device)
        fresh[1:] = (latent[1:] != latent[:-1]) | (where[1:] != where[:-1])
        segment = fresh.cumsum(0) - 1
        largest = score.new_full((int(segment[-1]) + 1,), -1).scatter_reduce(0, segment, score[at], "amax")
        winning = (score[at] == largest[segment]).nonzero()[:, 0]
        first = torch.ones(len(winning), dtype=torch.bool, device=at.device)
        first[1:] = segment[winning[1:]] != segment[winning[:-1]]
        at = at[winning[first]]
        self.top.add(self._entries(codes, at, score[at], places, context))

    def _sampled(self, codes: Codes, places: Tensor, context: Tensor) -> None:
        """Active tokens with the largest hashes: a random sample of each latent's, without replacement."""
        rows = _mixed(places + _stream(self.config.seed, 1))
        score = (_mixed(rows.index_select(0, codes.rows) + codes.latents * _ODD) & 0x7FFFFFFF).int()
        at = self.sample.can_enter(codes.latents, score).nonzero()[:, 0]
        if len(at):
            self.sample.add(self._entries(codes, at, score[at], places, context))

    def _paired(self, support: Support, places: Tensor, special: Tensor) -> None:
        chosen = ((_mixed(places + _stream(self.config.seed, 2)) & 0x7FFFFFFF) < self.share * 2**31) & ~special
        self.pair_rows += int(chosen.sum())
        at = chosen.index_select(0, support.rows).nonzero()[:, 0]
        if len(at):
            place = places.index_select(0, support.rows[at]).cpu()
            self._pairs.append((place, support.latents[at].int().cpu()))

    def _entries(self, codes: Codes, at: Tensor, score: Tensor, places: Tensor, context: Tensor) -> Entries:
        rows = codes.rows[at]
        near = self._near(codes, at, context)
        return Entries(codes.latents[at], score, places[rows], codes.values[at], near)

    def _near(self, codes: Codes, at: Tensor, context: Tensor) -> Float[Tensor, "entries window"]:
        """Activations of the same latent in the same context around some entries.

        Entries are in order of latent and row, so a neighbour ``d`` rows away is at most ``d`` entries away.
        """
        half, count = self.config.window, len(codes.rows)
        near = torch.zeros(len(at), 2 * half + 1, dtype=torch.bfloat16, device=at.device)
        latent, row = codes.latents[at], codes.rows[at]
        mine = context[row]
        near[:, half] = codes.values[at].bfloat16()
        for sign in (-1, 1):
            open_ = torch.arange(len(at), device=at.device)
            for distance in range(1, half + 1):
                other = at[open_] + sign * distance
                inside = ((other >= 0) & (other < count)).nonzero()[:, 0]
                open_, other = open_[inside], other[inside]
                away = codes.rows[other] - row[open_]
                same = (codes.latents[other] == latent[open_]) & (away.abs() <= half)
                same = (same & (context[codes.rows[other]] == mine[open_])).nonzero()[:, 0]
                open_, other = open_[same], other[same]
                if not len(open_):
                    break
                near[open_, half + away[same]] = codes.values[other].bfloat16()
        return near


_ODD = 0x1E3779B97F4A7C15


def _stream(seed: int, use: int) -> int:
    """A number for each seed and use, as an int64."""
    number = ((2 * seed + use) * _ODD) % (1 << 64)
    return number - (1 << 64) if number >= 1 << 63 else number


def _mixed(x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """A hash of 64 bits: the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _count(table: Int[Tensor, "latents bins"], latent: Int[Tensor, " n"], column: Int[Tensor, " n"]) -> None:
    flat = latent * table.shape[1] + column
    table.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=table.dtype))


def _largest(into: Float[Tensor, " latents"], codes: Codes) -> None:
    into.scatter_reduce_(0, codes.latents, codes.values, "amax")


def _chosen(codes: Codes, keep: Tensor) -> Codes:
    return Codes(codes.rows[keep], codes.latents[keep], codes.values[keep])
