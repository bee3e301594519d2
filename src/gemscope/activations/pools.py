"""What there is to do for each pool of a store: known without reading a row, and made while others are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gemscope.activations.lending import Bytes
from gemscope.activations.order import EpochOrder, Ints, Reading, blocks_of, epoch_order, row_order
from gemscope.activations.places import Place
from gemscope.activations.plan import Plan
from gemscope.activations.shards import FileRecord

Span = tuple[int, int, int]
"""(shard, first row, one after the last)."""

_REMEMBERED = 3


@dataclass(frozen=True, eq=False)
class Shard:
    """One unit of a store: a file a site, the same rows in all of them."""

    unit: int
    rows: int
    files: Mapping[str, FileRecord]


@dataclass(frozen=True, eq=False)
class Contents:
    """What there is to read."""

    place: Place
    plan: Plan
    shards: tuple[Shard, ...]
    keep: tuple[Bytes, ...] | None
    """For each shard one bit a row, set where the row is wanted; None: all."""

    def kept(self, shard: int, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which of some rows are wanted."""
        return np.ones(stop - start, bool) if self.keep is None else unpacked_bits(self.keep[shard], start, stop)


@dataclass(frozen=True, eq=False)
class PoolOrder:
    """The rows of a pool, and their order."""

    contents: Contents
    spans: Sequence[Span]
    """Rows to read, in the order of the disk."""
    first: Sequence[int]
    """How many rows are wanted before each span, and in all."""
    order: npt.NDArray[np.int32]
    """For each wanted row its place in the pool."""

    @property
    def rows(self) -> int:
        """How many are wanted."""
        return len(self.order)

    def place(self, number: int) -> npt.NDArray[np.int32]:
        """For each row of a span its place in the pool; -1 for one that is not wanted."""
        wanted = self.order[self.first[number] : self.first[number + 1]]
        if self.contents.keep is None:
            return wanted
        found = np.full(self.spans[number][2] - self.spans[number][1], -1, np.int32)
        found[self.contents.kept(*self.spans[number])] = wanted
        return found


class PoolOrders:
    """Those of all epochs."""

    def __init__(self, contents: Contents, seed: int, reading: Reading) -> None:
        self._contents, self._seed, self._reading = contents, seed, reading
        self._rows = [shard.rows for shard in contents.shards]
        self._kept = [self._kept_in(number) for number in range(len(self._rows))]
        self._epochs: dict[int, EpochOrder] = {}
        self._found: dict[tuple[int, int], PoolOrder] = {}

    def pools(self, epoch: int) -> int:
        """How many pools an epoch has."""
        return self._epoch(epoch).pools

    def get(self, epoch: int, pool: int) -> PoolOrder:
        """One of them; the last few are remembered."""
        if (found := self._found.get((epoch, pool))) is None:
            found = self._found[epoch, pool] = self._make(epoch, pool)
            _forget(self._found)
        return found

    def _make(self, epoch: int, pool: int) -> PoolOrder:
        runs = self._epoch(epoch).runs(pool)
        spans: list[Span] = list(zip(runs.shard.tolist(), runs.start.tolist(), runs.stop.tolist(), strict=True))
        first = np.cumsum([0, *(int(self._contents.kept(*span).sum()) for span in spans)]).tolist()
        order = np.empty(first[-1], np.int32)
        order[row_order(len(order), self._seed, epoch, pool)] = np.arange(len(order), dtype=np.int32)
        return PoolOrder(self._contents, spans, first, order)

    def _epoch(self, epoch: int) -> EpochOrder:
        if (found := self._epochs.get(epoch)) is None:
            found = self._epochs[epoch] = epoch_order(self._rows, self._kept, self._reading, self._seed, epoch)
            _forget(self._epochs)
        return found

    def _kept_in(self, shard: int) -> Ints:
        """Wanted rows of each block of a shard."""
        rows = self._rows[shard]
        start = blocks_of(rows, self._reading.block_rows)
        return np.add.reduceat(self._contents.kept(shard, 0, rows), start, dtype=np.int64)


def unpacked_bits(packed: Bytes, start: int, stop: int) -> npt.NDArray[np.bool_]:
    """Bits ``start`` to ``stop`` as flags."""
    first = start // 8
    return np.unpackbits(packed[first : -(-stop // 8)])[start - 8 * first : stop - 8 * first].astype(bool)


def _forget(found: dict[Any, Any]) -> None:
    """All but the last few; two threads may do so at once."""
    for old in list(found)[:-_REMEMBERED]:
        found.pop(old, None)
