"""One unit of a harvest: its documents through the model into shuffled buckets, and its files.

Notable:
- a row's place in its bucket is known before the forward pass, so that rows go straight to where they belong:
  the shuffle costs no pass of its own, and is the same for all sites;
- the copy to the host of one batch overlaps with the forward pass of the next (on CUDA), the writing of one
  bucket with the filling of the next (another thread, see ``turns``).
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gemscope.activations import statistics
from gemscope.activations.passes import Passes, Scratch
from gemscope.activations.pieces import PieceBatch, Pieces, batches
from gemscope.activations.plan import Plan
from gemscope.activations.shards import (
    FileRecord,
    ShardWriter,
    acts_header,
    header,
    rows_header,
    tensor_bytes,
)
from gemscope.activations.statistics import SiteStatistics
from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.core.files import atomic_path, write_json
from gemscope.core.sites import Site
from gemscope.models.gemma import Gemma

TORCH_DTYPE = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(eq=False)
class Bucket:
    """Room for shuffled rows of all sites; used again for one bucket after the other."""

    data: dict[Site, Tensor]
    """[capacity, width] a site."""
    rows: int = 0
    """How many of them are filled."""
    doc: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    pos: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    token: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    statistics: dict[Site, SiteStatistics] = field(default_factory=dict[Site, SiteStatistics])
    outliers: int = 0

    @classmethod
    def empty(cls, plan: Plan, capacity: int) -> "Bucket":
        """Room for ``capacity`` rows."""
        dtype = TORCH_DTYPE[plan.dtype]
        return cls({site: torch.empty(capacity, one.width, dtype=dtype) for site, one in plan.sites.items()})


@dataclass(frozen=True, eq=False)
class _Moved:
    """Rows of one batch on their way to the host."""

    rows: dict[Site, Tensor]
    sums: dict[Site, Tensor]
    outlier: Bool[Tensor, "rows"]
    place: Int[Tensor, "rows"]
    ready: list[torch.cuda.Event | torch.Event]
    """One for every CUDA device that rows come from."""


def capacity(plan: Plan) -> int:
    """Rows that a bucket may have: a piece is never torn apart."""
    return plan.bucket_rows + int(plan.config["context"])


def bucket_pieces(pieces: Pieces, bucket_rows: int) -> Iterator[npt.NDArray[np.int64]]:
    """The pieces of each bucket of a unit: one after the other, about equally many rows."""
    ends = np.cumsum(pieces.rows)
    total = int(ends[-1]) if len(ends) else 0
    count = -(-total // bucket_rows)
    cuts = [0, *(int(np.searchsorted(ends, total * i / count)) + 1 for i in range(1, count)), len(ends)]
    for low, high in pairwise(cuts):
        if high > low:
            yield np.arange(low, high, dtype=np.int64)


def shuffle_seed(plan: Plan, unit: int, bucket: int) -> list[int]:
    """Seed of a bucket's permutation."""
    return [int(plan.config["seed"]), unit, bucket]


class Filling:
    """A bucket that the rows of some pieces go into, permuted, and where they stand."""

    def __init__(
        self,
        gemma: Gemma,
        plan: Plan,
        pieces: Pieces,
        chosen: npt.NDArray[np.int64],
        seed: Sequence[int],
        into: Bucket,
    ) -> None:
        self.bucket = into
        self.rows = 0
        """Rows that are through."""
        self._plan, self._pieces, self._chosen = plan, pieces, chosen
        counts = pieces.rows[chosen]
        total = int(counts.sum())
        self._place = torch.from_numpy(np.random.default_rng(list(seed)).permutation(total))
        self._where = np.zeros(len(pieces), dtype=np.int64)
        self._where[chosen] = np.concatenate([[0], np.cumsum(counts)])[:-1]
        self._dropped = torch.zeros(total, dtype=torch.bool)
        self._sums: list[tuple[int, Mapping[Site, Tensor]]] = []
        self.batches = batches(gemma, pieces, chosen, int(plan.config["batch_tokens"]), plan.row_tokens)

    def run(self, passes: Passes) -> None:
        """All of it."""
        for _, landed in passes.each(
            self.batches, lambda one: self.start(one, passes), lambda _, moved: self.land(moved)
        ):
            self.add(landed)

    def start(self, one: PieceBatch, passes: Passes) -> _Moved:
        """The forward pass of a batch."""
        size = self._pieces.rows[one.pieces]
        at = np.arange(size.sum()) + np.repeat(self._where[one.pieces] - (np.cumsum(size) - size), size)
        return _start(passes.gemma, self._plan, one, self._place[torch.from_numpy(at)], passes.scratch)

    def land(self, moved: _Moved) -> tuple[int, int, Mapping[Site, Tensor]]:
        """Put rows that have arrived into their places, which are no other batch's; their number, how many of them are
        kept and the sums over these.
        """
        for event in moved.ready:
            event.synchronize()
        for site, x in moved.rows.items():
            _whole_rows(self.bucket.data[site])[moved.place.numpy()] = _whole_rows(x)
        self._dropped[moved.place] = moved.outlier
        kept = len(moved.place) - (int(moved.outlier.sum()) if self._plan.config["drop_outliers"] else 0)
        return len(moved.place), kept, moved.sums

    def add(self, landed: tuple[int, int, Mapping[Site, Tensor]]) -> bool:
        """Take what ``land`` gave, in the order of the batches; whether these were the last rows, and all is ready."""
        self.rows += landed[0]
        self._sums.append(landed[1:])
        if self.rows < len(self._place):
            return False
        _finish(self._plan, self._pieces, self._chosen, self._place, self.bucket, self._dropped, self._sums)
        return True


@torch.no_grad()
def _start(gemma: Gemma, plan: Plan, one: PieceBatch, place: Int[Tensor, "rows"], scratch: Scratch) -> _Moved:
    """The forward pass of a batch, and its rows on their way to the host."""
    captured = gemma.capture(one.batch, plan.sites)
    flat: dict[torch.device, Tensor] = {}
    rows: dict[Site, Tensor] = {}
    sums: dict[Site, Tensor] = {}
    outlier = torch.zeros(len(one.flat), dtype=torch.bool, device=gemma.device)
    for site, planned in plan.sites.items():
        x = captured[site]
        at = flat.setdefault(x.device, one.flat.to(x.device, non_blocking=True))
        narrow = scratch.like(x.flatten(0, 1), TORCH_DTYPE[plan.dtype]).copy_(x.flatten(0, 1))
        rows[site] = narrow.index_select(0, at)
        norms, sums[site] = statistics.of_rows(rows[site], scratch.like(rows[site], torch.float32))
        outlier |= (norms > plan.config["outlier_factor"] * planned.median_norm).to(gemma.device)
    if plan.config["drop_outliers"]:
        for site, x in rows.items():
            kept = x[~outlier.to(x.device)]
            sums[site] = statistics.of_rows(kept, scratch.like(kept, torch.float32))[1]
    devices = {x.device for x in (*rows.values(), outlier)}
    return _Moved(
        {site: _to_host(x) for site, x in rows.items()},
        {site: _to_host(x) for site, x in sums.items()},
        _to_host(outlier),
        place,
        [torch.cuda.current_stream(device).record_event() for device in devices if device.type == "cuda"],
    )


def _to_host(x: Tensor) -> Tensor:
    """``x`` on the CPU, the copy from CUDA being under way."""
    if x.device.type != "cuda":
        return x.cpu()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _whole_rows(x: Float[Tensor, "rows width"]) -> npt.NDArray[Any]:
    """Each row as one value: moved by one copy of memory, where ``index_copy_`` goes through an iterator."""
    return x.view(torch.uint8).numpy().view(f"V{x.shape[1] * x.element_size()}")[:, 0]


def _finish(
    plan: Plan,
    pieces: Pieces,
    chosen: npt.NDArray[np.int64],
    place: Int[Tensor, "total"],
    into: Bucket,
    dropped: Bool[Tensor, "total"],
    sums: Sequence[tuple[int, Mapping[Site, Tensor]]],
) -> None:
    """Say where the rows come from, leave out outliers if asked, add the statistics up."""
    low, high = int(pieces.bounds[chosen[0]]), int(pieces.bounds[chosen[-1] + 1])
    content = pieces.content[low:high]
    docs = np.repeat(pieces.doc[chosen], pieces.rows[chosen])
    at = torch.empty_like(place)
    at[place] = torch.arange(len(place))
    order = at[~dropped].numpy() if plan.config["drop_outliers"] else at.numpy()
    into.rows = len(order)
    into.outliers = int(dropped.sum())
    into.doc = docs.astype(np.int32)[order]
    into.pos = pieces.pos[low:high][content].to(torch.int32).numpy()[order]
    into.token = pieces.ids[low:high][content].to(torch.int32).numpy()[order]
    if into.rows < len(place):
        keep = (~dropped).nonzero()[:, 0]
        for x in into.data.values():
            x[: len(keep)] = x.index_select(0, keep)
    into.statistics = {
        site: statistics.added((statistics.unpacked(rows, one[site]) for rows, one in sums), planned.width)
        for site, planned in plan.sites.items()
    }


def acts_name(site: Site, unit: int) -> str:
    """Path of a shard of activations inside a store."""
    return f"acts/{site}/{unit:06d}.safetensors"


def rows_name(unit: int) -> str:
    """Path of the file that says where the rows of a unit come from."""
    return f"rows/{unit:06d}.safetensors"


def statistics_name(unit: int) -> str:
    """Path of a unit's sums."""
    return f"statistics/{unit:06d}.safetensors"


def record_name(unit: int) -> str:
    """Path of a unit's record: once it is there, the unit is whole."""
    return f"units/{unit:06d}.json"


def statistics_header(widths: Mapping[Site, int]) -> bytes:
    """Header of a file of sums: ``total`` and ``squares`` of every site, in float64."""
    return header({f"{name}.{site}": ("float64", (w,)) for site, w in widths.items() for name in ("total", "squares")})


class UnitFiles:
    """The files of one unit, under temporary names until ``finish``.

    The constructor and every method raise StorageError when something cannot be written.
    """

    def __init__(self, folder: Path, plan: Plan, unit: int) -> None:
        self._folder, self._plan, self._unit = folder, plan, unit
        self._stack = ExitStack()
        self._buckets: list[int] = []
        self._statistics: list[dict[Site, SiteStatistics]] = []
        self._sources: list[tuple[npt.NDArray[np.int32], ...]] = []
        self._outliers = 0
        with self._undone_on_failure():
            self._acts = {
                site: self._open(acts_name(site, unit), len(acts_header(0, one.width, plan.dtype)))
                for site, one in plan.sites.items()
            }

    def append(self, bucket: Bucket) -> None:
        """Write a bucket's rows."""
        with self._undone_on_failure():
            for site, writer in self._acts.items():
                writer.append(tensor_bytes(bucket.data[site][: bucket.rows].view(torch.uint8).numpy()))
        self._buckets.append(bucket.rows)
        self._statistics.append(bucket.statistics)
        self._sources.append((bucket.doc, bucket.pos, bucket.token))
        self._outliers += bucket.outliers

    def finish(self, skipped: int) -> dict[str, Any]:
        """Close, sync and rename everything, the record last; gives the record."""
        plan, unit, rows = self._plan, self._unit, sum(self._buckets)
        sums = {
            site: statistics.added((one[site] for one in self._statistics), planned.width)
            for site, planned in plan.sites.items()
        }
        files: dict[str, FileRecord] = {}
        with self._undone_on_failure():
            for site, writer in self._acts.items():
                files[acts_name(site, unit)] = writer.finish(acts_header(rows, plan.sites[site].width, plan.dtype))
            none = np.empty(0, np.int32)
            columns = [np.concatenate(parts) for parts in zip((none, none, none), *self._sources, strict=True)]
            files[rows_name(unit)] = self._whole(rows_name(unit), rows_header(rows), columns)
            vectors = [vector for one in sums.values() for vector in (one.total, one.squares)]
            head = statistics_header({site: one.width for site, one in plan.sites.items()})
            files[statistics_name(unit)] = self._whole(statistics_name(unit), head, vectors)
        self._stack.close()
        record = {
            "unit": unit,
            "documents": list(plan.range(unit)),
            "rows": rows,
            "buckets": self._buckets,
            "skipped_documents": skipped,
            "outliers": self._outliers,
            "statistics": {str(site): one.scalars() for site, one in sums.items()},
            "files": {name: one.as_dict() for name, one in files.items()},
        }
        write_json(self._folder / record_name(unit), record)
        return record

    def abort(self) -> None:
        """Remove what was written."""
        with suppress(_Stopped), self._undone_on_failure():
            raise _Stopped

    def _open(self, name: str, reserved: int) -> ShardWriter:
        path = self._stack.enter_context(atomic_path(self._folder / name))
        writer = ShardWriter(path, reserved)
        self._stack.callback(writer.close)
        return writer

    def _whole(self, name: str, head: bytes, arrays: Sequence[npt.NDArray[Any]]) -> FileRecord:
        writer = self._open(name, len(head))
        for array in arrays:
            writer.append(tensor_bytes(array))
        return writer.finish(head)

    @contextmanager
    def _undone_on_failure(self) -> Generator[None]:
        """On a failure every temporary file is removed, before the error goes on its way."""
        try:
            yield
        except BaseException as error:
            if not self._stack.__exit__(type(error), error, error.__traceback__):
                raise


class _Stopped(Exception):
    """The unit is given up."""
