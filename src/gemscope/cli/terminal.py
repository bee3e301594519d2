"""The terminal: where things are printed, and the bars of a long run.

Results go to standard output, everything else to standard error. Without a terminal (a pipe, a log) nothing
moves and no control codes are written: a stage is then one line, printed when it ends. NO_COLOR is respected.
"""

import time
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from gemscope.core.progress import StageProgress

_WIDTH = 10
_Shown = TypeVar("_Shown", bound="Moving")


def out() -> Console:
    """Standard output, for results; text is shown as it is, brackets and colons too."""
    return Console(highlight=False, markup=False, emoji=False)


def err() -> Console:
    """Standard error, for everything that is no result."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


class _Rate(ProgressColumn):
    """``12,400 tokens/s``."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        speed = task.finished_speed if task.finished else task.speed
        if task.fields["reused"]:
            return Text(f"{'kept from before':>18}", style="dim")
        return Text(f"{speed:>9,.0f} {unit}/s" if speed else f"{'':>11}{unit}", style="dim")


class Moving:
    """What moves while a block runs, if there is a terminal to move on."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._moving = console.is_terminal

    def __enter__(self: _Shown) -> _Shown:
        if self._moving:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._moving:
            self._progress.stop()


class StageBars(Moving):
    """Shows the stages of a run; call it with each ``StageProgress``."""

    def __init__(self) -> None:
        console = err()
        columns = (
            TextColumn("{task.description:<" + str(_WIDTH) + "}"),
            BarColumn(bar_width=22),
            TextColumn("{task.percentage:>3.0f}%"),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        super().__init__(console, Progress(*columns, console=console, speed_estimate_period=10))
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}

    def __call__(self, now: StageProgress) -> None:
        """Take in where a stage stands."""
        if now.stage not in self._tasks:
            self._started[now.stage] = time.perf_counter()
            self._tasks[now.stage] = self._progress.add_task(
                now.stage, total=now.total, unit=now.unit, reused=now.reused
            )
        self._progress.update(self._tasks[now.stage], completed=now.done, total=now.total)
        if not self._moving and now.done >= now.total:
            seconds = time.perf_counter() - self._started[now.stage]
            done = "kept from before" if now.reused else f"{seconds:.0f} s"
            self._console.print(f"{now.stage:<{_WIDTH}} {now.total:>11,} {now.unit:<7} {done}")
