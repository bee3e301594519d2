"""From a model's name to a suite, in stages: harvest, train, evaluate, one small dictionary of every other kind, index.

Notable:
- what a stage writes appears whole under its final name or not at all, and carries a *key*: a hash of the
  package's version, the model's weights, the stage's configuration and the keys of the stages before it;
- a run first looks for each output's key and makes only what is missing or was made from something else; so a
  run that was stopped goes on where it was, and a changed configuration remakes what depends on it;
- all dictionaries are trained in one pass over one harvest, and come out as if each had been trained alone.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gemscope import __version__
from gemscope.activations.harvest import harvest
from gemscope.activations.sets import ActivationSet, read_manifest
from gemscope.artifacts import native
from gemscope.artifacts.config import DictionaryConfig
from gemscope.core.errors import FormatError, InputError, StorageError
from gemscope.core.files import storage_error
from gemscope.core.progress import Report, StageProgress
from gemscope.core.provenance import collect
from gemscope.core.sites import Site
from gemscope.evaluation.evaluate import EvaluateConfig, evaluate
from gemscope.evaluation.result import Evaluation
from gemscope.evaluation.subject import Subject
from gemscope.features import layout
from gemscope.models.gemma import Gemma
from gemscope.models.loading import BUILT_IN
from gemscope.models.weights import weights_hash
from gemscope.suites import indexing, others
from gemscope.suites.config import QuickstartConfig
from gemscope.suites.corpus import fingerprint, heldout_text, training_text
from gemscope.suites.suite import Suite, activations_folder, dictionary_folder, evaluation_path
from gemscope.training.outcome import Progress as TrainProgress
from gemscope.training.trainer import train


@dataclass(frozen=True)
class _Run:
    """One run of the quickstart: what every stage needs."""

    gemma: Gemma
    model: str
    folder: Path
    config: QuickstartConfig
    sites: tuple[Site, ...]
    weights: str
    report: Report
    keys: dict[str, str] = field(default_factory=dict[str, str])

    def counter(self, stage: str, unit: str) -> Callable[[int, int], None]:
        """A progress function for one stage."""
        return lambda done, total: self.report(StageProgress(stage, done, total, unit))

    def remaking(self) -> None:
        """Before anything is replaced: the suite is no longer whole."""
        (self.folder / "suite.json").unlink(missing_ok=True)

    def reused(self, stage: str, unit: str, total: int) -> None:
        """Say that a stage had nothing to do."""
        self.report(StageProgress(stage, total, total, unit, reused=True))


def quickstart(
    model: str,
    folder: Path | str,
    config: QuickstartConfig | None = None,
    report: Report | None = None,
    gemma: Gemma | None = None,
) -> Suite:
    """Build the suite of ``model`` in ``folder``, or what is missing of it; ``gemma`` saves loading it again.

    Raises the errors of loading a model, SiteError for a site it does not have, InputError when the folder
    holds the suite of another model, StorageError when the disk is full.
    """
    if model not in BUILT_IN and Path(model).is_dir():
        model = str(Path(model).resolve())
    folder = Path(folder)
    _check_owner(folder, model)
    gemma = gemma or Gemma.load(model)
    config = config or QuickstartConfig()
    _sweep(folder)
    run = _Run(
        gemma=gemma,
        model=model,
        folder=folder,
        config=config,
        sites=tuple(gemma.every_layer(config.site)),
        weights=weights_hash(gemma),
        report=report or _silent,
    )
    run.keys["harvest"] = _harvest_key(run)
    _train_stage(run)
    _evaluate_stage(run)
    names = _others_stage(run)
    _index_stage(run, names)
    if (folder / "suite.json").is_file():
        return Suite.open(folder)
    about = {
        "config": config.as_dict(),
        "chat": gemma.is_chat,
        "weights_sha256": run.weights,
        "provenance": _provenance(config),
    }
    suite = Suite(run.folder, model, gemma.revision, run.sites, about, names)
    suite.save()
    return suite


def _check_owner(folder: Path, model: str) -> None:
    """Raises InputError when ``folder`` holds the suite of another model; a damaged suite.json is nobody's."""
    with suppress(FormatError):
        there = Suite.open(folder).model
        if there != model:
            raise InputError(f"{folder} holds the suite of {there}, not of {model}; choose another folder with --out.")
        return
    if (folder / "suite.json").is_file():
        (folder / "suite.json").unlink()


def _sweep(folder: Path) -> None:
    """Remove what a killed run left under temporary names."""
    for place, name in (
        ("", "activations"),
        ("", "suite.json"),
        ("dictionaries", "*"),
        ("others", "*"),
        ("evaluation", "*"),
    ):
        for ending in ("tmp", "old"):
            for path in (folder / place).glob(f".{name}.*.{ending}"):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _silent(progress: StageProgress) -> None:
    """Nothing is shown."""


def _provenance(config: QuickstartConfig) -> dict[str, Any]:
    return collect(seeds={"seed": config.seed}).as_dict()


def _key(**parts: Any) -> str:
    """A hash of everything an output depends on."""
    text = json.dumps({"gemscope": __version__, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _has_key(read: Callable[[], Mapping[str, Any]], key: str) -> bool:
    """Whether an output is there, readable and made from the same things."""
    try:
        return read().get("key") == key
    except FormatError:
        return False


def _harvest_key(run: _Run) -> str:
    return _key(
        weights=run.weights,
        text=fingerprint(run.gemma, "train", run.config.seed),
        sites=[str(site) for site in run.sites],
        tokens=run.config.tokens,
        seed=run.config.seed,
    )


def _rows(run: _Run) -> ActivationSet:
    """The harvest: read if it is there, made and written otherwise."""
    config, key, folder = run.config, run.keys["harvest"], activations_folder(run.folder)
    if _has_key(lambda: read_manifest(folder)["about"], key):
        with suppress(FormatError):
            rows = ActivationSet.load(folder)
            run.reused("harvest", "tokens", config.tokens)
            return rows
    _check_space(run)
    items = training_text(run.gemma, config.tokens, config.seed, run.counter("text", "tokens"))
    rows = harvest(
        run.gemma,
        items,
        run.sites,
        batch_tokens=config.batch_tokens,
        progress=run.counter("harvest", "tokens"),
        about={"key": key},
    )
    rows.save(folder)
    return rows


def _check_space(run: _Run) -> None:
    """Raises StorageError when the harvest will not fit on the disk, or its folder cannot be made."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run.folder).free
    except OSError as error:
        raise storage_error(run.folder, error) from error
    need = 2 * run.config.tokens * sum(run.gemma.width(site) for site in run.sites)
    if need > free:
        raise StorageError(
            f"the harvest takes {need / 1e9:.1f} GB and {run.folder} has {free / 1e9:.1f} GB free; free some space,"
            " ask for fewer tokens, or choose another folder with --out."
        )


def _train_stage(run: _Run) -> None:
    """Train the dictionaries that are not there, all in one pass."""
    configs = [run.config.train_config(site) for site in run.sites]
    for config in configs:
        run.keys[f"train {config.site}"] = _key(harvest=run.keys["harvest"], train=config.as_dict())
    missing = [config for config in configs if not _is_trained(run, config.site)]
    if not missing:
        run.reused("train", "steps", run.config.steps)
        return
    run.remaking()
    rows = _rows(run)
    count = run.counter("train", "steps")

    def progress(now: TrainProgress) -> None:
        count(now.step, now.total)

    for trained in train(rows, missing, progress=progress, device=run.gemma.device):
        site = trained.config.site
        native.save(
            dictionary_folder(run.folder, site),
            trained.dictionary,
            DictionaryConfig.of(
                trained.dictionary,
                site,
                model=run.model,
                revision=run.gemma.revision,
                l0=trained.config.target_l0,
                provenance=collect(seeds={"seed": run.config.seed}).as_dict(),
                extra={"key": run.keys[f"train {site}"], "training": trained.summary.as_dict()},
            ),
        )


def _is_trained(run: _Run, site: Site) -> bool:
    folder = dictionary_folder(run.folder, site)
    return _has_key(lambda: native.load(folder).config.extra, run.keys[f"train {site}"])


def _others_stage(run: _Run) -> tuple[str, ...]:
    """The dictionaries of the other kinds, all in one pass; their names."""
    wanted = others.others(run.gemma.shape.n_layers, run.config)
    key = run.keys["train more"] = _key(
        weights=run.weights,
        text=fingerprint(run.gemma, "train", run.config.seed),
        train=[config.as_dict() for config in wanted.configs],
        tokens=min(run.config.tokens, run.config.other_tokens),
        seed=run.config.seed,
    )
    if all(others.is_there(run.folder, name, key) for name in wanted.names):
        run.reused("train more", "steps", wanted.configs[0].steps)
        return wanted.names
    run.remaking()

    def count(stage: str, done: int, total: int, unit: str) -> None:
        run.report(StageProgress(stage, done, total, unit))

    others.build(run.gemma, run.model, run.folder, run.config, key, count)
    return wanted.names


def _index_stage(run: _Run, names: tuple[str, ...]) -> None:
    """The evidence for every latent of all dictionaries."""
    config = run.config
    tokens = min(config.tokens, config.index_tokens)
    key = _key(keys=run.keys, others=names, tokens=tokens, version=layout.VERSION)
    if indexing.is_indexed(run.folder, key):
        run.reused("index", "tokens", tokens)
        return
    run.remaking()
    indexing.build_index(run.gemma, run.folder, run.sites, names, config, key, run.counter("index", "tokens"))


def _evaluate_stage(run: _Run) -> None:
    """Measure the dictionaries that have not been measured."""
    config = run.config
    for site in run.sites:
        run.keys[f"evaluate {site}"] = _key(
            train=run.keys[f"train {site}"],
            text=fingerprint(run.gemma, "heldout", config.seed),
            heldout=config.heldout_tokens,
            splice=config.splice_tokens,
            seed=config.seed,
        )
    missing = [site for site in run.sites if not _is_evaluated(run, site)]
    if not missing:
        run.reused("evaluate", "tokens", config.heldout_tokens)
        return
    run.remaking()
    text = heldout_text(run.gemma, config.heldout_tokens, config.seed)
    subjects = [
        Subject(str(site), native.load_sae(dictionary_folder(run.folder, site)).to(run.gemma.device), (site,), (site,))
        for site in missing
    ]
    measured = evaluate(
        run.gemma,
        subjects,
        text.items,
        text.labels,
        evaluate_config(config, full=False),
        progress=run.counter("evaluate", "tokens"),
    )
    for site, evaluation in zip(missing, measured, strict=True):
        about = {**evaluation.about, "key": run.keys[f"evaluate {site}"]}
        replace(evaluation, about=about).save(evaluation_path(run.folder, site))


def evaluate_config(config: QuickstartConfig, *, full: bool) -> EvaluateConfig:
    """What is measured of a suite's dictionaries; ``full`` adds the probes and all controls, which take longer."""
    return EvaluateConfig(
        splice_tokens=config.splice_tokens,
        batch_tokens=config.batch_tokens,
        controls=full,
        probes=full,
        random_model=full,
        seed=config.seed,
    )


def _is_evaluated(run: _Run, site: Site) -> bool:
    path = evaluation_path(run.folder, site)
    return _has_key(lambda: Evaluation.load(path).about, run.keys[f"evaluate {site}"])
