"""Two buckets in turn: one is filled while the other is written, unit after unit.

A unit is finished, or given up, by the thread that syncs, after all that was written before; so that it never is both.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemscope.activations.pieces import PieceBatch, Pieces, encode
from gemscope.activations.plan import Plan
from gemscope.activations.sources import Source
from gemscope.activations.units import Bucket, Filling, UnitFiles, bucket_pieces, capacity, shuffle_seed
from gemscope.core.errors import InputError
from gemscope.models.gemma import Gemma


@dataclass(frozen=True, eq=False)
class Job:
    """A bucket to fill, and where it goes."""

    filling: Filling
    files: UnitFiles
    turn: int
    """Which of the two buckets it is."""
    skipped: int | None
    """With the last bucket of a unit: documents that the unit skipped."""


class Turns:
    """What is filled, written and synced of a harvest."""

    def __init__(
        self,
        gemma: Gemma,
        source: Source,
        plan: Plan,
        folder: Path,
        writing: ThreadPoolExecutor,
        syncing: ThreadPoolExecutor,
    ) -> None:
        self._gemma, self._source, self._plan, self._folder = gemma, source, plan, folder
        self._writing, self._syncing = writing, syncing
        self._buckets = [Bucket.empty(plan, capacity(plan)) for _ in range(2)]
        self._written: list[Future[None] | None] = [None, None]
        self._full = [True, True]
        """Which buckets no pass is to fill any more."""
        self._unfinished = list[UnitFiles]()
        self._syncs = deque[Future[dict[str, Any]]]()

    def jobs(self, units: Sequence[int], reading: ThreadPoolExecutor) -> Iterator[tuple[Job, PieceBatch] | None]:
        """Every batch and the bucket that it goes to; None while the next bucket is still being filled."""
        turn, upcoming = 0, reading.submit(self._read, units[0])
        for place, unit in enumerate(units):
            while upcoming.exception() is not None and not all(self._full):
                yield None  # what was begun before is not lost
            pieces = upcoming.result()
            if place + 1 < len(units):
                upcoming = reading.submit(self._read, units[place + 1])
            self._unfinished.append(files := UnitFiles(self._folder, self._plan, unit))
            parts = list(bucket_pieces(pieces, self._plan.bucket_rows))
            for number, chosen in enumerate(parts):
                while not self._full[turn]:
                    yield None
                if (before := self._written[turn]) is not None:
                    before.result()
                self._full[turn] = False
                seed = shuffle_seed(self._plan, unit, number)
                filling = Filling(self._gemma, self._plan, pieces, chosen, seed, self._buckets[turn])
                job = Job(filling, files, turn, pieces.skipped if number == len(parts) - 1 else None)
                yield from ((job, one) for one in filling.batches)
                turn = 1 - turn
            if not parts:
                self._finish(files, pieces.skipped)

    def write(self, job: Job) -> None:
        """Its bucket is full."""
        self._full[job.turn] = True
        self._written[job.turn] = self._writing.submit(job.files.append, job.filling.bucket)
        if job.skipped is not None:
            self._finish(job.files, job.skipped)

    def settled(self) -> int:
        """How many units became whole since it was asked last; the error of one that did not is raised at once."""
        count = 0
        while self._syncs and self._syncs[0].done():
            self._syncs.popleft().result()
            count += 1
        return count

    def wait(self) -> None:
        """Until every unit is whole, or has failed."""
        wait(self._syncs)

    def give_up(self) -> None:
        """Remove what there is of units that are not all written."""
        for files in self._unfinished:
            self._syncing.submit(_give_up, files, self._appends())

    def _finish(self, files: UnitFiles, skipped: int) -> None:
        self._syncs.append(self._syncing.submit(_finish_unit, files, skipped, self._appends()))
        self._unfinished.remove(files)

    def _appends(self) -> list[Future[None]]:
        return [one for one in self._written if one is not None]

    def _read(self, unit: int) -> Pieces:
        start, stop = self._plan.range(unit)
        texts = list(self._source.read(start, stop))
        if len(texts) < stop - start:
            raise InputError(
                f"the text has changed: documents {start} to {stop} were planned and {len(texts)} of them are there;"
                " give the same text again, or choose another folder."
            )
        return encode(self._gemma, texts, start, int(self._plan.config["context"]))


def _finish_unit(files: UnitFiles, skipped: int, appends: Sequence[Future[None]]) -> dict[str, Any]:
    """Once every append is through; after a failed one nothing more is finished."""
    wait(appends)
    try:
        for one in appends:
            one.result()
    except BaseException:
        files.abort()
        raise
    return files.finish(skipped)


def _give_up(files: UnitFiles, appends: Sequence[Future[None]]) -> None:
    wait(appends)
    files.abort()
