"""Units of work as tasks of Ray (extra ``ray``), on a cluster or on this machine: a harvest's here.

Ray starts the workers, gives each its GPU, and starts them again when they die. What a unit is, and that it appears
whole or not at all, is the same as for one process; so are the bytes. All machines must see the same folder.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemscope.activations import locks
from gemscope.activations.finishing import finish
from gemscope.activations.harvesting import (
    Estimate,
    HarvestProgress,
    Report,
    Slice,
    check_space,
    estimate,
    missing_units,
    note_run,
    planned,
    sweep,
    write_units,
)
from gemscope.activations.plan import HarvestConfig, Plan
from gemscope.activations.sources import Source
from gemscope.core.errors import GemscopeError, InputError, reason
from gemscope.core.extras import need
from gemscope.models.gemma import Gemma

_RETRIES = 20


@dataclass(frozen=True)
class ModelSpec:
    """How a worker loads the model."""

    name: str
    revision: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class RayConfig:
    """Where the units run."""

    address: str | None = None
    """Of a running cluster (``auto`` finds it); None starts Ray in this process."""
    workers: int = 2
    cpus: float = 1.0
    """Cores of a worker."""
    gpus: float | None = None
    """GPUs of a worker; None: one where the cluster has any."""


class UnitWorker:
    """Runs in a process of its own: a loaded model that harvests the units it is told."""

    def __init__(self, _number: int, model: ModelSpec, source: Source, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._gemma = Gemma.load(model.name, revision=model.revision, dtype=model.dtype)
        self._source, self._folder = source, Path(folder)
        self._plan = Plan.read(self._folder)

    def work(self, unit: int) -> int:
        """One unit, unless it is there already; gives its number."""
        if missing_units(self._folder, self._plan, Slice(unit, self._plan.units)):
            write_units(self._gemma, self._source, self._plan, self._folder, [unit])
        return unit


def harvest_on_ray(
    folder: Path | str,
    model: ModelSpec,
    gemma: Gemma,
    source: Source,
    config: HarvestConfig,
    ray_config: RayConfig,
    *,
    progress: Report | None = None,
    on_estimate: Callable[[Estimate], None] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Plan:
    """``harvest_to``, its units run by Ray's workers; ``gemma`` is ``model`` loaded here, for the plan and the
    estimate.

    A worker that dies is started again and its unit with it. Raises InputError when Ray is not installed or cannot be
    reached, and the errors of ``harvest_to``.
    """
    folder = Path(folder).resolve()
    with locks.writing(folder, 0, 1):
        plan = planned(gemma, source, folder, config, about)
        sweep(folder)
        expected = estimate(gemma, plan, folder)
        if on_estimate is not None:
            on_estimate(expected)
        units = missing_units(folder, plan, Slice())
        if units:
            check_space(expected, folder)
            note_run(folder, Slice(), units)
            begun = time.perf_counter()

            def done(count: int) -> None:
                if progress is not None:
                    progress(_progress(plan, count, len(units), time.perf_counter() - begun))

            spread(UnitWorker, (model, source, str(folder), torch.get_num_threads()), units, ray_config, done)
        sweep(folder)
        finish(folder, plan)
    return plan


def spread(
    worker: type[Any],
    arguments: Sequence[Any],
    units: Sequence[int],
    config: RayConfig,
    done: Callable[[int], None],
) -> None:
    """Keep every worker busy with one unit until none is left; ``done`` is told how many are.

    A worker is ``worker(number, *arguments)`` in a process of its own, which gets ``work(unit)``; one that dies is
    started again with the same number, and its unit with it. Raises InputError without Ray, and what workers raise.
    """
    ray = need("ray", "ray")
    started_here = not ray.is_initialized()
    if started_here:
        _connect(ray, config)
    try:
        gpus = config.gpus if config.gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
        options = {"num_cpus": config.cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": _RETRIES}
        remote = ray.remote(worker).options(**options)
        shared = [ray.put(one) for one in arguments]
        actors = [remote.remote(number, *shared) for number in range(min(config.workers, len(units)))]
        waiting = list(reversed(units))
        busy = {actor.work.remote(waiting.pop()): actor for actor in actors}
        count = 0
        while busy:
            (ready,), _ = ray.wait(list(busy), num_returns=1)
            actor = busy.pop(ready)
            _result(ray, ready)
            count += 1
            if waiting:
                busy[actor.work.remote(waiting.pop())] = actor
            done(count)
        for actor in actors:
            ray.kill(actor)
    finally:
        if started_here:
            ray.shutdown()


def _connect(ray: Any, config: RayConfig) -> None:
    local = {"num_cpus": max(1, round(config.workers * config.cpus)), "include_dashboard": False}
    try:
        ray.init(address=config.address, log_to_driver=False, **({} if config.address else local))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"cannot reach Ray at {config.address or 'this machine'} ({reason(error)}); check --ray."
        ) from error


def _result(ray: Any, ready: Any) -> None:
    """Raise what a worker raised, as itself where it is one of ours."""
    try:
        ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, GemscopeError) else error from None
    except ray.exceptions.RayActorError as error:
        raise InputError(
            f"a Ray worker could not be started or died too often ({reason(error)}); look at Ray's logs."
        ) from error


def _progress(plan: Plan, done: int, total: int, seconds: float) -> HarvestProgress:
    rows = round(plan.documents * plan.rows_per_document / plan.units)
    return HarvestProgress(done * rows, total * rows, done * rows * (plan.row_bytes + 12), done, total, seconds)
