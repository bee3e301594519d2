"""The k best of a stream of entries for every latent at once, whatever the order in which they come.

Notable:
- best is the largest score, of equal ones the smallest place, a total order: parts of a pass that were counted apart
  merge into what one pass would have found;
- entries that cannot enter any more are left out by a comparison with the k-th score; the others wait in a buffer and
  are merged in one sort.
"""

from dataclasses import dataclass

import torch

from gemscope.core.arrays import Bool, Float, Int, Tensor

_BUFFER = 1 << 20
"""Entries that wait at most; fewer where all the k best are fewer, so that the floors rise early."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Candidates, in any order."""

    latent: Int[Tensor, " entries"]
    score: Int[Tensor, " entries"]
    """0 to 2**31 - 1."""
    place: Int[Tensor, " entries"]
    """Which token: its document and position in one number."""
    value: Float[Tensor, " entries"]
    """The activation."""
    near: Float[Tensor, "entries window"]
    """Activations of the same latent around it, bf16; 0 where it is not active or the context ends."""

    def select(self, keep: Tensor) -> "Entries":
        """Some of them."""
        return Entries(self.latent[keep], self.score[keep], self.place[keep], self.value[keep], self.near[keep])


class Best:
    """[latents, k] entries, the best first; score -1 where there are fewer."""

    def __init__(self, latents: int, k: int, window: int, device: torch.device | None = None) -> None:
        """``window`` is the width of ``near``."""
        self.k = k
        self.score = torch.full((latents, k), -1, dtype=torch.int32, device=device)
        self.place = torch.zeros(latents, k, dtype=torch.int64, device=device)
        self.value = torch.zeros(latents, k, dtype=torch.float32, device=device)
        self.near = torch.zeros(latents, k, window, dtype=torch.bfloat16, device=device)
        self._waiting: list[Entries] = []
        self._size = 0
        self._room = min(_BUFFER, 2 * latents * k)

    @property
    def floor(self) -> Int[Tensor, " latents"]:
        """A score below this one cannot enter."""
        return self.score[:, -1]

    def can_enter(self, latent: Int[Tensor, " entries"], score: Int[Tensor, " entries"]) -> Bool[Tensor, " entries"]:
        """Which entries are worth adding."""
        return score >= self.floor.index_select(0, latent)

    def add(self, entries: Entries) -> None:
        """Take in candidates."""
        self._waiting.append(entries)
        self._size += len(entries.latent)
        if self._size >= self._room:
            self.settle()

    def absorb(self, other: "Best") -> None:
        """Take in what another one found."""
        other.settle()
        latent, rank = (other.score >= 0).nonzero(as_tuple=True)
        at = (latent, rank)
        self.add(Entries(latent, other.score[at], other.place[at], other.value[at], other.near[at]))
        self.settle()

    def settle(self) -> None:
        """Merge what waits."""
        if not self._size:
            return
        fresh = _joined(self._waiting)
        self._waiting, self._size = [], 0
        fresh = fresh.select(self.can_enter(fresh.latent, fresh.score))
        if not len(fresh.latent):
            return
        touched = torch.zeros(len(self.score), dtype=torch.bool, device=self.score.device)
        touched[fresh.latent] = True
        latent, rank = ((self.score >= 0) & touched[:, None]).nonzero(as_tuple=True)
        at = (latent, rank)
        every = _joined([Entries(latent, self.score[at], self.place[at], self.value[at], self.near[at]), fresh])
        by_place = every.place.argsort()
        key = (every.latent.long() << 31) | (0x7FFFFFFF - every.score.long())
        order = by_place[key[by_place].argsort(stable=True)]
        count = torch.bincount(every.latent, minlength=len(self.score))
        rank = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[every.latent[order]]
        order, rank = order[rank < self.k], rank[rank < self.k]
        into = (every.latent[order].long(), rank)
        for name in ("score", "place", "value", "near"):
            getattr(self, name)[into] = getattr(every, name)[order]

    def state(self) -> dict[str, Tensor]:
        """Everything, to go on later."""
        self.settle()
        return {"score": self.score, "place": self.place, "value": self.value, "near": self.near}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)


def _joined(parts: list[Entries]) -> Entries:
    return Entries(
        torch.cat([one.latent.long() for one in parts]),
        torch.cat([one.score for one in parts]),
        torch.cat([one.place for one in parts]),
        torch.cat([one.value for one in parts]),
        torch.cat([one.near for one in parts]),
    )
