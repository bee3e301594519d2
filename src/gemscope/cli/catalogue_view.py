"""What ``gemscope list`` and ``gemscope fetch`` print: plain lines of 80 columns, and the bar of a download."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gemscope.artifacts.catalogue.artifact import Artifact
from gemscope.artifacts.hub.fetch import Plan, Step
from gemscope.artifacts.hub.fetch import Progress as FetchProgress
from gemscope.artifacts.hub.record import FileRecord
from gemscope.core.quantities import size_text

LONG = 60
"""Lists above this many lines are summed up."""

_MARKS = {"registered": "", "quoted": "", "announced": "~", "unregistered": "?"}
_LEGEND = (
    ("n", "on Neuronpedia"),
    ("~", "announced in the paper; its name follows from the rule, nobody lists it"),
    ("?", "not in SAELens' registry; it may be missing on the hub"),
)


def listing(chosen: Sequence[Artifact], *, every: bool = False) -> str:
    """One line per dictionary; a long list as one line per folder, or per repository."""
    if not chosen:
        return "No released dictionary fits all these options; see which there are with: gemscope list"
    repos = {repo: list(group) for repo, group in groupby(chosen, key=lambda artifact: artifact.repo)}
    if every or len(chosen) <= LONG:
        return _rows(repos)
    if len(repos) == 1:
        table, hint = _folders(chosen), "Narrow it down to see names: --layer, --width, --l0, --site, or --all."
    else:
        table, hint = _repositories(repos), "Narrow it down: --model 1b-it, --site resid_post, ... or --all."
    sure = sum(artifact.standing == "registered" for artifact in chosen)
    total = f"{len(chosen):,} dictionaries, {size_text(sum(artifact.size for artifact in chosen))}"
    return "\n".join((*table, "", f"{total}; {sure:,} are in SAELens' registry.", hint))


def _rows(repos: Mapping[str, Sequence[Artifact]]) -> str:
    lines: list[str] = []
    marks: set[str] = set()
    for repo, group in repos.items():
        short = repo.split("/")[1]
        leaves = [artifact.name.removeprefix(f"{short}/") for artifact in group]
        width = max(map(len, leaves))
        lines += ["", f"{short}/...  ({group[0].model})"]
        for artifact, leaf in zip(group, leaves, strict=True):
            mark = _MARKS[artifact.standing] or "n" * bool(artifact.neuronpedia)
            marks.add(mark)
            l0 = "-" if artifact.l0 is None else str(artifact.l0)
            line = f"{leaf:<{width}} {_reads(artifact):<13} {l0:>4} {size_text(artifact.size):>7} {mark}"
            lines.append(line.rstrip())
    legend = [f"{mark}  {meaning}" for mark, meaning in _LEGEND if mark in marks]
    heading = "A name is the first line of its group and its own. Columns: site, L0, size."
    return "\n".join((heading, *lines, *([""] if legend else []), *legend))


def _reads(artifact: Artifact) -> str:
    first = artifact.reads[0]
    return str(first) if len(artifact.reads) == 1 else f"{first.name} x{len(artifact.reads)}"


def _folders(chosen: Sequence[Artifact]) -> list[str]:
    cells = [("folder", "layers", "widths", "L0", "number", "size")]
    for category, found in groupby(chosen, key=lambda artifact: artifact.category):
        group = list(found)
        l0s = list(dict.fromkeys(a.l0_name for a in group if not a.l0_name.isdecimal()))
        l0s += ["..."] * any(a.l0_name.isdecimal() for a in group)
        widths = dict.fromkeys(a.width_name for a in sorted(group, key=lambda a: a.width))
        size = size_text(sum(a.size for a in group))
        layers = _spans({layer for a in group for layer in a.layers})
        cells.append((category, layers, " ".join(widths), " ".join(l0s), f"{len(group):,}", size))
    return [f"{chosen[0].repo.split('/')[1]}/...  ({chosen[0].model})", "", *_aligned(cells, left=4)]


def _repositories(repos: Mapping[str, Sequence[Artifact]]) -> list[str]:
    cells = [("repository", "model", "number", "size")]
    for repo, group in repos.items():
        size = size_text(sum(artifact.size for artifact in group))
        cells.append((repo.split("/")[1], group[0].model, f"{len(group):,}", size))
    return _aligned(cells, left=2)


def _aligned(cells: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Columns two spaces apart, the first ``left`` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _spans(layers: set[int]) -> str:
    """``0-25`` for neighbours, otherwise ``5 9 12 15``."""
    ordered = sorted(layers)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}-{ordered[-1]}"
    return " ".join(str(layer) for layer in ordered)


def said(sentence: str) -> None:
    """A word on what happens, to standard error."""
    print(f"gemscope: {sentence}", file=sys.stderr)


def summary(plan: Plan) -> str:
    """How much there is, how much of it is to come, and where it goes."""
    place = plan.out.absolute()
    while not place.exists():
        place = place.parent
    free = size_text(shutil.disk_usage(place).free)
    files = "1 file" if len(plan.steps) == 1 else f"{len(plan.steps):,} files"
    return f"{files}, {size_text(plan.size)}; {size_text(plan.left)} to come into {plan.out} ({free} free)"


def plan_text(plan: Plan) -> str:
    """A dry run: what would be fetched, and what is here already."""
    lines = [f"{repo} at {commit or plan.source.name}" for repo, commit in plan.revisions.items()]
    for name, steps in groupby(plan.steps, key=lambda step: step.artifact.name):
        lines += ["", name, *(_step_text(step) for step in steps)]
    absent = [f"not published, and not needed: {name}" for name in plan.not_published]
    return "\n".join((*lines, "", *absent, summary(plan)))


def _step_text(step: Step) -> str:
    state = {"here": "here", "absent": "to come", "partial": f"to come; {size_text(step.have)} of it are here"}
    return f"  {step.target.name:<26} {size_text(step.file.size):>7}  {state[step.state]}"


def fetched_json(plan: Plan, records: Mapping[Path, FileRecord]) -> dict[str, Any]:
    """Plain JSON values: every file, with its hash once it was fetched."""
    files: list[dict[str, Any]] = []
    for step in plan.steps:
        found = records.get(step.target)
        files.append(
            {
                "artifact": step.artifact.name,
                "path": str(step.target),
                "size": step.file.size,
                "state": step.state,
                "revision": step.file.revision,
                "sha256": found.sha256 if found else step.file.sha256,
                "checked": found.checked if found else None,
            }
        )
    return {
        "source": plan.source.name,
        "revisions": dict(plan.revisions),
        "size": plan.size,
        "left": plan.left,
        "files": files,
        "not_published": list(plan.not_published),
    }


class Bars:
    """The bar of a download, on standard error; each finished file with its hash, on standard output."""

    def __init__(self, plan: Plan, *, quiet: bool = False) -> None:
        self._quiet = quiet
        console = Console(stderr=True, highlight=False)
        self._moving = console.is_terminal
        self._base = plan.size - plan.left
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            redirect_stdout=False,
        )
        self._task = self._bar.add_task("fetch", total=plan.size, completed=self._base)
        self._finished = 0
        self._named = ""

    def __enter__(self) -> "Bars":
        if self._moving:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._moving:
            self._bar.stop()

    def __call__(self, now: FetchProgress) -> None:
        """Take in where the fetch stands."""
        if now.step.state != "here":
            self._bar.update(self._task, completed=self._base + self._finished + now.done - now.step.have)
        if now.record is None:
            return
        if now.step.state != "here":
            self._finished += now.step.left
        if not self._quiet:
            self._print(now.step, now.record)

    def _print(self, step: Step, found: FileRecord) -> None:
        lines: list[str] = []
        if step.artifact.name != self._named:
            self._named = step.artifact.name
            lines.append(self._named)
        how = "was here" if step.state == "here" else f"{found.checked} checked"
        lines += [f"  {step.target.name:<26} {size_text(found.size):>7}  {how}", f"    sha256 {found.sha256}"]
        if self._moving and sys.stdout.isatty():
            self._bar.console.print("\n".join(lines), markup=False)
        else:
            print("\n".join(lines), flush=True)
