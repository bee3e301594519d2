"""Pools of a store's rows: long runs of neighbouring rows, read by several threads into memory that is used again."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from gemscope.activations.order import EpochOrder, Ints, Reading, blocks_of, epoch_order
from gemscope.activations.places import Folder, Place
from gemscope.activations.plan import Plan
from gemscope.activations.shards import ITEM_BYTES, FileRecord, acts_header, rows_header
from gemscope.activations.stream import Origin, Pool
from gemscope.activations.units import TORCH_DTYPE, acts_name, rows_name
from gemscope.core.arrays import Tensor
from gemscope.core.errors import FormatError, InputError
from gemscope.core.sites import Site

Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]

_ORIGIN = ("doc", "pos", "token")
_Span = tuple[int, int, int]
"""(shard, first row, one after the last)."""


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

    def kept(self, shard: int, start: int, stop: int) -> Flags | None:
        """Which of some rows are wanted; None: all."""
        return None if self.keep is None else unpacked_bits(self.keep[shard], start, stop)


@dataclass(frozen=True)
class _Job:
    """Bytes to be read."""

    handle: int
    offset: int
    into: Bytes
    """[rows, row bytes], what is wanted of it."""
    rows: int
    """Rows to be read."""
    keep: Flags | None


@dataclass(eq=False)
class _Handles:
    """Open files, until the pool is read."""

    place: Place
    stack: ExitStack
    opened: dict[str, int] = field(default_factory=dict[str, int])

    def get(self, shard: Shard, name: str) -> int:
        """The file's descriptor."""
        if name not in self.opened:
            path = self.place.path(name, shard.files[name])
            try:
                handle = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise FormatError(f"cannot read {path} ({error.strerror}); verify the store.") from error
            self.stack.callback(os.close, handle)
            self.opened[name] = handle
        return self.opened[name]


class StoreReader:
    """Gives the pools of one stream."""

    def __init__(
        self, contents: Contents, sites: Sequence[Site], seed: int, reading: Reading, threads: int, origin: bool
    ) -> None:
        if threads < 1:
            raise InputError(f"{threads} threads cannot read; use at least 1.")
        self._contents, self._sites, self._seed, self._reading = contents, list(sites), seed, reading
        self._columns = [*map(str, sites), *(_ORIGIN if origin else ())]
        self._workers = ThreadPoolExecutor(threads, "shard")
        self._parts = 4 * threads
        self._rows = [shard.rows for shard in contents.shards]
        self._kept = [self._kept_in(number) for number in range(len(self._rows))]
        self._order: tuple[int, EpochOrder] | None = None
        self._announced: tuple[int, int] | None = None
        self._buffers: list[dict[str, Bytes]] = [{}, {}]
        self._turn = 0

    def pools(self, epoch: int) -> int:
        """How many pools an epoch has."""
        return self._epoch(epoch).pools

    def load(self, epoch: int, pool: int) -> Pool:
        """Read the runs of a pool; raises FormatError when a file cannot be read or ends too early."""
        spans = self._spans(epoch, pool)
        keeps = [self._contents.kept(*span) for span in spans]
        sizes = [b - a if keep is None else int(keep.sum()) for (_, a, b), keep in zip(spans, keeps, strict=True)]
        at = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        buffers = self._room(at[-1])
        with ExitStack() as stack:
            handles = _Handles(self._contents.place, stack)
            jobs: list[_Job] = []
            for span, keep, low, high in zip(spans, keeps, at, at[1:], strict=False):
                for column in self._columns:
                    handle, offset, _ = self._locate(column, span, handles)
                    jobs.append(_Job(handle, offset, buffers[column][low:high], span[2] - span[1], keep))
            if self._announced != (epoch, pool):
                self._announce(epoch, pool, handles)
            chunk = -(-len(jobs) // self._parts) or 1
            parts = [self._workers.submit(_read_all, jobs[i : i + chunk]) for i in range(0, len(jobs), chunk)]
            stack.callback(wait, parts)  # no file is closed while it is read
            if isinstance(self._contents.place, Folder) and pool + 1 < self.pools(epoch):
                self._announce(epoch, pool + 1, handles)
            for part in parts:
                part.result()
        return self._pool(buffers, at[-1])

    def _spans(self, epoch: int, pool: int) -> list[_Span]:
        """The stretches of rows of a pool."""
        runs = self._epoch(epoch).runs(pool)
        return list(zip(runs.shard.tolist(), runs.start.tolist(), runs.stop.tolist(), strict=True))

    def _announce(self, epoch: int, pool: int, handles: _Handles) -> None:
        """Let the disk fetch a pool already: it is at its fastest with much to do."""
        self._announced = epoch, pool
        if not hasattr(os, "posix_fadvise"):
            return
        for span in self._spans(epoch, pool):
            for column in self._columns:
                handle, offset, size = self._locate(column, span, handles)
                os.posix_fadvise(handle, offset, size, os.POSIX_FADV_WILLNEED)

    def _pool(self, buffers: Mapping[str, Bytes], rows: int) -> Pool:
        def tensor(column: str, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(buffers[column]).view(dtype)

        dtype = TORCH_DTYPE[self._contents.plan.dtype]
        acts = {site: tensor(str(site), dtype) for site in self._sites}
        if _ORIGIN[0] not in self._columns:
            return Pool(rows, acts, None)
        doc, pos, token = (tensor(name, torch.int32)[:rows, 0] for name in _ORIGIN)
        return Pool(rows, acts, Origin(doc, pos, token))

    def _locate(self, column: str, span: _Span, handles: _Handles) -> tuple[int, int, int]:
        """(open file, first byte, number of bytes) of a column's stretch of rows."""
        number, start, stop = span
        shard, plan, width = self._contents.shards[number], self._contents.plan, self._row_bytes(column)
        if column in _ORIGIN:
            name, head = rows_name(shard.unit), len(rows_header(shard.rows)) + _ORIGIN.index(column) * 4 * shard.rows
        else:
            site = Site.parse(column)
            name, head = acts_name(site, shard.unit), len(acts_header(shard.rows, plan.sites[site].width, plan.dtype))
        return handles.get(shard, name), head + start * width, (stop - start) * width

    def _row_bytes(self, column: str) -> int:
        plan = self._contents.plan
        return 4 if column in _ORIGIN else plan.sites[Site.parse(column)].width * ITEM_BYTES[plan.dtype]

    def _room(self, rows: int) -> dict[str, Bytes]:
        """The memory that was not used for the last pool, enlarged if need be."""
        self._turn = 1 - self._turn
        mine = self._buffers[self._turn]
        if not mine or any(len(x) < rows for x in mine.values()):
            mine.clear()
            room = max(rows, self._reading.pool_rows if rows > self._reading.pool_rows // 2 else rows)
            for column in self._columns:
                mine[column] = np.empty((room + self._reading.block_rows, self._row_bytes(column)), np.uint8)
        return mine

    def _epoch(self, epoch: int) -> EpochOrder:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(self._rows, self._kept, self._reading, self._seed, epoch)
        return self._order[1]

    def _kept_in(self, shard: int) -> Ints:
        """Wanted rows of each block of a shard."""
        rows = self._rows[shard]
        start = blocks_of(rows, self._reading.block_rows)
        if (keep := self._contents.kept(shard, 0, rows)) is not None:
            return np.add.reduceat(keep, start, dtype=np.int64)
        return np.minimum(start + self._reading.block_rows, rows) - start


def unpacked_bits(packed: Bytes, start: int, stop: int) -> Flags:
    """Bits ``start`` to ``stop`` as flags."""
    first = start // 8
    return np.unpackbits(packed[first : -(-stop // 8)])[start - 8 * first : stop - 8 * first].astype(bool)


def _read_all(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        if job.keep is None:
            _read(job.handle, job.offset, job.into)
        elif len(job.into):
            all_rows = np.empty((job.rows, job.into.shape[1]), np.uint8)
            _read(job.handle, job.offset, all_rows)
            np.compress(job.keep, all_rows, axis=0, out=job.into)


def _read(handle: int, offset: int, into: Bytes) -> None:
    view = into.data.cast("B")
    while view:
        try:
            count = os.preadv(handle, [view], offset)
        except OSError as error:
            raise FormatError(f"cannot read a shard ({error.strerror}); verify the store.") from error
        if count == 0:
            raise FormatError("a shard ends before its last row; it was truncated while open: verify the store.")
        view, offset = view[count:], offset + count
