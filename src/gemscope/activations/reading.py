"""Pools of a store's rows: long runs of neighbours, read by several threads, each row to its place in a batch."""

import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from gemscope.activations.lending import Bytes, Lender
from gemscope.activations.order import Reading
from gemscope.activations.places import Folder, Place
from gemscope.activations.pools import Contents, PoolOrder, PoolOrders, Shard, Span
from gemscope.activations.scatter import Places
from gemscope.activations.shards import ITEM_BYTES, acts_header, rows_header
from gemscope.activations.stream import Cut, Origin, Part, Pool
from gemscope.activations.units import TORCH_DTYPE, acts_name, rows_name
from gemscope.core.arrays import Tensor
from gemscope.core.errors import FormatError, InputError
from gemscope.core.sites import Site

_ORIGIN = ("doc", "pos", "token")
_Extent = tuple[int, int, int]
"""(open file, first byte, number of bytes)."""
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class _Job:
    """A span to be read: where its rows go, and where they are."""

    order: PoolOrder
    number: int
    places: Places
    handle: int
    offset: int


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
        self._contents, self._sites, self._origin = contents, list(sites), origin
        self._columns = [*map(str, sites), *(_ORIGIN if origin else ())]
        self._orders = PoolOrders(contents, seed, reading)
        self._workers = ThreadPoolExecutor(threads, "shard")
        self._shares = 4 * threads
        self._lender = Lender(2 * reading.pool_rows * sum(map(self._row_bytes, self._columns)))
        self._layouts: dict[tuple[str, int], tuple[str, int, int]] = {}
        self._announced: tuple[int, int] | None = None

    def pools(self, epoch: int) -> int:
        """How many pools an epoch has."""
        return self._orders.pools(epoch)

    def load(self, epoch: int, pool: int, cut: Cut) -> Pool:
        """Read the runs of a pool; raises FormatError when a file cannot be read or ends too early."""
        order = self._orders.get(epoch, pool)
        sizes = cut.sizes(order.rows)
        memory = {column: self._memory(sizes, column, cut.size) for column in self._columns}
        left = range(pool + 1, self.pools(epoch))
        with ExitStack() as stack:
            handles = _Handles(self._contents.place, stack)
            now = self._jobs(order, cut, memory, handles)
            if self._announced != (epoch, pool):
                _announce(self._extents(order, handles))
            soon: list[_Extent] = []
            if left and isinstance(self._contents.place, Folder):
                soon = self._extents(self._orders.get(epoch, left[0]), handles)
                self._announced = epoch, left[0]
            both = zip(_shared(soon, self._shares), _shared(now, self._shares), strict=True)
            under_way = [self._workers.submit(_work, *one) for one in both]
            stack.callback(wait, under_way)  # no file is closed while it is read
            for later in left[1:2]:
                self._orders.get(epoch, later)  # made while others read, remembered for the next pool
            for one in under_way:
                one.result()
        return Pool(order.rows, deque(self._part({c: memory[c][i] for c in memory}) for i in range(len(sizes))))

    def _memory(self, sizes: Sequence[int], column: str, whole: int) -> list[Bytes]:
        """Room for each part of a pool; that of whole batches has been used before."""
        width = self._row_bytes(column)
        return [self._lender.rows(n, width) if n == whole else np.empty((n, width), np.uint8) for n in sizes]

    def _jobs(self, order: PoolOrder, cut: Cut, memory: Mapping[str, Sequence[Bytes]], handles: _Handles) -> list[_Job]:
        jobs: list[_Job] = []
        for column in self._columns:
            places = Places(memory[column], self._row_bytes(column), cut.row)
            for number, span in enumerate(order.spans):
                handle, offset, _ = self._locate(column, span, handles)
                jobs.append(_Job(order, number, places, handle, offset))
        return jobs

    def _extents(self, order: PoolOrder, handles: _Handles) -> list[_Extent]:
        return [self._locate(column, span, handles) for column in self._columns for span in order.spans]

    def _part(self, memory: Mapping[str, Bytes]) -> Part:
        def tensor(column: str, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(memory[column]).view(dtype)

        acts = {site: tensor(str(site), TORCH_DTYPE[self._contents.plan.dtype]) for site in self._sites}
        return acts, Origin(*(tensor(name, torch.int32)[:, 0] for name in _ORIGIN)) if self._origin else None

    def _locate(self, column: str, span: Span, handles: _Handles) -> _Extent:
        number, start, stop = span
        if (layout := self._layouts.get((column, number))) is None:
            layout = self._layouts[column, number] = self._layout(column, self._contents.shards[number])
        name, head, width = layout
        return handles.get(self._contents.shards[number], name), head + start * width, (stop - start) * width

    def _layout(self, column: str, shard: Shard) -> tuple[str, int, int]:
        """(file, first byte, bytes a row) of a column of a shard."""
        width = self._row_bytes(column)
        if column in _ORIGIN:
            return rows_name(shard.unit), len(rows_header(shard.rows)) + _ORIGIN.index(column) * 4 * shard.rows, width
        site, plan = Site.parse(column), self._contents.plan
        return acts_name(site, shard.unit), len(acts_header(shard.rows, plan.sites[site].width, plan.dtype)), width

    def _row_bytes(self, column: str) -> int:
        plan = self._contents.plan
        return 4 if column in _ORIGIN else plan.sites[Site.parse(column)].width * ITEM_BYTES[plan.dtype]


def _shared(all_: Sequence[_T], count: int) -> list[Sequence[_T]]:
    """In order, about equally many in each share."""
    return [all_[len(all_) * i // count : len(all_) * (i + 1) // count] for i in range(count)]


def _work(soon: Sequence[_Extent], now: Sequence[_Job]) -> None:
    """The disk is told what comes next before what is there is copied: it is at its fastest with much to do."""
    _announce(soon)
    for job in now:
        job.places.read(job.handle, job.offset, job.order.place(job.number))


def _announce(extents: Sequence[_Extent]) -> None:
    if hasattr(os, "posix_fadvise"):
        for handle, offset, size in extents:
            os.posix_fadvise(handle, offset, size, os.POSIX_FADV_WILLNEED)
