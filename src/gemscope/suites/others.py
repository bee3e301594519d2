"""The other kinds of dictionary in a suite: SAEs at two more sites, transcoders, a CLT, a crosscoder.

Small ones, trained in one pass on a harvest of their own that is not kept, so that a suite holds one example of
everything; the residual SAEs are its headline. Each has its measures in its config, under ``evaluation``.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemscope.activations.harvest import harvest
from gemscope.artifacts import native
from gemscope.artifacts.config import DictionaryConfig, Loaded
from gemscope.core.errors import FormatError
from gemscope.core.provenance import collect
from gemscope.core.sites import Site
from gemscope.evaluation.splice import splice_losses
from gemscope.evaluation.subject import Subject
from gemscope.models.gemma import Gemma
from gemscope.suites.config import QuickstartConfig
from gemscope.suites.corpus import heldout_text, training_text
from gemscope.training.config import TrainConfig
from gemscope.training.heldout import HeldOut
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.outcome import Progress, Trained
from gemscope.training.trainer import names_of, train

Count = Callable[[str, int, int, str], None]
"""Called with (stage, done, total, unit)."""


@dataclass(frozen=True)
class Others:
    """What is to be trained beside the headline."""

    configs: tuple[TrainConfig, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of their folders."""
        return tuple(names_of(self.configs))

    @property
    def sites(self) -> list[Site]:
        """Everything that has to be harvested."""
        return list(dict.fromkeys(site for config in self.configs for site in config.sites))


def others(n: int, config: QuickstartConfig) -> Others:
    """Of a model of ``n`` layers: SAEs at ``z`` and ``mlp_out`` of the middle one, transcoders there with and without
    skip, a CLT over all layers, a crosscoder over up to four.
    """
    middle, every = n // 2, tuple(range(n))
    four = tuple(sorted({round(share * (n - 1)) for share in (0.25, 0.5, 0.65, 0.85)})) if n > 1 else ()
    shared: dict[str, Any] = {
        "steps": min(config.steps, config.other_steps),
        "batch_size": min(config.batch_size, config.other_batch_size),
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "calibration_rows": 4096,
    }
    least = int(2 * config.target_l0) + 1
    one: dict[str, Any] = {**shared, "d_sae": max(config.d_sae // 2, least), "target_l0": config.target_l0}
    many: dict[str, Any] = {
        **shared,
        "d_sae": max(config.d_sae // 4, least),
        "target_l0": config.target_l0 * config.other_l0_factor,
    }
    read, written = Site("mlp_in", middle), Site("mlp_out", middle)
    found = [
        TrainConfig(Site("z", middle), **one),
        TrainConfig(written, **one),
        TrainConfig(read, kind="transcoder", target_site=written, **one),
        TrainConfig(read, kind="skip_transcoder", target_site=written, **one),
    ]
    if n > 1:
        written = Site("mlp_out", 0)
        found.append(
            MultiLayerConfig(Site("mlp_in", 0), kind="clt", target_site=written, layers=every, skip=True, **many)
        )
    if len(four) > 1:
        found.append(MultiLayerConfig(Site("resid_post", four[0]), kind="crosscoder", layers=four, **many))
    return Others(tuple(found))


def folder_of(folder: Path, name: str) -> Path:
    """One of the other dictionaries of the suite in ``folder``."""
    return folder / "others" / name


def is_there(folder: Path, name: str, key: str) -> bool:
    """Whether it was made from the same things."""
    with suppress(FormatError):
        return native.read_config(folder_of(folder, name)).extra.get("key") == key
    return False


def load(folder: Path, name: str) -> Loaded:
    """One of them; raises FormatError."""
    return native.load(folder_of(folder, name))


def build(gemma: Gemma, model: str, folder: Path, config: QuickstartConfig, key: str, count: Count) -> None:
    """Harvest, train and measure all of them, and write each into ``folder``."""
    wanted = others(gemma.shape.n_layers, config)

    def counter(stage: str, unit: str) -> Callable[[int, int], None]:
        return lambda done, total: count(stage, done, total, unit)

    tokens = min(config.tokens, config.other_tokens)
    items = training_text(gemma, tokens, config.seed)
    rows = harvest(
        gemma, items, wanted.sites, batch_tokens=config.batch_tokens, progress=counter("harvest more", "tokens")
    )
    text = heldout_text(gemma, min(config.heldout_tokens, max(2000, tokens // 10)), config.seed).items
    held = harvest(gemma, text, wanted.sites, batch_tokens=config.batch_tokens)

    def progress(now: Progress) -> None:
        count("train more", now.step, now.total, "steps")

    measure = HeldOut(held, wanted.sites, min(held.rows, 8192))
    done = train(rows, wanted.configs, evaluate=measure, progress=progress, device=gemma.device)
    means = {site: held[site].float().mean(0) for site in wanted.sites}
    few = text[: max(1, min(len(text), config.splice_tokens // 200))]
    subjects = [Subject(one.name, one.dictionary.to(gemma.device), one.config.reads, one.config.writes) for one in done]
    losses, _ = splice_losses(gemma, subjects, means, few, batch_tokens=config.batch_tokens)
    for one, spliced in zip(done, losses, strict=True):
        _save(gemma, model, folder, one, key, {**(one.evaluation or {}), "loss": spliced.loss.as_dict()})


def _save(gemma: Gemma, model: str, folder: Path, one: Trained, key: str, evaluation: Mapping[str, Any]) -> None:
    about = DictionaryConfig.of(
        one.dictionary,
        one.config.reads,
        one.config.writes,
        model=model,
        revision=gemma.revision,
        l0=one.config.target_l0,
        provenance=collect(seeds={"seed": one.config.seed}).as_dict(),
        extra={"key": key, "training": one.summary.as_dict(), "evaluation": dict(evaluation)},
    )
    native.save(folder_of(folder, one.name), one.dictionary.cpu(), about)
