"""Batches from pools of rows: cut, prefetched, and resumable at any place.

The same for rows that come from a disk, from an object store, or from a model on the fly.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from gemscope.activations.order import Position
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


@dataclass(frozen=True)
class Cut:
    """How a pool is cut into parts of batches."""

    row: int
    """Rows before this one were given before."""
    first: int
    """Rows that the batch under way lacks."""
    size: int
    """Of a batch."""

    def sizes(self, rows: int) -> list[int]:
        """Rows of each part of a pool of so many rows; raises InputError when there are none left."""
        if self.row >= rows > 0:
            raise InputError(f"row {self.row} of a pool of {rows} rows: this is a position in another stream.")
        left = rows - self.row
        first = min(self.first, left)
        whole, rest = divmod(left - first, self.size)
        return [size for size in (first, *whole * [self.size], rest) if size]


Part = tuple[dict[Site, Tensor], Origin | None]
"""Rows of a batch, aligned over sites, and where they come from if that was asked for."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Rows in memory that nobody else uses, in the order they are given in."""

    rows: int
    """With those that were given before."""
    parts: deque[Part]


@runtime_checkable
class PoolReader(Protocol):
    """Gives pools by their number."""

    def pools(self, epoch: int) -> int:
        """How many pools an epoch has."""
        ...

    def load(self, epoch: int, pool: int, cut: Cut) -> Pool:
        """One of them; never called by two threads at once."""
        ...


_Step = tuple[dict[Site, Tensor], Origin | None, Position]


class Stream(Iterator[dict[Site, Float[Tensor, "batch _"]]]):
    """Batches of rows, epoch after epoch; the last batch of an epoch may be smaller."""

    def __init__(
        self,
        reader: PoolReader,
        sites: Sequence[Site],
        batch_size: int,
        *,
        start: Position,
        epochs: int | None,
        device: torch.device | None = None,
    ) -> None:
        """``epochs`` is how many to go through, the one of ``start`` included; None is without end.

        Raises InputError for a batch size below 1, or no site.
        """
        if not sites:
            raise InputError("no site to stream; name at least one.")
        if batch_size < 1:
            raise InputError(f"batch size {batch_size} is below 1; use for example 2048.")
        self.position = start
        """The place of the next batch: hand it to another stream with the same arguments to go on from here."""
        self.origin: Origin | None = None
        """Of the rows of the last batch, when it was asked for."""
        last = None if epochs is None else start.epoch + epochs
        self._steps = _Steps(reader, list(sites), batch_size, start, last, device).ahead()

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
    start: Position
    last: int | None
    """The epoch to stop before."""
    device: torch.device | None

    def ahead(self) -> Generator[_Step]:
        """Each step while the next is under way to the device."""
        before: _Step | None = None
        for acts, origin, position in self._joined():
            step = {site: self._to_device(x) for site, x in acts.items()}, origin, position
            if before is not None:
                yield before
            before = step
        if before is not None:
            yield before

    def _to_device(self, x: Tensor) -> Tensor:
        if self.device is None or self.device.type == "cpu":
            return x
        cuda = self.device.type == "cuda"
        return (x.pin_memory() if cuda else x).to(self.device, non_blocking=cuda)

    def _joined(self) -> Generator[_Step]:
        """Batches, put together where one begins in one pool and ends in the next."""
        parts: list[Part] = []
        have = 0
        for at, pool, is_last in self._pools():
            row = at.row
            while pool.parts:
                parts.append(pool.parts.popleft())
                count = len(parts[-1][0][self.sites[0]])
                row, have = row + count, have + count
                if have == self.size:
                    after = Position(at.epoch, at.pool, row)
                    if row == pool.rows:
                        after = Position(at.epoch + 1) if is_last else Position(at.epoch, at.pool + 1)
                    yield *_join(parts), after
                    parts, have = [], 0
            if is_last and parts:
                yield *_join(parts), Position(at.epoch + 1)
                parts, have = [], 0

    def _pools(self) -> Generator[tuple[Position, Pool, bool]]:
        """(where it begins, the pool, whether it ends an epoch), the next one being loaded meanwhile."""
        background = ThreadPoolExecutor(1, "pool")
        under_way = 0

        def load(at: Position, is_last: bool) -> Pool:
            nonlocal under_way
            pool = self.reader.load(at.epoch, at.pool, Cut(at.row, self.size - under_way, self.size))
            under_way = 0 if is_last else (under_way + pool.rows - at.row) % self.size
            return pool

        waiting: tuple[Position, bool, Future[Pool]] | None = None
        for at, is_last in self._places():
            upcoming = at, is_last, background.submit(load, at, is_last)
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


def _join(parts: Sequence[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    acts = {site: _cat([one[site] for one, _ in parts]) for site in parts[0][0]}
    origins = [origin for _, origin in parts if origin is not None]
    if not origins:
        return acts, None
    return acts, Origin(*(_cat([getattr(o, name) for o in origins]) for name in ("doc", "pos", "token")))


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """By numpy: torch's threads would then wait at full speed for more to do, and those that read for them."""
    joined = np.concatenate([x.view(torch.uint8).numpy() for x in parts])
    return torch.from_numpy(joined).view(parts[0].dtype)
