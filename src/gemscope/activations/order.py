"""In which order a store is read: a function of seed and epoch, known without reading a row.

- shards are permuted; a few at a time are open;
- the blocks of the open shards are permuted, and runs of them make *pools*;
- the rows of a pool, all in memory at once, are permuted.

Rows were shuffled in buckets when they were written, so a pool is a random sample of the open shards, and
whatever is read from the disk is a long run of neighbouring rows. A place in the stream is three small numbers
(epoch, pool, row), from which reading goes on without looking back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gemscope.core.errors import FormatError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, order=True)
class Position:
    """A place in a stream: the next row to come."""

    epoch: int = 0
    pool: int = 0
    row: int = 0
    """In the permuted pool."""

    def as_dict(self) -> dict[str, int]:
        """Plain JSON values."""
        return {"epoch": self.epoch, "pool": self.pool, "row": self.row}

    @classmethod
    def of_dict(cls, value: Any) -> "Position":
        """Back from JSON; raises FormatError for anything else."""
        try:
            return cls(int(value["epoch"]), int(value["pool"]), int(value["row"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{value!r} is no position in a stream; it has epoch, pool and row.") from error


@dataclass(frozen=True)
class Reading:
    """How much is read and mixed at a time; part of the order, so a stream goes on only with the same."""

    block_rows: int = 512
    """Neighbouring rows that are read together."""
    open_shards: int = 8
    """Shards that a pool draws from."""
    pool_rows: int = 1 << 18
    """Rows mixed at a time; two pools are in memory."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Stretches of rows, as they are read."""

    shard: Ints
    start: Ints
    stop: Ints


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The blocks of one epoch, in order, cut into pools."""

    shard: Ints
    start: Ints
    stop: Ints
    first: Ints
    """Pool p is blocks ``first[p]`` to ``first[p + 1]``."""

    @property
    def pools(self) -> int:
        """Number of pools."""
        return len(self.first) - 1

    def runs(self, pool: int) -> Runs:
        """The blocks of a pool in the order of the disk, neighbours joined."""
        at = slice(int(self.first[pool]), int(self.first[pool + 1]))
        order = np.lexsort((self.start[at], self.shard[at]))
        shard, start, stop = (x[at][order] for x in (self.shard, self.start, self.stop))
        begins = np.ones(len(shard), dtype=bool)
        begins[1:] = (shard[1:] != shard[:-1]) | (start[1:] != stop[:-1])
        ends = np.append(begins[1:], True) if len(begins) else begins
        return Runs(shard[begins], start[begins], stop[ends])


def blocks_of(rows: int, block_rows: int) -> Ints:
    """Where the blocks of a shard begin."""
    return np.arange(0, rows, block_rows, dtype=np.int64)


def epoch_order(shard_rows: Sequence[int], kept: Sequence[Ints], reading: Reading, seed: int, epoch: int) -> EpochOrder:
    """``kept`` says for each block of each shard how many of its rows are wanted; blocks without any are not read."""
    random = np.random.default_rng([seed, epoch])
    parts: list[tuple[Ints, Ints, Ints, Ints]] = []
    order = random.permutation(len(shard_rows))
    for at in range(0, len(order), reading.open_shards):
        window = [int(shard) for shard in order[at : at + reading.open_shards]]
        start = [blocks_of(shard_rows[shard], reading.block_rows) for shard in window]
        stop = [np.minimum(s + reading.block_rows, shard_rows[n]) for s, n in zip(start, window, strict=True)]
        number = [np.full(len(s), n, dtype=np.int64) for s, n in zip(start, window, strict=True)]
        columns = [np.concatenate(c) for c in (number, start, stop, [kept[n] for n in window])]
        wanted = random.permutation(np.flatnonzero(columns[3]))
        parts.append((columns[0][wanted], columns[1][wanted], columns[2][wanted], columns[3][wanted]))
    none = np.empty(0, dtype=np.int64)
    shard, begin, end, rows = (np.concatenate(c) for c in zip((none, none, none, none), *parts, strict=True))
    return EpochOrder(shard, begin, end, _cuts(rows, reading.pool_rows))


def row_order(rows: int, seed: int, epoch: int, pool: int) -> Ints:
    """The permutation of a pool's rows."""
    return np.random.default_rng([seed, epoch, pool]).permutation(rows)


def _cuts(rows: Ints, pool_rows: int) -> Ints:
    """First block of each pool: as few pools as possible, about equally many rows in each."""
    total = int(rows.sum())
    if total == 0:
        return np.zeros(1, dtype=np.int64)
    count = -(-total // pool_rows)
    before = np.cumsum(rows) - rows
    pool = np.minimum(before * count // total, count - 1)
    edges = np.searchsorted(pool, np.arange(count + 1))
    return np.unique(edges).astype(np.int64)
