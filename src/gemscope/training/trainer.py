"""Trains many dictionaries in one pass: each site is read once per batch, whatever hangs on it.

Nothing here writes a file: an interrupted run leaves nothing half done (saving is ``artifacts.native``,
atomic). The initial weights and the order of the rows are functions of the seed, so there is no random state
besides the step.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.sae import SAE
from gemscope.training.config import TrainConfig
from gemscope.training.data import ActivationSource, endless_batches, first_rows
from gemscope.training.learner import Learner, Rows, StepResult
from gemscope.training.single import SingleLayerLearner

Evaluate = Callable[[Site, SAE], Mapping[str, Any]]
"""Held-out evaluation of a finished dictionary, given by the caller."""

_REPORT_EVERY = 20
_log = logging.getLogger(__name__)


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
    """C: training saw x / C."""
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
    dead_fraction: float
    """Share of the latents that were not active in the last ``config.dead_after_rows`` rows."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"config": self.config.as_dict()}


@dataclass(frozen=True)
class Trained:
    """One finished dictionary."""

    config: TrainConfig
    dictionary: SAE
    """For raw activations, on the CPU."""
    summary: TrainSummary
    evaluation: Mapping[str, Any] | None
    """What ``evaluate`` returned."""


@dataclass
class TrainerState:
    """Everything that an interrupted pass would need to go on."""

    step: int
    """Updates made: with the seed it also gives the place in the data."""
    learners: list[Learner]
    """Weights, moments and firing counts of each dictionary."""


def train(
    data: ActivationSource,
    configs: Sequence[TrainConfig],
    *,
    evaluate: Evaluate | None = None,
    progress: Callable[[Progress], None] | None = None,
    device: torch.device | None = None,
) -> list[Trained]:
    """Train one dictionary per config, all on the same batches; several may share a site.

    A dictionary comes out the same whether it is trained alone or beside others, and bit for bit the same
    again on the same machine and number of threads. Raises InputError when the configs disagree on the pass
    they share, when there are too few rows, or when an objective stops being finite.
    """
    total, batch_size, seed, calibration_rows = _shared(configs)
    device = device or torch.device("cpu")
    started = time.perf_counter()
    sites = list(dict.fromkeys(site for config in configs for site in config.sites))
    batches = endless_batches(data, sites, batch_size, seed)
    calibration = first_rows(data, sites, calibration_rows, batch_size, seed)
    state = TrainerState(0, _learners(configs, calibration, device))
    results: list[StepResult] = []
    while state.step < total:
        batch = {site: x.to(device, torch.float32) for site, x in next(batches).items()}
        results = [learner.update(batch, state.step) for learner in state.learners]
        state.step += 1
        if state.step % _REPORT_EVERY == 0 or state.step == total:
            seconds = time.perf_counter() - started
            report = _report(state, total, results, state.step * batch_size / seconds)
            if progress is not None:
                progress(report)
    seconds = time.perf_counter() - started
    return [
        _finish(learner, {site: x.to(device) for site, x in calibration.items()}, result, data.rows, seconds, evaluate)
        for learner, result in zip(state.learners, results, strict=True)
    ]


def _shared(configs: Sequence[TrainConfig]) -> tuple[int, int, int, int]:
    """What all configs of a pass must agree on."""
    if not configs:
        raise InputError("no dictionary was asked for; give at least one TrainConfig.")
    shared = {(c.steps, c.batch_size, c.seed, c.calibration_rows) for c in configs}
    if len(shared) > 1:
        raise InputError(
            "the configs of one pass must agree on steps, batch_size, seed and calibration_rows;"
            f" these have {sorted(shared)}: train them in separate calls."
        )
    return shared.pop()


def _learners(
    configs: Sequence[TrainConfig],
    calibration: Mapping[Site, Float[Tensor, "rows width"]],
    device: torch.device,
) -> list[Learner]:
    rows = {site: x.to(device) for site, x in calibration.items()}
    return [SingleLayerLearner(config, rows) for config in configs]


def _report(state: TrainerState, total: int, results: Sequence[StepResult], rate: float) -> Progress:
    loss = tuple(result.loss.item() for result in results)
    for learner, value in zip(state.learners, loss, strict=True):
        if not abs(value) < float("inf"):
            raise InputError(
                f"training at {learner.config.site} diverged: the loss is {value} after {state.step} steps; lower"
                " learning_rate, or look for NaN in the activations."
            )
    fvu, l0 = tuple(r.fvu.item() for r in results), tuple(r.l0.item() for r in results)
    return Progress(state.step, total, loss, fvu, l0, rate)


def _finish(
    learner: Learner,
    calibration: Rows,
    last: StepResult,
    data_rows: int,
    seconds: float,
    evaluate: Evaluate | None,
) -> Trained:
    config = learner.config
    dictionary, numbers = learner.finished(calibration)
    summary = TrainSummary(
        config=config,
        rows=config.steps * config.batch_size,
        epochs=config.steps * config.batch_size / data_rows,
        seconds=seconds,
        scale=numbers["scale_in"],
        bandwidth=numbers["bandwidth"],
        threshold_factor=numbers["threshold_factor"],
        loss=last.loss.item(),
        fvu=last.fvu.item(),
        l0=last.l0.item(),
        dead_fraction=numbers["dead_fraction"],
    )
    _log.info(
        "%s: L0 %.1f, FVU %.3f, thresholds x %.3f", config.site, summary.l0, summary.fvu, summary.threshold_factor
    )
    assert isinstance(dictionary, SAE)
    return Trained(config, dictionary.cpu(), summary, evaluate(config.site, dictionary) if evaluate else None)
