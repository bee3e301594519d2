"""Finetuning on synthetic rows whose features have moved: better than staying, and than starting anew."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gemscope.artifacts import native
from gemscope.artifacts.config import DictionaryConfig
from gemscope.core.errors import InputError
from gemscope.dictionaries.base import Dictionary
from gemscope.training.config import DictionaryKind, TrainConfig
from gemscope.training.finetune import finetune_config
from gemscope.training.heldout import measured
from gemscope.training.layer_export import calibrated
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.start import taken
from gemscope.training.trainer import train
from unit.dictionaries.zoo import random_dictionary
from unit.training.worlds import SITE, MemorySource, superposition

CONFIG = TrainConfig(SITE, d_sae=96, target_l0=4.0, steps=400, batch_size=256, calibration_rows=2048)


def moved(rows: int, seed: int) -> torch.Tensor:
    """The same world after tuning: another mean, other sizes, and every direction turned a little."""
    x, _ = superposition(rows, seed=seed)
    turn = torch.eye(48) + 0.04 * torch.randn(48, 48, generator=torch.Generator().manual_seed(3))
    return 1.1 * x @ turn + 0.5


def fvu(dictionary: Dictionary) -> float:
    """At L0 4 exactly, on fresh rows of the moved world: thresholds of all that are compared are set on the same."""
    x = moved(6000, 51)
    same, _, _ = calibrated(dictionary, x[:3000, None], 4.0)
    found = measured(same, [x[3000:]], [x[3000:]])
    assert found["l0"] == pytest.approx(4.0, rel=0.1)
    return found["fvu"]


@pytest.fixture(scope="module")
def before() -> Dictionary:
    return train(MemorySource({SITE: superposition(20_000)[0]}), [CONFIG])[0].dictionary


def test_it_beats_staying_and_starting_anew(before: Dictionary) -> None:
    about = DictionaryConfig.of(before, SITE, model="m", l0=4.0)
    steps = {"steps": 80, "batch_size": 256, "calibration_rows": 2048}
    data = MemorySource({SITE: moved(20_000, 50)})
    tuned = train(data, [finetune_config(about, **steps)], start={0: before})[0].dictionary
    anew = train(data, [replace(CONFIG, **steps)])[0].dictionary
    assert fvu(tuned) < 0.95 * fvu(before)
    assert fvu(tuned) < 0.95 * fvu(anew)


def test_the_config_is_that_of_the_dictionary(before: Dictionary, tmp_path: Path) -> None:
    about = DictionaryConfig.of(before, SITE, model="m", l0=4.0)
    native.save(tmp_path / "d", before, about)  # pyright: ignore[reportArgumentType]
    loaded = native.load(tmp_path / "d")
    config = finetune_config(loaded.config, frozen=("W_dec",), steps=7)
    assert (config.kind, config.d_sae, config.target_l0, config.steps) == ("sae", 96, 4.0, 7)
    assert (config.first_l0_factor, config.frozen) == (1.0, ("W_dec",))
    unknown: Any = replace(loaded.config, l0=None)
    with pytest.raises(InputError, match="--l0"):
        finetune_config(unknown)
    assert finetune_config(unknown, l0=9.0).target_l0 == 9.0
    with pytest.raises(InputError, match="without the norm's gain"):
        finetune_config(replace(loaded.config, read_gain=False))


def test_frozen_decoders_stay_in_a_finetuned_crosscoder() -> None:
    sites = [SITE, type(SITE)("resid_post", 2)]
    data = MemorySource({s: superposition(1000, d=12, seed=i)[0] for i, s in enumerate(sites)})
    several = {"kind": "crosscoder", "layers": (1, 2), "d_sae": 16, "target_l0": 4.0}
    config = MultiLayerConfig(SITE, steps=10, batch_size=128, calibration_rows=512, **several)
    first = train(data, [config])[0].dictionary
    about = DictionaryConfig.of(first, sites, model="m", l0=4.0)
    shared = {"steps": 10, "batch_size": 128, "calibration_rows": 512}
    tuned = train(data, [finetune_config(about, frozen=("W_dec",), **shared)], start={0: first})[0].dictionary
    for old, new in zip(first.W_dec, tuned.W_dec, strict=True):
        torch.testing.assert_close(old, new, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first.W_enc[0], tuned.W_enc[0])


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip_transcoder"])
def test_a_dictionary_in_the_hosts_memory_is_taken_to_where_the_rows_are(kind: DictionaryKind) -> None:
    start = random_dictionary(kind, d_in=6, d_sae=8, dtype=torch.float32)
    target = None if kind == "sae" else SITE
    config = TrainConfig(SITE, d_sae=8, target_l0=2.0, kind=kind, target_site=target, activation=start.activation.kind)
    found = taken(config, start, 1.0, 1.0, torch.zeros(6, device="meta"), torch.ones(8))
    assert {tensor.device.type for tensor in found.values()} == {"meta"}
