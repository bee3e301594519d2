"""What a run tells while it goes on, what comes out of it, and what it keeps on the disk."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemscope.artifacts.config import AnyDictionary
from gemscope.dictionaries.base import Dictionary
from gemscope.training.config import TrainConfig
from gemscope.training.log import JsonLines, Log

Evaluate = Callable[[TrainConfig, Dictionary], Mapping[str, Any]]
"""Held-out evaluation of a dictionary for raw activations, given by the caller; plain JSON values."""


@dataclass(frozen=True)
class Progress:
    """Where a pass stands; one number per dictionary, in the order of the configs."""

    step: int
    """Updates made."""
    total: int
    """Updates in all."""
    loss: tuple[float, ...]
    """The objective on the last batch."""
    fvu: tuple[float, ...]
    """Fraction of variance unexplained, on the last batch."""
    l0: tuple[float, ...]
    """Mean active latents per row, on the last batch."""
    rows_per_second: float
    """Rows per second so far, each counted once for every dictionary."""
    batch_size: int
    """Rows per update."""
    warnings: tuple[str, ...] = ()
    """What the user should know, with the dictionary's name."""


@dataclass(frozen=True)
class TrainSummary:
    """What is kept of a run beside the weights."""

    config: TrainConfig
    """What was asked for."""
    rows: int
    """Rows trained on, repeats counted."""
    epochs: float
    """How often each row was seen."""
    seconds: float
    """Wall-clock time of the whole pass."""
    scale: float
    """C: training saw x / C (the first layer's)."""
    bandwidth: float
    """Of the threshold's gradient, for the scaled activations."""
    threshold_factor: float
    """What the final calibration multiplied the thresholds by."""
    loss: float
    """The objective on the last batch."""
    fvu: float
    """Fraction of variance unexplained on the last batch, before the final calibration."""
    l0: float
    """Mean active latents per row of the last batch, before the final calibration."""
    l0_train: float
    """Mean active latents per row as training left it, before the final calibration (``Learner.finished``)."""
    l0_finished: float
    """The same of the finished dictionary, on the calibration rows."""
    dead_fraction: float
    """Share of the latents that were not active in the last ``config.dead_after_rows`` rows."""
    warnings: tuple[str, ...]
    """What the user should know about how it went."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"config": self.config.as_dict()}


@dataclass(frozen=True)
class Trained:
    """One finished dictionary."""

    config: TrainConfig
    dictionary: AnyDictionary
    """For raw activations, on the CPU."""
    summary: TrainSummary
    evaluation: Mapping[str, Any] | None
    """What ``evaluate`` returned."""
    name: str = ""
    """Unique in its pass."""


Export = Callable[[int, Trained], None]
"""Takes a dictionary as it stands after so many updates."""


@dataclass(frozen=True)
class Keeping:
    """What a run leaves on the disk, and how often. The same call with the same folder goes on where it was."""

    folder: Path
    """Holds ``checkpoint/`` and ``log.jsonl``."""
    every: int = 1000
    """Updates between checkpoints; one more is written on Ctrl-C, on SIGTERM and at the end."""
    export: Export | None = None
    """Called with each dictionary in turn at every checkpoint."""
    evaluate_every: int | None = None
    """Updates between held-out evaluations; None means at the end only."""
    logs: tuple[Log, ...] = ()
    """Beside ``log.jsonl``."""

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint."""
        return self.folder / "checkpoint"

    @property
    def log(self) -> Path:
        """The file that every report goes to."""
        return self.folder / "log.jsonl"

    @property
    def all_logs(self) -> tuple[Log, ...]:
        """Every log."""
        return (JsonLines(self.log), *self.logs)
