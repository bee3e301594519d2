"""Train on ground-truth worlds, measure what was found, and keep every run, so that a stopped benchmark goes on.

A run is one line of a JSONL file, written when it is finished. CPU seconds are those of this process for the training
and the making of its rows, at one thread; starting Python, making the world and measuring are not counted.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import storage_error
from gemscope.evaluation.worlds.metrics import score
from gemscope.evaluation.worlds.tiers import Method, Tier, tier
from gemscope.evaluation.worlds.world import Stream, World
from gemscope.training.config import TrainConfig
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.outcome import Progress
from gemscope.training.trainer import train

_MANY_FIRST = {"decay": 0.3, "first_k_factor": 8 / 3}
RECIPES: Mapping[Method, Mapping[str, Any]] = {
    "jumprelu": {
        "learning_rate": 4e-3,
        "threshold_learning_rate": 6e-3,
        "decay": 0.5,
        "sparsity": "linear",
        "sparsity_weight": 0.01,
        "first_l0_factor": 8.0,
    },
    "batchtopk": {"learning_rate": 3e-3, **_MANY_FIRST},
    "matryoshka": {"learning_rate": 6e-3, **_MANY_FIRST},
}
"""What differs from the trainer's defaults, by method; the same for all worlds of one layer."""
SEVERAL_LAYERS: Mapping[Method, Mapping[str, Any]] = {
    "jumprelu": {"learning_rate": 6e-3, "decay": 0.3, "sparsity_weight": 0.01, "from_data": True},
    "batchtopk": {"learning_rate": 6e-3, "from_data": True, **_MANY_FIRST},
}
"""The same for all worlds of several layers, whose trainer is another."""
BATCH = 1024

OURS = "gemscope"


@dataclass(frozen=True)
class Run:
    """One training, measured."""

    tier: str
    method: str
    seed: int
    rows: int
    """Trained on."""
    seconds: float
    cpu_seconds: float
    score: Mapping[str, Any]
    """As ``Score.as_dict`` has it."""
    config: Mapping[str, Any]
    """Of the training; of a peer what it was given."""
    trainer: str = OURS

    @property
    def key(self) -> tuple[Any, ...]:
        """Two runs with the same key are the same run."""
        return (self.trainer, self.tier, self.method, self.seed, self.rows, json.dumps(self.config, sort_keys=True))

    def value(self, name: str) -> float | None:
        """A number of the score, also ``f1``."""
        found = self.score["detection"]["f1"] if name == "f1" else self.score.get(name)
        return None if found is None else float(found)


@dataclass(frozen=True)
class Line:
    """The runs of one trainer and method on one world."""

    tier: str
    method: str
    trainer: str
    seeds: tuple[int, ...]
    means: Mapping[str, float]
    deviations: Mapping[str, float]
    """Population standard deviations over seeds."""
    met: bool | None
    """Whether the means reach the target; None where there is none, or fewer rows."""


def config_of(one: Tier, method: Method, seed: int, rows: int | None = None) -> TrainConfig:
    """How our trainer is set for a world. Raises InputError for a method that the world has not."""
    if method not in one.methods:
        raise InputError(f"{one.name} is not for {method!r}; use one of {', '.join(one.methods)}.")
    given: dict[str, Any] = {
        "d_sae": one.d_sae,
        "target_l0": one.l0,
        "kind": one.world.kind,
        "target_site": None if one.world.reconstructs else one.world.writes[0],
        "activation": "jumprelu" if method == "jumprelu" else "batchtopk",
        "prefixes": one.prefixes if method == "matryoshka" else (),
        "steps": max(1, (rows or one.rows) // BATCH),
        "batch_size": BATCH,
        "seed": seed,
        **(RECIPES if one.world.layers == 1 else SEVERAL_LAYERS)[method],
    }
    if one.world.layers == 1:
        return TrainConfig(one.world.reads[0], **given)
    layers, skip = tuple(range(one.world.layers)), one.world.affine > 0
    return MultiLayerConfig(one.world.reads[0], **given, layers=layers, skip=skip)


def run(
    one: Tier,
    method: Method,
    seed: int,
    rows: int | None = None,
    device: torch.device | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train once and measure, the dictionary's first weights and the rows drawn from ``seed``."""
    config = config_of(one, method, seed, rows)
    world = World(one.world, device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        begun = time.perf_counter(), time.process_time()
        stream = Stream(world, config.steps * BATCH)
        (trained,) = train(stream, [config], device=world.device, progress=progress)
        seconds, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
        found = score(world, trained.dictionary.to(world.device))
    finally:
        torch.set_num_threads(threads)
    return Run(one.name, method, seed, config.steps * BATCH, seconds, cpu, found.as_dict(), _plain(config))


def benchmark(
    tiers: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[Method] = (),
    *,
    file: Path | None = None,
    rows: int | None = None,
    device: torch.device | None = None,
    progress: Callable[[str, Progress | None], None] | None = None,
) -> list[Run]:
    """All runs of the worlds, those in ``file`` not again; ``methods`` empty means all that a world has.

    ``progress`` is told the run's name, and where it stands, or None when it was in the file. Raises InputError for a
    world that there is not.
    """
    kept = [] if file is None else read_runs(file)
    known, found = {one.key: one for one in kept}, list[Run]()
    for one in [tier(name) for name in tiers]:
        wanted: list[Method] = [m for m in one.methods if not methods or m in methods]
        for method in wanted:
            for seed in seeds:
                label = f"{one.name} {method} {seed}"
                config = config_of(one, method, seed, rows)
                key = Run(one.name, method, seed, config.steps * BATCH, 0.0, 0.0, {}, _plain(config)).key
                if (before := known.get(key)) is not None:
                    if progress is not None:
                        progress(label, None)
                    found.append(before)
                    continue
                found.append(run(one, method, seed, rows, device, _named(progress, label)))
                if file is not None:
                    add_run(file, found[-1])
    return found


def lines(runs: Sequence[Run]) -> list[Line]:
    """One for each trainer and method of each world, in the order they come."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for one in runs:
        groups.setdefault((one.tier, one.method, one.trainer), []).append(one)
    return [_line(*key, group) for key, group in groups.items()]


def read_runs(file: Path) -> list[Run]:
    """The runs of a file, none if there is no file; an incomplete last line is left out. Raises FormatError."""
    if not file.is_file():
        return []
    found: list[Run] = []
    every = file.read_text("utf-8").split("\n")
    for number, line in enumerate(every, 1):
        try:
            if line:
                found.append(Run(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(every):
                break
            raise FormatError(f"line {number} of {file} is not a run ({error}); give another file.") from error
    return found


def add_run(file: Path, one: Run) -> None:
    """Append a line; raises StorageError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text("utf-8") if file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a kill cut the last line off
            file.write_text(whole, "utf-8")
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(one), ensure_ascii=False) + "\n")
    except OSError as error:
        raise storage_error(file, error) from error


_SHOWN = (
    *("mcc", "mcc_floor", "mcc_adjusted", "f1", "f1_adjusted", "explained", "l0", "true_l0", "dead"),
    *("uniqueness", "uniqueness_floor", "shrinkage", "encoder_mcc", "affine_r2", "shared_auc"),
)


def _line(name: str, method: str, trainer: str, group: Sequence[Run]) -> Line:
    columns = {column: [one.value(column) for one in group] for column in _SHOWN}
    numbers = {key: [v for v in values if v is not None] for key, values in columns.items()}
    numbers |= {"cpu_seconds": [one.cpu_seconds for one in group], "seconds": [one.seconds for one in group]}
    numbers = {key: values for key, values in numbers.items() if values}
    means = {key: math.fsum(values) / len(values) for key, values in numbers.items()}
    spread = {key: (math.fsum((v - means[key]) ** 2 for v in vs) / len(vs)) ** 0.5 for key, vs in numbers.items()}
    return Line(
        name, method, trainer, tuple(one.seed for one in group), means, spread, _met(name, method, group, means)
    )


def _met(name: str, method: str, group: Sequence[Run], means: Mapping[str, float]) -> bool | None:
    one = tier(name)
    target = next((target for known, target in one.targets.items() if known == method), None)
    if target is None or any(run.rows < one.rows // BATCH * BATCH for run in group):
        return None
    wanted = {key: value for key, value in asdict(target).items() if value is not None}
    return all(means.get(key, 0.0) >= value for key, value in wanted.items())


def _plain(config: TrainConfig) -> dict[str, Any]:
    """As it is read back from a file."""
    return dict(json.loads(json.dumps(config.as_dict())))


def _named(progress: Callable[[str, Progress | None], None] | None, label: str) -> Callable[[Progress], None] | None:
    return None if progress is None else lambda now: progress(label, now)
