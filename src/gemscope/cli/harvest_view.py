"""A harvest on the terminal: what it will take, how far it is, what it left."""

import time
from pathlib import Path

from rich.console import Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gemscope.activations.harvesting import Estimate, HarvestProgress, estimate, planned
from gemscope.activations.plan import HarvestConfig, make_plan
from gemscope.activations.sources import Source
from gemscope.activations.upkeep import StoreInfo, info
from gemscope.cli.terminal import Moving, err, out
from gemscope.core.quantities import size_text
from gemscope.models.gemma import Gemma

_EVERY = 60.0
"""Seconds between two lines where nothing moves."""


class HarvestView(Moving):
    """Shows a harvest: a bar on a terminal, a line a minute elsewhere."""

    def __init__(self) -> None:
        console = err()
        columns = (
            TextColumn("harvest"),
            BarColumn(bar_width=22),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rates]}", style="dim"),
            TimeElapsedColumn(),
        )
        super().__init__(console, Progress(*columns, console=console))
        self._shown = time.monotonic()
        self._task = None

    def expect(self, expected: Estimate) -> None:
        """What it will take."""
        self._console.print(expectation(expected))

    def __call__(self, now: HarvestProgress) -> None:
        """Take in where it stands."""
        if self._moving:
            if self._task is None:
                self._task = self._progress.add_task("harvest", total=now.rows_total, rates="")
            self._progress.update(self._task, completed=now.rows, total=now.rows_total, rates=rates(now))
        elif now.units == now.units_total or time.monotonic() - self._shown > _EVERY:
            self._shown = time.monotonic()
            self._console.print(f"harvest {now.units:>6,} of {now.units_total:,} units  {rates(now)}")

    def end(self, folder: Path) -> None:
        """What is there now."""
        found = info(folder)
        if found.units < found.units_planned:
            out().print(f"{folder}: {found.units} of {found.units_planned} units; the others are for other slices.")
        else:
            out().print(info_table(found))


def rates(now: HarvestProgress) -> str:
    """``12,400 tokens/s  19.1 MB/s  2:03 left``."""
    left = "" if now.rows >= now.rows_total or not now.rows else f"  {_clock(now.seconds_left)} left"
    return f"{now.rows_per_second:>8,.0f} tokens/s {now.bytes_per_second / 1e6:>7,.1f} MB/s{left}"


def expectation(expected: Estimate) -> RenderableType:
    """Size, space, memory and time."""
    left, free, memory = map(size_text, (expected.bytes_left, expected.bytes_free, expected.memory))
    lines = [
        f"about {expected.rows:,} tokens in {expected.documents:,} documents: {size_text(expected.bytes)}",
        f"{left} to write, {free} free; at most {memory} of memory beside the model",
        f"{_clock(expected.seconds)} of forward passes here",
    ]
    return Text("\n".join(lines), style="dim")


def dry(gemma: Gemma, source: Source, config: HarvestConfig, folder: Path) -> None:
    """Print what a harvest would take; nothing is written."""
    there = (folder / "plan.json").is_file()
    plan = planned(gemma, source, folder, config) if there else make_plan(gemma, source, config)
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    out().print(expectation(estimate(gemma, plan, folder if there else place)))


def info_table(found: StoreInfo) -> RenderableType:
    """What a store holds, in 80 columns."""
    units = f"{found.units:,}" if found.units == found.units_planned else f"{found.units:,} of {found.units_planned:,}"
    lines = [
        ("store", found.folder + (" (being written)" if found.in_progress else "")),
        ("model", found.model),
        ("rows", f"{found.rows:,} from {found.documents:,} documents, in {units} units"),
        ("size", f"{size_text(found.bytes)}, {found.dtype}"),
        ("outliers", f"{found.outliers:,}"),
        ("skipped", f"{found.skipped_documents:,} documents without readable text"),
    ]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("site", no_wrap=True)
    table.add_column("width", justify="right")
    table.add_column("mean norm", justify="right")
    for site, width in found.sites.items():
        table.add_row(site, str(width), f"{found.mean_norm[site]:.2f}" if site in found.mean_norm else "–")
    shown = [Text(f"{name:<10}", style="dim") + Text(value, style="not dim") for name, value in lines]
    return Group(*shown, Text(), table)


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "–"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
