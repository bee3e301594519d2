"""Trains many dictionaries in one pass: each site is read once per batch, whatever hangs on it.

Notable:
- a dictionary comes out the same whether it is trained alone or beside others, and bit for bit the same again on the
  same machine and number of threads, also when the run was stopped and went on (``Keeping``);
- every checkpoint gives dictionaries for raw activations: normalisation and centring are folded each time;
- initial weights are a function of each config's seed, the order of the rows of the first config's.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from gemscope.artifacts.config import AnyDictionary
from gemscope.core.errors import InputError
from gemscope.core.files import recover
from gemscope.core.sites import Site
from gemscope.core.tensor_files import is_finite
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.single import SingleLayer
from gemscope.training import checkpoint
from gemscope.training.checkpoint import Checkpoint
from gemscope.training.config import MULTI_LAYER, TrainConfig
from gemscope.training.data import ActivationSource, BatchReader, NamedSource, first_rows
from gemscope.training.end_to_end import splice_of
from gemscope.training.learner import Learner, Rows, StepResult
from gemscope.training.log import Log
from gemscope.training.multilayer import MultiLayerConfig, MultiLayerLearner
from gemscope.training.objectives import Splice
from gemscope.training.outcome import Evaluate, Keeping, Progress, Trained, TrainSummary
from gemscope.training.sharding import ALONE, Mesh
from gemscope.training.single import SingleLayerLearner
from gemscope.training.stopping import Stop, obey, stopping

_log = logging.getLogger(__name__)

_IDENTIFYING = 256
"""Rows of each site that tell a source from others."""


@dataclass
class _Pass:
    """One pass over the data."""

    configs: Sequence[TrainConfig]
    names: Sequence[str]
    learners: list[Learner]
    reader: BatchReader
    calibration: Rows
    rows: int
    keep: Keeping | None
    inputs: Mapping[str, str | None]
    """What tells the rows and the first weights from others."""
    logs: tuple[Log, ...]
    evaluate: Evaluate | None
    progress: Callable[[Progress], None] | None
    device: torch.device
    mesh: Mesh
    report_every: int
    step: int = 0
    seconds: float = 0.0
    """Before this process."""
    started: float = field(default_factory=time.perf_counter)
    latest: Sequence[StepResult] = ()
    """Of the last update, on the device; none before the first in this process."""
    results: list[tuple[float, float, float]] = field(default_factory=list[tuple[float, float, float]])
    """Loss, FVU and L0 of the last update that ``_measure`` looked at."""

    @property
    def total(self) -> int:
        return self.configs[0].steps

    @property
    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.started


def train(
    data: ActivationSource,
    configs: Sequence[TrainConfig],
    *,
    evaluate: Evaluate | None = None,
    progress: Callable[[Progress], None] | None = None,
    device: torch.device | None = None,
    keep: Keeping | None = None,
    start: Mapping[int, Dictionary] | None = None,
    heldout: ActivationSource | None = None,
    mesh: Mesh = ALONE,
    report_every: int = 20,
) -> list[Trained]:
    """Train one dictionary per config, all on the same batches; several may share a site.

    ``start`` gives the dictionaries (for raw activations) that some configs, by their place, begin from. Thresholds
    are calibrated on ``heldout`` rows if there are any, else on training rows. ``end_to_end`` needs ``data`` to be a
    ``LiveContexts``. With ``mesh`` every process calls this with the same arguments; only the first writes and
    reports. Raises InputError when the configs disagree on the pass they share, when there are too few rows, when
    ``keep`` has a run on other rows or from other weights, or when training stops being finite; KeyboardInterrupt and
    SystemExit after the checkpoint of a stopped run is written.
    """
    shared = _shared(configs, mesh)
    device = device or torch.device("cpu")
    sites = list(dict.fromkeys(site for config in configs for site in config.sites))
    reader = BatchReader(data, sites, shared.batch_size, shared.seed)
    first, identity = _first(data, sites, shared, device)
    learners = [make_learner(c, first, (start or {}).get(i), mesh, splice_of(reader, c)) for i, c in enumerate(configs)]
    later, identity_held = (first, None) if heldout is None else _first(heldout, sites, shared, device)
    run = _Pass(
        configs=configs,
        names=names_of(configs),
        learners=learners,
        reader=reader,
        calibration=later,
        rows=data.rows,
        keep=keep,
        inputs={
            "rows": identity,
            "held-out rows": identity_held,
            "first weights": _identity_of_weights(start or {}),
        },
        logs=() if keep is None or not mesh.is_first else keep.all_logs,
        evaluate=evaluate,
        progress=progress if mesh.is_first else None,
        device=device,
        mesh=mesh,
        report_every=report_every,
    )
    _resume(run)
    if keep is None:
        _go(run, Stop())
    else:
        with stopping() as stop:
            _go(run, stop)
    finished = _finished(run, evaluate)
    for log in run.logs:
        log.close()
    return finished


def make_learner(
    config: TrainConfig,
    calibration: Rows,
    start: Dictionary | None = None,
    mesh: Mesh = ALONE,
    splice: Splice | None = None,
) -> Learner:
    """The learner of a config's kind; one layer in one process has its own, faster one."""
    several = config.kind in MULTI_LAYER or isinstance(config, MultiLayerConfig) or mesh.latents * mesh.data > 1
    if several:
        return MultiLayerLearner(config, calibration, start=start, mesh=mesh)
    if start is not None and not isinstance(start, SingleLayer):
        raise InputError(f"a {config.kind} cannot begin from a {start.kind}; give a dictionary of the same kind.")
    return SingleLayerLearner(config, calibration, initial=start, splice=splice)


def names_of(configs: Sequence[TrainConfig]) -> list[str]:
    """A short name for each config, such as ``sae.resid_post.3.w1024.l0_32``, made unique."""
    names: list[str] = []
    for config in configs:
        where = ".".join([config.site.name, *(["all"] if config.layers else [str(config.site.layer)])])
        name = f"{config.kind}.{where}.w{config.d_sae}.l0_{config.target_l0:g}"
        same = sum(other == name or other.startswith(f"{name}.no") for other in names)
        names.append(f"{name}.no{same + 1}" if same else name)
    return names


def _first(
    data: ActivationSource, sites: Sequence[Site], shared: TrainConfig, device: torch.device
) -> tuple[Rows, str]:
    """The calibration rows of a source, and what tells it from others: its own name for its rows, else their number and
    a hash of the first ones of each site.
    """
    rows = first_rows(data, sites, shared.calibration_rows, shared.batch_size, shared.seed)
    named = data.identity if isinstance(data, NamedSource) else None
    identity = named or f"{data.rows} {checkpoint.hash_of(x[:_IDENTIFYING] for x in rows.values())}"
    return {site: x.to(device) for site, x in rows.items()}, identity


def _identity_of_weights(start: Mapping[int, Dictionary]) -> str | None:
    found = {str(place): checkpoint.hash_of(one.parameters()) for place, one in start.items()}
    return json.dumps(found, sort_keys=True) if found else None


def _shared(configs: Sequence[TrainConfig], mesh: Mesh) -> TrainConfig:
    """The first config; raises InputError when the others disagree with it on what a pass shares, or when the processes
    cannot share its batch.
    """
    if not configs:
        raise InputError("no dictionary was asked for; give at least one TrainConfig.")
    shared = {(c.steps, c.batch_size, c.calibration_rows) for c in configs}
    if len(shared) > 1:
        raise InputError(
            "the configs of one pass must agree on steps, batch_size and calibration_rows;"
            f" these have {sorted(shared)}: train them in separate calls."
        )
    if (size := configs[0].batch_size) % mesh.data:
        raise InputError(
            f"a batch of {size} rows cannot be spread evenly over {mesh.data} processes; use a multiple of {mesh.data}."
        )
    return configs[0]


def _described(run: _Pass) -> list[dict[str, Any]]:
    return [{"class": type(config).__name__, **config.as_dict()} for config in run.configs]


def _resume(run: _Pass) -> None:
    """Go on where the checkpoint is, if there is one."""
    if run.keep is None:
        return
    if run.mesh.is_first:
        recover(run.keep.checkpoint)
        recover(run.keep.log)
    run.mesh.wait()
    found = checkpoint.load(run.keep.checkpoint, _described(run), run.inputs)
    step = 0 if found is None else found.step
    for log in run.logs:
        log.rewind(step)
    if found is None:
        return
    run.step, run.seconds, run.results = found.step, found.seconds, [(a, b, c) for a, b, c in found.last]
    run.reader.seek(found.position)
    for learner, state in zip(run.learners, found.learners, strict=True):
        learner.load_state_dict(state)
    _log.info("going on from step %d of %d", run.step, run.total)


def _go(run: _Pass, stop: Stop) -> None:
    """All updates that are left."""
    keep = run.keep
    while run.step < run.total:
        batch = {site: x.to(run.device, torch.float32) for site, x in next(run.reader).items()}
        run.latest = [learner.update(batch, run.step) for learner in run.learners]
        run.step += 1
        is_last = run.step == run.total
        if run.step % run.report_every == 0 or is_last:
            _report(run)
        if keep is None:
            continue
        if keep.evaluate_every and run.step % keep.evaluate_every == 0 and not is_last:
            _evaluate(run)
        asked = _agreed(run.mesh, stop)
        if asked is not None or run.step % keep.every == 0 or is_last:
            _save(run, keep)
        obey(asked)
    obey(_agreed(run.mesh, stop))


def _agreed(mesh: Mesh, stop: Stop) -> int | None:
    """The signal that reached this or another process; all of them then stop at the same step. Every process has to ask
    at every step.
    """
    return mesh.highest(stop.signal or 0) or None


def _measure(run: _Pass) -> None:
    """The last update as plain numbers; raises InputError when a loss is not finite."""
    if run.latest:
        run.results = [(r.loss.item(), r.fvu.item(), r.l0.item()) for r in run.latest]
    for config, (loss, _, _) in zip(run.configs, run.results, strict=True):
        if not math.isfinite(loss):
            raise _diverged(run, config, f"the loss is {loss}")


def _diverged(run: _Pass, config: TrainConfig, how: str) -> InputError:
    return InputError(
        f"training at {config.site} diverged: {how} after {run.step} steps; lower learning_rate, or look for NaN in the"
        " activations."
    )


def _report(run: _Pass) -> None:
    _measure(run)
    warned = [learner.warnings() for learner in run.learners]
    lines: dict[str, dict[str, Any]] = {}
    for name, last, now, warnings in zip(run.names, run.results, run.latest, warned, strict=True):
        lines[name] = dict(zip(("loss", "fvu", "l0"), last, strict=True))
        lines[name]["terms"] = {term: value.item() for term, value in now.terms.items()}
        if warnings:
            lines[name]["warnings"] = list(warnings)
    for log in run.logs:
        log.write(run.step, lines)
    if run.progress is not None:
        loss, fvu, l0 = (tuple(r[i] for r in run.results) for i in range(3))
        rate = run.step * run.configs[0].batch_size / max(run.elapsed, 1e-9)
        said = [f"{name}: {text}" for name, texts in zip(run.names, warned, strict=True) for text in texts]
        run.progress(Progress(run.step, run.total, loss, fvu, l0, rate, run.configs[0].batch_size, tuple(said)))


def _evaluate(run: _Pass) -> None:
    """The held-out measures of every dictionary as it stands, into the logs."""
    if run.evaluate is None:
        return
    _measure(run)
    measured = {trained.name: {"evaluation": trained.evaluation} for trained in _finished(run, run.evaluate)}
    for log in run.logs:
        log.write(run.step, measured)


def _save(run: _Pass, keep: Keeping) -> None:
    """Checkpoint, then the dictionaries one by one: what one of them takes is given back before the next."""
    _measure(run)
    _write_checkpoint(run, keep)
    for number in range(len(run.learners)):
        _export(run, keep, number)
    run.mesh.wait()


def _write_checkpoint(run: _Pass, keep: Keeping) -> None:
    """Raises InputError when a weight or a moment is not finite; what was kept before then stays."""
    states = [learner.state_dict() for learner in run.learners]
    wrong = [
        (config, name)
        for config, state in zip(run.configs, states, strict=True)
        for name, tensor in checkpoint.tensors_of(state).items()
        if tensor.is_floating_point() and tensor.numel() and not is_finite(tensor)
    ]
    if run.mesh.highest(len(wrong)):  # the first process alone has the weights, and all of them have to stop
        config, name = wrong[0] if wrong else (run.configs[0], "state")
        raise _diverged(run, config, f"its {name} is not finite")
    if run.mesh.is_first:
        position, last = run.reader.position(), [list(r) for r in run.results]
        state = Checkpoint(run.step, _described(run), run.inputs, position, states, run.elapsed, last)
        checkpoint.save(keep.checkpoint, state)


def _export(run: _Pass, keep: Keeping, number: int) -> None:
    if keep.export is None:
        return
    one = _finish(run, number, None)
    if run.mesh.is_first:
        keep.export(run.step, one)


def _finished(run: _Pass, evaluate: Evaluate | None) -> list[Trained]:
    return [_finish(run, number, evaluate) for number in range(len(run.learners))]


def _finish(run: _Pass, number: int, evaluate: Evaluate | None) -> Trained:
    learner, name, last = run.learners[number], run.names[number], run.results[number]
    config = learner.config
    dictionary, numbers = learner.finished(run.calibration)
    summary = TrainSummary(
        config=config,
        rows=run.step * config.batch_size,
        epochs=run.step * config.batch_size / run.rows,
        seconds=run.elapsed,
        scale=numbers["scale_in"],
        bandwidth=numbers["bandwidth"],
        threshold_factor=numbers["threshold_factor"],
        loss=last[0],
        fvu=last[1],
        l0=last[2],
        l0_train=numbers["l0_train"],
        l0_finished=numbers["l0"],
        dead_fraction=numbers["dead_fraction"],
        warnings=learner.warnings(),
    )
    _log.info("%s: L0 %.1f, FVU %.3f, thresholds x %.3f", name, summary.l0, summary.fvu, summary.threshold_factor)
    measured = evaluate(config, dictionary) if evaluate is not None and run.mesh.is_first else None
    return Trained(config, cast(AnyDictionary, dictionary.cpu()), summary, measured, name)
