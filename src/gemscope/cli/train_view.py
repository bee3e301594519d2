"""What gemscope train shows: a live table while it runs, the measures at the end, plans and recipes."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gemscope.cli.terminal import err
from gemscope.core.quantities import size_text, time_text, work_text
from gemscope.core.sites import Site
from gemscope.training.config import TrainConfig
from gemscope.training.memory import memory_of
from gemscope.training.outcome import Progress, Trained
from gemscope.training.planner import fits, plan, product_speed, proposals, warning
from gemscope.training.recipe import Entry, passes
from gemscope.training.sharding import Mesh
from gemscope.training.trainer import names_of

_SHOWN = 20
"""Dictionaries shown while running."""


class LiveTable:
    """Loss, FVU and L0 of every dictionary of a pass; without a terminal one line at each tenth."""

    def __init__(self, configs: Sequence[TrainConfig], quiet: bool = False) -> None:
        self._names, self._targets = names_of(configs), [c.target_l0 for c in configs]
        self._console, self._quiet, self._tenth = err(), quiet, -1
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._moving = self._console.is_terminal and not quiet

    def __enter__(self) -> "LiveTable":
        if self._moving:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._moving:
            self._live.stop()

    def __call__(self, now: Progress) -> None:
        """Take in where the pass stands."""
        if self._moving:
            self._live.update(self.render(now))
        elif not self._quiet and now.step * 10 // now.total != self._tenth:
            self._tenth = now.step * 10 // now.total
            fvu = sum(now.fvu) / len(now.fvu)
            self._console.print(
                f"train {now.step:>7,} / {now.total:,} steps  {now.rows_per_second:,.0f} tokens/s  mean FVU {fvu:.3f}"
            )

    def render(self, now: Progress) -> RenderableType:
        """The table."""
        table = _table("dictionary", "loss", "FVU", "L0", "target")
        for i, name in enumerate(self._names[:_SHOWN]):
            table.add_row(name, f"{now.loss[i]:.4f}", f"{now.fvu[i]:.4f}", f"{now.l0[i]:.1f}", f"{self._targets[i]:g}")
        left = (now.total - now.step) * now.batch_size / max(now.rows_per_second, 1e-9)
        head = f"{now.step:,} of {now.total:,} steps · {now.rows_per_second:,.0f} tokens/s · {left:,.0f} s left"
        more = len(self._names) - _SHOWN
        notes = [Text(f"and {more} more", style="dim")] if more > 0 else []
        said = [Text(warning, style="yellow") for warning in now.warnings]
        return Group(Text(head, style="bold"), table, *notes, *said)


def trained_table(done: Sequence[Trained], folder: Path) -> RenderableType:
    """The held-out measures of what was trained, where it is, and what was to be warned of."""
    with_loss = any("delta_loss" in (one.evaluation or {}) for one in done)
    table = _table("dictionary", "train L0", "L0", "target", "FVU", "dead", "dense", *(["Δ loss"] if with_loss else []))
    for one in done:
        found = one.evaluation or {}
        cells = [f"{found[name]:.{digits}f}" for name, digits in (("l0", 1), ("fvu", 4))]
        shares = [f"{100 * found[name]:.1f}%" for name in ("dead_fraction", "dense_fraction")]
        if with_loss:
            shares.append(f"{found['delta_loss']:.4f}")
        l0 = (f"{one.summary.l0_train:.1f}", cells[0], f"{one.config.target_l0:g}")
        table.add_row(one.name, *l0, cells[1], *shares)
    rows = (done[0].evaluation or {}).get("rows", 0) if done else 0
    notes = (
        f"over {rows:,} held-out tokens; train L0: as training left it, before thresholds were set to the target;"
        " dense: active on more than a tenth of them",
        f"The dictionaries are in {folder / 'dictionaries'}, the curves in {folder / 'report.html'}.",
    )
    warned = [Text(f"{one.name}: {text}", style="yellow") for one in done for text in one.summary.warnings]
    return Group(table, Text(), *(Text(note, style="dim") for note in notes), *warned)


def plan_table(configs: Sequence[TrainConfig], widths: Mapping[Site, int], shards: int = 1) -> RenderableType:
    """Memory, disk, work and time of a pass, whether it fits here, and what would make it fit; of one of ``shards``
    processes that share the latents.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = plan(configs, widths, shards, device=device)
    table = _table("dictionary", "weights", "moments", "start", "step", "export")
    for name, one in list(zip(names_of(configs), found.dictionaries, strict=True))[:_SHOWN]:
        table.add_row(name, *map(size_text, (one.weights, one.moments, one.start, one.step, one.export)))
    more = len(configs) - _SHOWN
    here, free = _memory()
    enough, speed = fits(found, free), product_speed(device)
    lines = [
        *([f"and {more} more"] if more > 0 else []),
        f"memory       {size_text(found.total)} at most, while {found.fullest}, rows included;"
        f" {size_text(free)} on {here}: {'it fits' if enough else 'it does not fit'}",
        f"checkpoint   {size_text(found.checkpoint)}",
        f"activations  {found.rows:,} tokens, {size_text(found.activations)} if each is stored once",
        f"work         {work_text(found.flops)} in the encoders' products",
        f"time         more than {time_text(found.seconds(speed))}, which these products take at {work_text(speed)}/s",
    ]
    lines += [f"instead      {text}" for text in ([] if enough else proposals(configs, widths, free, device=device))]
    return Group(table, Text(), *(Text(line) for line in lines))


def memory_warning(
    configs: Sequence[TrainConfig], widths: Mapping[Site, int], mesh: Mesh, device: torch.device
) -> str | None:
    """What is to be said before a pass that will not fit here."""
    return warning(plan(configs, widths, mesh.latents, mesh.data, device=device), _memory()[1])


def _memory() -> tuple[str, int]:
    if torch.cuda.is_available():
        return "the GPU", torch.cuda.mem_get_info()[0]
    pages = Path("/proc/meminfo")
    if pages.is_file():
        lines = dict(line.split(":", 1) for line in pages.read_text().splitlines())
        return "this machine", int(lines["MemAvailable"].split()[0]) * 1024
    return "this machine", 8 << 30


def recipe_table(entries: Sequence[Entry]) -> RenderableType:
    """What a recipe trains, and what it takes: kinds, widths, tokens, disk, work."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.name.split("/")[0], []).append(entry)
    table = _table("folder", "dictionaries", "tokens each", "latents", "GPU hours")
    for name, group in groups.items():
        tokens = sorted({e.tokens for e in group})
        total = sum(e.config.d_sae * len(e.config.reads) for e in group)
        span = f"{tokens[0] / 1e9:g}" + (f"-{tokens[-1] / 1e9:g}" if len(tokens) > 1 else "") + " B"
        table.add_row(name, f"{len(group):,}", span, f"{total:,}", f"{_hours(group):,.0f}")
    sites: dict[Site, tuple[float, int]] = {}
    for entry in entries:
        for names, width in ((entry.config.reads, entry.width), (entry.config.writes, entry.width_out)):
            for site in names:
                tokens = max(sites.get(site, (0.0, 0))[0], float(entry.tokens))
                sites[site] = tokens, width
    disk = sum(2.0 * tokens * width for tokens, width in sites.values())
    widths = {site: width for site, (_, width) in sites.items()}
    memory = [memory_of(entry.config, widths) for entry in entries]
    finished, state = sum(m.finished for m in memory), sum(m.weights + m.moments for m in memory)
    free = shutil.disk_usage(Path.cwd()).free
    lines = [
        f"{len(entries):,} dictionaries in {len(passes(entries))} groups that can share a pass; {len(sites)} sites",
        f"activations stored once in bf16: {size_text(disk)} ({size_text(free)} free here); a harvest can be read live",
        f"dictionaries {size_text(finished)}, checkpoints to go on from {size_text(state)}",
        "GPU hours: three times the encoder products at 200 TFLOP/s, an H100 in bf16 at half of its speed",
    ]
    return Group(table, Text(), *(Text(line, style="dim") for line in lines))


def _hours(entries: Sequence[Entry]) -> float:
    return sum(3 * entry.flops for entry in entries) / 2e14 / 3600


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
