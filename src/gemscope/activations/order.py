"""In which order a store is read: a function of seed and epoch, known without reading a row.

- shards are permuted and opened one after the other, so that always about the same few are open (in a circle: those
  open at the end are opened before the beginning);
- the blocks of the open shards come at random, and runs of them make *pools*;
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

BLOCKS, ROWS, LIVE_ROWS, LIVE_TEXTS, LIVE_UNITS = range(1, 6)
"""Last word of a seed. Each use has its own: a permutation that is drawn twice with one seed undoes itself. (A bucket's
is [seed, unit, bucket], that is 0.)"""

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
    """Shards that a pool draws from, about."""
    pool_rows: int = 1 << 17
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
    random = np.random.default_rng([seed, epoch, 0, BLOCKS])
    count = len(shard_rows)
    rank = random.permutation(count)
    starts = [blocks_of(rows, reading.block_rows) for rows in shard_rows]
    none = np.empty(0, dtype=np.int64)
    start = np.concatenate([none, *starts])
    shard = np.repeat(np.arange(count), [len(one) for one in starts])
    rows = np.concatenate([none, *kept])
    stop = np.minimum(start + reading.block_rows, np.array(shard_rows, dtype=np.int64)[shard])
    # a shard is open from its rank on, for as long as it takes to open the next few; around the end and on
    time = (rank[shard] + min(reading.open_shards, count) * random.random(len(shard))) % max(count, 1)
    order = np.argsort(time, kind="stable")
    order = order[rows[order] > 0]
    return EpochOrder(shard[order], start[order], stop[order], _cuts(rows[order], reading.pool_rows))


def row_order(rows: int, seed: int, epoch: int, pool: int) -> Ints:
    """The permutation of a pool's rows."""
    return np.random.default_rng([seed, epoch, pool, ROWS]).permutation(rows)


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
