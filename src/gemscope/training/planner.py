"""What a whole pass will take, said before it starts: memory at its fullest, disk, work, time; what would make it fit.

Memory is what a run adds to the program itself: all the time weights and moments, both sets of calibration rows and the
held-out ones; and on top the most that is there while rows are loaded, learners start, steps are made, or dictionaries
are exported and measured (``memory``). A checkpoint is written from the weights as they are.

Time is that of the encoder products at a speed measured in the fastest number type that training uses here. No step
undercuts it; one of 16,384 latents takes about a third more (benchmarks/train_step.py), over several layers it is more.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import torch

from gemscope.core.errors import InputError
from gemscope.core.quantities import size_text
from gemscope.core.sites import Site
from gemscope.dictionaries.products import Affine
from gemscope.dictionaries.screening import bf16_is_fast
from gemscope.training.config import TrainConfig
from gemscope.training.memory import CPU, Memory, memory_of
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.recipe import Entry

_FLOAT = 4
HELD_OUT = 8192
"""Rows that ``heldout`` measures on, at most."""
Phase = Literal["loading rows", "starting", "training", "exporting"]


@dataclass(frozen=True)
class Plan:
    """What a pass takes in one process."""

    dictionaries: Sequence[Memory]
    phases: Mapping[Phase, int]
    """Bytes on the device while a phase is at its fullest, everything included."""
    checkpoint: int
    """Bytes of a checkpoint on the disk."""
    rows: int
    """Rows of all updates."""
    activations: int
    """Bytes of as many stored rows in bf16."""
    flops: float
    """Of the encoder products: 2 d_in d_sae a row and layer, forward. Everything after them is sparse."""

    @property
    def total(self) -> int:
        """Bytes on the device at the fullest moment."""
        return max(self.phases.values())

    @property
    def fullest(self) -> Phase:
        """When that is."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    def seconds(self, flops_per_second: float) -> float:
        """Time of the encoder products alone, at a measured speed (``product_speed``)."""
        return self.flops / flops_per_second


def plan(
    configs: Sequence[TrainConfig],
    widths: Mapping[Site, int],
    shards: int = 1,
    data_shards: int = 1,
    *,
    device: torch.device = CPU,
    held_out: int | None = None,
) -> Plan:
    """The needs of one pass over rows of these widths, with latents over ``shards`` processes and rows over
    ``data_shards``; ``held_out`` is how many rows there are to measure on, None for enough.

    Raises InputError when a site is not among those of ``widths``.
    """
    sites = list(dict.fromkeys(site for config in configs for site in config.sites))
    if missing := next((site for site in sites if site not in widths), None):
        raise InputError(f"there are no rows of {missing}; choose among {', '.join(map(str, widths))}, or harvest it.")
    first, row = configs[0], sum(widths[site] for site in sites)
    on_host = device.type == "cpu"
    held = HELD_OUT if held_out is None else min(HELD_OUT, held_out)
    later = first.calibration_rows if held_out is None else min(first.calibration_rows, held_out)
    memory = [memory_of(c, widths, shards, data_shards, held_out=held, device=device) for c in configs]
    kept = sum(m.kept for m in memory) + _FLOAT * row * (first.calibration_rows + later + (held if on_host else 0))
    batch = _FLOAT * row * first.batch_size
    done = sum(m.finished for m in memory) if on_host else 0
    phases: dict[Phase, int] = {
        "loading rows": kept - sum(m.kept for m in memory) + _FLOAT * row * first.calibration_rows,
        "starting": kept + max(m.start for m in memory),
        "training": kept + batch + max(m.step for m in memory),
        "exporting": kept + batch + done + max(m.export - (m.finished if on_host else 0) for m in memory),
    }
    rows = first.steps * first.batch_size
    flops = sum(2.0 * rows * len(c.reads) * widths[c.site] * c.d_sae for c in configs)
    stored = sum(m.weights + m.moments for m in memory) * shards
    return Plan(memory, phases, stored, rows, rows * row * 2, flops)


def widths_of(entries: Sequence[Entry]) -> dict[Site, int]:
    """Width of every site that entries of a recipe read or write: what ``plan`` needs when no rows are harvested yet.

    Only entries of one pass (``recipe.passes``) can be planned together.
    """
    found = {site: entry.width for entry in entries for site in entry.config.reads}
    return found | {s: e.width_out for e in entries for s in e.config.writes if s not in found}


def fits(found: Plan, available: int) -> bool:
    """Whether the pass fits into so many bytes on the device."""
    return found.total <= available


def warning(found: Plan, available: int) -> str | None:
    """One sentence for a pass that will not fit into so many bytes; None when it fits."""
    if fits(found, available):
        return None
    return (
        f"this run will take {size_text(found.total)} while {found.fullest}, but {size_text(available)} are free;"
        " gemscope train --plan says what would make it fit."
    )


def product_speed(device: torch.device = CPU, rounds: int = 3) -> float:
    """FLOP a second of an encoder product, in bf16 where that is fast, the fastest of a few: a fraction of a second."""
    rows, d_in, d_sae = (256, 640, 4096) if device.type == "cpu" else (4096, 2560, 16384)
    given: dict[str, Any] = {"dtype": torch.bfloat16 if bf16_is_fast(device) else torch.float32, "device": device}
    product = Affine(torch.ones(d_in, d_sae, **given), torch.zeros(d_sae, **given))
    x = torch.ones(rows, d_in, **given)
    best = float("inf")
    for _ in range(rounds + 1):
        start = time.perf_counter()
        product(x)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2.0 * rows * d_in * d_sae / best


@dataclass(frozen=True)
class _Change:
    """Something that takes less memory."""

    name: str
    options: Mapping[str, Any]
    """Of a ``MultiLayerConfig``."""
    spreads: bool = False
    """Over two processes or more."""
    needs_device: bool = False

    def apply(self, config: TrainConfig) -> TrainConfig:
        """The config with it; the same where it is not for its kind."""
        return replace(config, **self.options) if isinstance(config, MultiLayerConfig) else config


_CHANGES = (
    _Change("bf16 moments", {"moments": "bfloat16"}),
    _Change("decoders offloaded", {"offload": True}, needs_device=True),
    _Change("latents over {} processes", {}, spreads=True),
)


def proposals(
    configs: Sequence[TrainConfig],
    widths: Mapping[Site, int],
    available: int,
    most_shards: int = 64,
    *,
    device: torch.device = CPU,
) -> list[str]:
    """What would make a pass fit that does not: single changes, or where none is enough pairs of them, the least first;
    empty when it fits as it is. Decoders are offloaded only from a device with memory of its own.
    """
    if fits(plan(configs, widths, device=device), available):
        return []
    changes = [change for change in _CHANGES if device.type != "cpu" or not change.needs_device]
    found: list[str] = []
    for size in (1, 2):
        tried = (_fitting(configs, widths, available, most_shards, device, how) for how in combinations(changes, size))
        found = found or [text for text in tried if text is not None]
    if len(configs) > 1:
        largest = max(plan([c], widths, device=device).total for c in configs)
        if largest <= available:
            found.append(f"fewer dictionaries in one pass: the largest alone takes {size_text(largest)}")
    return found or [
        f"nothing here makes it fit into {size_text(available)}; use fewer latents, layers or calibration rows, or tied"
        " decoders"
    ]


def _fitting(
    configs: Sequence[TrainConfig],
    widths: Mapping[Site, int],
    available: int,
    most_shards: int,
    device: torch.device,
    how: Sequence[_Change],
) -> str | None:
    """What the pass takes with these changes, in words; None when it does not fit."""
    for change in how:
        configs = [change.apply(config) for config in configs]
    shards = 2 if any(change.spreads for change in how) else 1
    while shards <= most_shards and all(config.d_sae % shards == 0 for config in configs):
        found = plan(configs, widths, shards, device=device)
        if fits(found, available):
            host = sum(m.host for m in found.dictionaries)
            where = f" on the device, {size_text(host)} on the host" if host else ""
            names = " and ".join(change.name.format(shards) for change in how)
            return f"{names}: {size_text(found.total)}{where}{' each' if shards > 1 else ''}"
        if shards == 1:
            return None
        shards *= 2
    return None
