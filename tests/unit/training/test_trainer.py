"""The trainer on synthetic superposition: what it reads, reports and refuses, and that it repeats itself exactly."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gemscope.artifacts import native
from gemscope.artifacts.config import DictionaryConfig
from gemscope.core.errors import InputError
from gemscope.core.provenance import collect
from gemscope.core.sites import Site
from gemscope.dictionaries.base import Dictionary
from gemscope.training.config import TrainConfig
from gemscope.training.outcome import Progress, Trained
from gemscope.training.trainer import train
from unit.training.worlds import OTHER, SITE, MemorySource, superposition

QUICK = TrainConfig(SITE, d_sae=64, target_l0=4.0, steps=12, batch_size=128, calibration_rows=512)


def _config(done: Trained, **about: Any) -> DictionaryConfig:
    return DictionaryConfig.of(done.dictionary, SITE, model="m", provenance=collect().as_dict(), **about)


@pytest.fixture(scope="module")
def source() -> MemorySource:
    return MemorySource({SITE: superposition(2000)[0], OTHER: superposition(2000, d=10, seed=1)[0]})


def _bits(sae: Dictionary) -> dict[str, torch.Tensor]:
    return dict(sae.named_parameters())


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(source: MemorySource) -> None:
    first, again = (train(source, [QUICK])[0].dictionary for _ in range(2))
    other = train(source, [dataclasses.replace(QUICK, seed=1)])[0].dictionary
    for name, tensor in _bits(first).items():
        assert torch.equal(tensor, _bits(again)[name])
        assert not torch.equal(tensor, _bits(other)[name])


def test_a_dictionary_is_the_same_alone_and_beside_others(source: MemorySource) -> None:
    wide = dataclasses.replace(QUICK, d_sae=96, target_l0=8.0)
    elsewhere = dataclasses.replace(QUICK, site=OTHER)
    together = train(source, [elsewhere, QUICK, wide])
    assert [t.config for t in together] == [elsewhere, QUICK, wide]
    for config, beside in zip([elsewhere, QUICK, wide], together, strict=True):
        alone = train(source, [config])[0].dictionary
        assert all(torch.equal(tensor, _bits(alone)[name]) for name, tensor in _bits(beside.dictionary).items())


def test_each_site_is_read_once_per_batch_whatever_hangs_on_it(source: MemorySource) -> None:
    configs = [QUICK, dataclasses.replace(QUICK, d_sae=80), dataclasses.replace(QUICK, site=OTHER)]
    source.reads = 0
    train(source, configs)
    calibration_reads, sites = 512 // 128, 2
    assert source.reads == sites * (QUICK.steps + calibration_reads)


def test_progress_and_evaluation_and_summary(source: MemorySource) -> None:
    seen: list[Progress] = []
    evaluated: list[tuple[Site, int]] = []

    def evaluate(config: TrainConfig, sae: Dictionary) -> dict[str, Any]:
        evaluated.append((config.site, sae.d_sae))
        return {"l0": 3}

    config = dataclasses.replace(QUICK, steps=45)
    results = train(source, [config, dataclasses.replace(config, site=OTHER)], evaluate=evaluate, progress=seen.append)
    assert [p.step for p in seen] == [20, 40, 45]
    assert all(p.total == 45 and len(p.l0) == len(p.fvu) == len(p.loss) == 2 for p in seen)
    assert evaluated == [(SITE, 64), (OTHER, 64)]
    assert results[0].evaluation == {"l0": 3}
    summary = json.loads(json.dumps(results[0].summary.as_dict(), allow_nan=False))
    assert summary["rows"] == 45 * 128
    assert summary["epochs"] == pytest.approx(45 * 128 / 2000)
    assert summary["config"]["site"] == "resid_post.1"
    assert summary["l0"] == seen[-1].l0[0]


def test_an_interrupted_run_leaves_no_file(source: MemorySource, tmp_path: Path) -> None:
    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    def run() -> None:
        for done in train(source, [QUICK], progress=interrupt):
            native.save(tmp_path / "d", done.dictionary, _config(done))

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not list(tmp_path.iterdir())


def test_a_trained_dictionary_survives_saving(source: MemorySource, tmp_path: Path) -> None:
    done = train(source, [QUICK])[0]
    extra = {"training": done.summary.as_dict()}
    native.save(tmp_path / "d", done.dictionary, _config(done, extra=extra))
    loaded = native.load(tmp_path / "d")
    for name, tensor in done.dictionary.named_parameters():
        assert torch.equal(loaded.dictionary.get_parameter(name), tensor)
    assert loaded.config.extra["training"]["config"]["target_l0"] == 4.0


def test_stored_bf16_rows_can_be_trained_on(source: MemorySource) -> None:
    half = MemorySource({SITE: source.data[SITE].bfloat16()})
    assert train(half, [QUICK])[0].dictionary.W_enc.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(bad: float, source: MemorySource) -> None:
    x = source.data[SITE].clone()
    x[:, 3] = bad
    with pytest.raises(InputError, match=r"resid_post\.1"):
        train(MemorySource({SITE: x}), [QUICK])


def test_a_few_bad_rows_are_noticed_during_training(source: MemorySource) -> None:
    x = source.data[SITE].clone()
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    x[order[1000]] = float("nan")  # after the calibration rows of seed 0, epoch 0
    with pytest.raises(InputError, match="diverged"):
        train(MemorySource({SITE: x}), [QUICK])


def test_constant_activations_and_too_few_rows_are_refused() -> None:
    with pytest.raises(InputError, match="nothing can be learned"):
        train(MemorySource({SITE: torch.ones(600, 8)}), [QUICK])
    with pytest.raises(InputError, match="fewer than one batch of 128"):
        train(MemorySource({SITE: torch.randn(100, 8)}), [QUICK])


def test_configs_of_one_pass_must_agree(source: MemorySource) -> None:
    with pytest.raises(InputError, match="agree"):
        train(source, [QUICK, dataclasses.replace(QUICK, steps=13)])
    with pytest.raises(InputError, match="at least one"):
        train(source, [])


@pytest.mark.parametrize(
    "change",
    [
        {"target_l0": 64.0},
        {"target_l0": 0.0},
        {"target_l0": float("nan")},
        {"steps": 0},
        {"bandwidth": 0.0},
        {"learning_rate": -1.0},
        {"warmup": 1.5},
        {"first_l0_factor": 0.0},
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        dataclasses.replace(QUICK, **change)
