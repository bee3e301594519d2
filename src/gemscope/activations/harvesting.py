"""From text to a store on disk: units of work that can be stopped, resumed and shared out at will.

Notable:
- four things go on at once: a thread reads and tokenizes the next unit, the model runs (see ``passes``), another
  thread writes the last bucket, another syncs the last unit; two buckets are all the memory that grows with the
  sites, and none grows with the text;
- passes go on from one bucket to the next, so that no thread waits for the last one of a bucket;
- a unit counts once its record is there; running again does what is missing, whoever began it or lost it.
"""

import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gemscope.activations import locks
from gemscope.activations.finishing import finish, read_record
from gemscope.activations.passes import AT_ONCE, Passes
from gemscope.activations.plan import HarvestConfig, Plan, check_same, make_plan, resolved
from gemscope.activations.shards import FileRecord, check_size
from gemscope.activations.sources import Source
from gemscope.activations.turns import Turns
from gemscope.activations.units import capacity
from gemscope.core.errors import FormatError, InputError, StorageError
from gemscope.core.files import storage_error, write_json
from gemscope.core.process import kept_memory, quick_turns
from gemscope.core.provenance import collect
from gemscope.models.gemma import Gemma

_ROW_BYTES = 12
_KEEP_FREE = 0.01
_TIMED = 0.2
"""Seconds of a forward pass that tell its speed."""


@dataclass(frozen=True)
class Estimate:
    """What a harvest will take, from a sample of the text."""

    documents: int
    rows: int
    bytes: int
    """On disk, all units."""
    bytes_left: int
    """Of these, in units that are not there yet."""
    bytes_free: int
    """On the disk."""
    memory: int
    """Bytes of the two buckets and of the batches on their way: what the harvest needs beside the model, however much
    text there is. The text of three units comes on top, about 40 bytes a row."""
    seconds: float
    """Of the forward passes that are left, on this device."""


@dataclass(frozen=True)
class HarvestProgress:
    """Where a harvest stands."""

    rows: int
    """Rows of this run so far."""
    rows_total: int
    """Rows of this run, estimated."""
    bytes: int
    """What these rows take on the disk."""
    units: int
    """Units of this run that are whole."""
    units_total: int
    seconds: float
    """Since the first forward pass."""

    @property
    def rows_per_second(self) -> float:
        """Content tokens a second."""
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float:
        """At the mean rate so far."""
        return max(0, self.rows_total - self.rows) / self.rows_per_second if self.rows else float("inf")


Report = Callable[[HarvestProgress], None]


@dataclass(frozen=True)
class Slice:
    """Units ``index``, ``index + count``, ...: one worker's share."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(f"there is no slice {self.index}/{self.count}; the slices of 3 are 0/3, 1/3 and 2/3.")

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """Read ``i/n``."""
        index, _, count = text.partition("/")
        if not index.isdecimal() or not count.isdecimal():
            raise InputError(f"cannot read the slice {text!r}; write for example 0/3.")
        return cls(int(index), int(count))

    def of(self, units: int) -> range:
        """The units of this slice."""
        return range(self.index, units, self.count)


def planned(
    gemma: Gemma, source: Source, folder: Path, config: HarvestConfig, about: Mapping[str, Any] | None = None
) -> Plan:
    """The plan of the store in ``folder``: the one that is there, when it is for the same, else a new one.

    Raises InputError when it is for something else, and StorageError when it cannot be written.
    """
    path = folder / "plan.json"
    if not path.is_file():
        if folder.is_dir() and any(not one.name.startswith(".") for one in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no store; choose another folder with --out.")
        _write_once(path, make_plan(gemma, source, config, about).as_dict())
    plan = Plan.read(folder)
    check_same(plan, resolved(gemma, source, config), folder)
    return plan


def _write_once(path: Path, value: Any) -> None:
    """Write a file unless it is there: of several that come at once the first wins."""
    own = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    write_json(own, value)
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def estimate(gemma: Gemma, plan: Plan, folder: Path) -> Estimate:
    """Size, disk and time, the latter from one timed forward pass."""
    rows = round(plan.documents * plan.rows_per_document)
    left = len(missing_units(folder, plan, Slice())) / max(plan.units, 1)
    row_bytes = plan.row_bytes + _ROW_BYTES
    batch = int(plan.config["batch_tokens"]) * 4 * sum(site.width for site in plan.sites.values())
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise storage_error(folder, error) from error
    return Estimate(
        documents=plan.documents,
        rows=rows,
        bytes=rows * row_bytes,
        bytes_left=round(left * rows * row_bytes),
        bytes_free=free,
        memory=2 * capacity(plan) * row_bytes + 2 * AT_ONCE * batch,
        seconds=left * rows * _seconds_per_token(gemma, plan),
    )


def check_space(expected: Estimate, folder: Path) -> None:
    """Raises StorageError when the store will not fit on the disk."""
    if expected.bytes_left > (1 - _KEEP_FREE) * expected.bytes_free:
        raise StorageError(
            f"the harvest takes {expected.bytes_left / 1e9:,.3f} GB more and {folder} has"
            f" {expected.bytes_free / 1e9:,.3f} GB free; free some space, ask for fewer tokens, sites or layers, or"
            " choose another folder with --out."
        )


def missing_units(folder: Path, plan: Plan, share: Slice) -> list[int]:
    """Units of a slice that have no record yet, or of whose files one is missing or has another size."""
    return [unit for unit in share.of(plan.units) if not _is_there(folder, unit)]


def _is_there(folder: Path, unit: int) -> bool:
    try:
        files = read_record(folder, unit)["files"]
    except FormatError:
        return False
    return all(check_size(folder / name, FileRecord(**one)) is None for name, one in files.items())


def harvest_to(
    folder: Path | str,
    gemma: Gemma,
    source: Source,
    config: HarvestConfig,
    *,
    share: Slice | None = None,
    progress: Report | None = None,
    on_estimate: Callable[[Estimate], None] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Plan:
    """Harvest ``source`` into the store in ``folder``, or what is missing of it, or one slice of that.

    The result depends on the arguments only, bit for bit on the same kind of machine and number of threads: not
    on slices, interruptions or resumes. Raises InputError for another harvest in that folder, in progress or not,
    StorageError when there is no space, and the errors of sites and sources.
    """
    folder, share = Path(folder), share or Slice()
    with locks.writing(folder, share.index, share.count):
        plan = planned(gemma, source, folder, config, about)
        if share.count == 1:
            sweep(folder)
        expected = estimate(gemma, plan, folder)
        if on_estimate is not None:
            on_estimate(expected)
        units = missing_units(folder, plan, share)
        if units:
            check_space(expected, folder)
            note_run(folder, share, units)
            write_units(gemma, source, plan, folder, units, progress)
        if not missing_units(folder, plan, Slice()):
            finish(folder, plan)
    return plan


def sweep(folder: Path) -> None:
    """Remove what a killed run left under temporary names."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_units(
    gemma: Gemma, source: Source, plan: Plan, folder: Path, units: Sequence[int], progress: Report | None = None
) -> None:
    """Harvest some units; on any error what is whole stays and nothing else does."""
    count, whole = _Counter(plan, units, progress), 0
    with (
        Passes(gemma) as passes,
        quick_turns(),
        kept_memory(),
        ThreadPoolExecutor(1, "read") as reading,
        ThreadPoolExecutor(1, "write") as writing,
        ThreadPoolExecutor(1, "sync") as syncing,
    ):
        turns = Turns(gemma, source, plan, folder, writing, syncing)
        try:
            for (job, _), landed in passes.each(
                turns.jobs(units, reading),
                lambda item: item[0].filling.start(item[1], passes),
                lambda item, moved: item[0].filling.land(moved),
            ):
                full = job.filling.add(landed)
                whole += turns.settled()
                count.batch(job.filling.rows, whole)
                if full:
                    count.bucket()
                    turns.write(job)
        except BaseException:
            turns.give_up()
            raise
        turns.wait()
        count.batch(0, whole + turns.settled())


class _Counter:
    """Adds up what is done and reports it."""

    def __init__(self, plan: Plan, units: Sequence[int], report: Report | None) -> None:
        documents = sum(plan.range(unit)[1] - plan.range(unit)[0] for unit in units)
        self._total = round(documents * plan.rows_per_document)
        self._bytes = plan.row_bytes + _ROW_BYTES
        self._units = len(units)
        self._report = report
        self._started = time.perf_counter()
        self._before = self._now = 0

    def batch(self, rows: int, units: int) -> None:
        """``rows`` of the present bucket are through, ``units`` units are whole."""
        self._now = rows
        if self._report is not None:
            done = self._before + rows
            whole = done if units == self._units else max(done, self._total)
            seconds = time.perf_counter() - self._started
            self._report(HarvestProgress(done, whole, done * self._bytes, units, self._units, seconds))

    def bucket(self) -> None:
        """The present bucket is full."""
        self._before += self._now


def _seconds_per_token(gemma: Gemma, plan: Plan) -> float:
    """From batches of made-up tokens, each twice the last, until one takes long enough to be timed."""
    context = min(128, int(plan.config["context"]))
    limit = max(1, int(plan.config["batch_tokens"]) // context)
    rows = 1
    while True:
        batch = gemma.batch([gemma.tokens_of(row) for row in torch.full((rows, context), gemma.vocabulary.bos_id)])
        started = time.perf_counter()
        captured = gemma.capture(batch, plan.sites)
        sum(float(x.view(-1)[0]) for x in captured.acts.values())
        seconds = time.perf_counter() - started
        if rows == limit or (rows > 1 and seconds > _TIMED):
            return seconds / (rows * context)
        rows = min(2 * rows, limit)


def note_run(folder: Path, share: Slice, units: Sequence[int]) -> None:
    """When, where, by what command and on how many threads: the one part of a store that differs from run to run."""
    about = collect(threads=torch.get_num_threads()).as_dict()
    value = {"slice": asdict(share), "units": len(units), "provenance": about}
    write_json(folder / "runs" / f"{time.time_ns()}-{os.getpid()}.json", value)
