"""Batches from pools of rows: permuted, cut, prefetched, and resumable at any place.

The same for rows that come from a disk, from an object store, or from a model on the fly.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from gemscope.activations.order import Position, row_order
from gemscope.core.arrays import Float, Int, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site


@dataclass(frozen=True, eq=False)
class Origin:
    """Where rows come from."""

    doc: Int[Tensor, "rows"]
    """Number of the document in what was harvested."""
    pos: Int[Tensor, "rows"]
    """Position in the document's tokens, its <bos> being 0."""
    token: Int[Tensor, "rows"]


@dataclass(frozen=True, eq=False)
class Pool:
    """Rows in memory, aligned over sites."""

    rows: int
    acts: Mapping[Site, Tensor]
    """At least ``rows`` rows a site."""
    origin: Origin | None


@runtime_checkable
class PoolReader(Protocol):
    """Gives pools by their number. A pool's memory is used again after the next one."""

    def pools(self, epoch: int) -> int:
        """How many pools an epoch has."""
        ...

    def load(self, epoch: int, pool: int) -> Pool:
        """One of them."""
        ...


_Step = tuple[dict[Site, Tensor], Origin | None, Position]


class Stream(Iterator[dict[Site, Float[Tensor, "batch _"]]]):
    """Batches of rows, epoch after epoch; the last batch of an epoch may be smaller."""

    def __init__(
        self,
        reader: PoolReader,
        sites: Sequence[Site],
        batch_size: int,
        seed: int,
        *,
        start: Position,
        epochs: int | None,
        device: torch.device | None = None,
    ) -> None:
        """``epochs`` is how many to go through, the one of ``start`` included; None is without end.

        Raises InputError for a batch size below 1.
        """
        if batch_size < 1:
            raise InputError(f"batch size {batch_size} is below 1; use for example 2048.")
        self.position = start
        """The place of the next batch: hand it to another stream with the same arguments to go on from here."""
        self.origin: Origin | None = None
        """Of the rows of the last batch, when it was asked for."""
        last = None if epochs is None else start.epoch + epochs
        self._steps = _Steps(reader, list(sites), batch_size, seed, start, last, device).ahead()

    def __next__(self) -> dict[Site, Float[Tensor, "batch _"]]:
        acts, self.origin, self.position = next(self._steps)
        return acts

    def close(self) -> None:
        """Stop reading; whoever just drops the stream stops it too."""
        self._steps.close()


@dataclass(frozen=True, eq=False)
class _Steps:
    """Makes the steps of a stream, without knowing the stream: it may be dropped at any time.

    Nothing is shut down where a generator is closed: that may happen inside the garbage collector, in any thread,
    with any lock held. Threads whose executor is gone end by themselves.
    """

    reader: PoolReader
    sites: list[Site]
    size: int
    seed: int
    start: Position
    last: int | None
    """The epoch to stop before."""
    device: torch.device | None

    def ahead(self) -> Generator[_Step]:
        """Each step while the next is under way to the device."""
        before: _Step | None = None
        for acts, origin, position in self._cut():
            step = {site: self._to_device(x) for site, x in acts.items()}, origin, position
            if before is not None:
                yield before
            before = step
        if before is not None:
            yield before

    def _to_device(self, x: Tensor) -> Tensor:
        if self.device is None or self.device.type == "cpu":
            return x
        return (x.pin_memory() if self.device.type == "cuda" else x).to(self.device, non_blocking=True)

    def _cut(self) -> Generator[_Step]:
        """Batches of the permuted pools; a batch may begin in one pool and end in the next."""
        gathered: list[tuple[dict[Site, Tensor], Origin | None]] = []
        have = 0
        for at, pool, is_last in self._pools():
            order = torch.from_numpy(row_order(pool.rows, self.seed, at.epoch, at.pool))
            row = at.row
            while row < pool.rows:
                rows = order[row : row + self.size - have]
                gathered.append(self._gather(pool, rows))
                row, have = row + len(rows), have + len(rows)
                if have == self.size or (is_last and row == pool.rows):
                    after = Position(at.epoch, at.pool, row)
                    if row == pool.rows:
                        after = Position(at.epoch + 1) if is_last else Position(at.epoch, at.pool + 1)
                    yield *_joined(gathered), after
                    gathered, have = [], 0

    def _gather(self, pool: Pool, rows: Int[Tensor, "rows"]) -> tuple[dict[Site, Tensor], Origin | None]:
        acts = {site: torch.index_select(pool.acts[site], 0, rows) for site in self.sites}
        old = pool.origin
        return acts, None if old is None else Origin(old.doc[rows], old.pos[rows], old.token[rows])

    def _pools(self) -> Generator[tuple[Position, Pool, bool]]:
        """(where it begins, the pool, whether it ends an epoch), the next one being loaded meanwhile."""
        background = ThreadPoolExecutor(1, "pool")
        waiting: tuple[Position, bool, Future[Pool]] | None = None
        for at, is_last in self._places():
            upcoming = at, is_last, background.submit(self.reader.load, at.epoch, at.pool)
            if waiting is not None:
                yield waiting[0], waiting[2].result(), waiting[1]
            waiting = upcoming
        if waiting is not None:
            yield waiting[0], waiting[2].result(), waiting[1]

    def _places(self) -> Generator[tuple[Position, bool]]:
        epoch, pool, row = self.start.epoch, self.start.pool, self.start.row
        while self.last is None or epoch < self.last:
            count = self.reader.pools(epoch)
            if count == 0:
                return
            for number in range(pool, count):
                yield Position(epoch, number, row), number == count - 1
                row = 0
            epoch, pool = epoch + 1, 0


def _joined(
    parts: Sequence[tuple[dict[Site, Tensor], Origin | None]],
) -> tuple[dict[Site, Tensor], Origin | None]:
    if len(parts) == 1:
        return parts[0]
    acts = {site: torch.cat([one[site] for one, _ in parts]) for site in parts[0][0]}
    origins = [origin for _, origin in parts if origin is not None]
    if not origins:
        return acts, None
    doc, pos, token = (torch.cat([getattr(o, name) for o in origins]) for name in ("doc", "pos", "token"))
    return acts, Origin(doc, pos, token)
