"""A whole training run in a folder: dictionaries, log, checkpoint, report; the same call again goes on.

dictionaries/NAME/    one folder a dictionary, native format, for raw activations; replaced at every checkpoint
checkpoint/           see ``checkpoint``
log.jsonl             see ``log``
report.json, .html, .png
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemscope.artifacts import native
from gemscope.artifacts.config import DictionaryConfig
from gemscope.core.files import recover
from gemscope.core.provenance import collect
from gemscope.dictionaries.base import Dictionary
from gemscope.training.config import TrainConfig
from gemscope.training.data import ActivationSource
from gemscope.training.heldout import HeldOut
from gemscope.training.log import Log
from gemscope.training.outcome import Evaluate, Keeping, Progress, Trained
from gemscope.training.sharding import ALONE, Mesh
from gemscope.training.sweep import REPORT, Point, write_report
from gemscope.training.trainer import names_of, train


@dataclass(frozen=True)
class RunOptions:
    """Where a run happens and what it leaves."""

    folder: Path
    model: str
    """Name of the model whose activations are read."""
    revision: str | None = None
    checkpoint_every: int = 1000
    """Updates."""
    evaluate_every: int | None = 500
    """Updates between held-out measures; None: at the end only."""
    logs: tuple[Log, ...] = ()
    title: str = "Sweep"


def run(
    data: ActivationSource,
    heldout: ActivationSource,
    configs: Sequence[TrainConfig],
    options: RunOptions,
    *,
    start: Mapping[int, Dictionary] | None = None,
    progress: Callable[[Progress], None] | None = None,
    device: torch.device | None = None,
    mesh: Mesh = ALONE,
    measure: Evaluate | None = None,
) -> list[Trained]:
    """Train, with everything that is worth keeping in ``options.folder``; ``measure`` adds to the held-out numbers of
    the finished dictionaries (``delta_loss``). Raises what ``train`` raises, and StorageError.
    """
    if mesh.is_first:
        for name in names_of(configs):
            recover(options.folder / "dictionaries" / name)
        for name in REPORT:
            recover(options.folder / name)
    held = HeldOut(heldout, [site for config in configs for site in config.sites])

    def export(step: int, one: Trained) -> None:
        save(options, one, step)

    keep = Keeping(options.folder, options.checkpoint_every, export, options.evaluate_every, options.logs)
    done = train(
        data,
        configs,
        evaluate=held,
        progress=progress,
        device=device,
        keep=keep,
        start=start,
        heldout=heldout,
        mesh=mesh,
    )
    if not mesh.is_first:
        return done
    finished: list[Trained] = []
    for one in done:
        numbers = dict(one.evaluation or {}) | dict(measure(one.config, one.dictionary) if measure else {})
        finished.append(Trained(one.config, one.dictionary, one.summary, numbers, one.name))
        save(options, finished[-1], one.config.steps)
    write_report(options.folder, [point_of(one) for one in finished], options.title)
    return finished


def save(options: RunOptions, one: Trained, step: int) -> Path:
    """Write one dictionary; its folder."""
    folder = options.folder / "dictionaries" / one.name
    extra: dict[str, Any] = {"step": step, "training": one.summary.as_dict()}
    if one.evaluation is not None:
        extra["evaluation"] = dict(one.evaluation)
    about = DictionaryConfig.of(
        one.dictionary,
        one.config.reads,
        one.config.writes,
        model=options.model,
        revision=options.revision,
        l0=one.config.target_l0,
        provenance=collect(seeds={"seed": one.config.seed}).as_dict(),
        extra=extra,
    )
    native.save(folder, one.dictionary, about)
    return folder


def point_of(one: Trained) -> Point:
    """The dictionary in a report; its evaluation must hold the held-out ``l0`` and ``fvu``."""
    config, found = one.config, one.evaluation or {}
    where = config.site.name + (".all" if config.layers else f".{config.site.layer}")
    return Point(
        name=one.name,
        kind=config.kind,
        place=f"{where} {config.activation}",
        d_sae=config.d_sae,
        l0=float(found["l0"]),
        fvu=float(found["fvu"]),
        delta_loss=found.get("delta_loss"),
        seed=config.seed,
    )
