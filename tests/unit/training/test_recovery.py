"""What training finds in a world of known features, measured against the truth and against chance.

No limit here was read off a result. They follow from the world: a feature counts as found when a latent is closer
to it than any other true feature is, so that it can be taken for nothing else; and the true directions themselves,
used as a dictionary with the same number of active latents, say what error is good.
"""

import functools
from typing import Any

import pytest
import torch

from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.single import SingleLayer
from gemscope.training.calibration import common_threshold
from gemscope.training.config import TrainConfig
from gemscope.training.single import SingleLayerLearner
from unit.training.worlds import OTHER, SITE, superposition

D, FEATURES, ACTIVE = 48, 64, 4.0


def _train(
    config: TrainConfig, rows: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor] | None = None
) -> tuple[SingleLayer, dict[str, float]]:
    """Trained on ``rows``, thresholds calibrated on ``other`` ones, else on the last of them."""
    learner = SingleLayerLearner(config, {site: x[: config.calibration_rows] for site, x in rows.items()})
    batches = len(rows[SITE]) // config.batch_size
    for done in range(config.steps):
        part = slice(done % batches * config.batch_size, (done % batches + 1) * config.batch_size)
        learner.update({site: x[part] for site, x in rows.items()}, done)
    assert learner.warnings() == ()
    other = other or {site: x[-config.calibration_rows :] for site, x in rows.items()}
    dictionary, numbers = learner.finished(other)
    assert isinstance(dictionary, SingleLayer)
    return dictionary, numbers


def _fvu(recon: torch.Tensor, y: torch.Tensor) -> float:
    return ((y - recon).square().sum() / (y - y.mean(0)).square().sum()).item()


def _truth(x: torch.Tensor, features: torch.Tensor, l0: float) -> SAE:
    """The true directions, each read by its own inner product, above one threshold that gives the L0: what a
    dictionary with tied weights could be at best."""
    mean = x.mean(0)
    bias = -(features @ mean)
    level = common_threshold(x, features, bias, l0)
    threshold = torch.full_like(bias, level)
    W = features.T.contiguous()
    return SAE(W, bias, features.clone(), mean, threshold, activation=Activation("jumprelu"))


@functools.cache
def _world() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return superposition(60_000)[0], superposition(20_000, seed=99)[0], superposition(1)[1]


@pytest.mark.parametrize("activation", ["jumprelu", "topk", "batchtopk"])
def test_the_features_are_found(activation: Any) -> None:
    x, held_out, features = _world()
    config = TrainConfig(SITE, d_sae=96, target_l0=ACTIVE, steps=1000, batch_size=512, activation=activation)
    sae, numbers = _train(config, {SITE: x})

    found = (torch.nn.functional.normalize(sae.W_dec, dim=1) @ features.T).amax(0)
    nearest_other = (features @ features.T - torch.eye(FEATURES)).amax(0)
    chance = torch.nn.functional.normalize(torch.randn(200, 96, D), dim=-1) @ features.T
    assert (found > nearest_other).float().mean() >= 0.95  # all but the share that may be dead
    assert found.mean() > chance.amax((0, 1)).mean()  # better than the best of 200 random dictionaries

    l0 = len(sae.encode_sparse(held_out)[1]) / len(held_out)
    assert l0 == pytest.approx(ACTIVE, rel=0.05)
    assert numbers["l0"] == pytest.approx(ACTIVE, rel=0.01)
    assert numbers["l0_train"] == pytest.approx(ACTIVE, rel=0.05)  # the controller alone, before the calibration
    assert _fvu(sae(held_out), held_out) <= _fvu(_truth(x, features, ACTIVE)(held_out), held_out)


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder"])
def test_a_transcoder_beats_the_best_linear_map(kind: Any) -> None:
    """y is a saturating function of the features through other directions; a linear map of x is what the skip
    connection could do alone."""
    x, held_out, features = _world()
    turn = torch.randn(FEATURES, D, generator=torch.Generator().manual_seed(3))

    def answer(rows: torch.Tensor) -> torch.Tensor:
        return ((rows - x.mean(0)) @ features.T / 5 - 0.5).relu() @ turn

    y, wanted = answer(x), answer(held_out)
    steps = 1000
    config = TrainConfig(SITE, d_sae=128, target_l0=8.0, steps=steps, batch_size=512, kind=kind, target_site=OTHER)
    dictionary, numbers = _train(config, {SITE: x, OTHER: y})
    one = torch.ones(len(x), 1)
    linear = torch.linalg.lstsq(torch.cat([x, one], 1), y).solution
    best = torch.cat([held_out, torch.ones(len(held_out), 1)], 1) @ linear
    assert _fvu(dictionary(held_out), wanted) < _fvu(best, wanted)
    assert numbers["l0"] == pytest.approx(8, rel=0.01)


def _large_world(rows: int, seed: int) -> torch.Tensor:
    parts = range(seed, seed + rows // 20_000)
    return torch.cat([superposition(20_000, d=128, features=512, active=20.0, seed=part)[0] for part in parts])


@functools.cache
def _large() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _large_world(400_000, 0), _large_world(20_000, 98), _large_world(20_000, 99)


@pytest.mark.slow
@pytest.mark.parametrize("target", [10.0, 20.0, 50.0, 100.0])
def test_the_l0_that_was_asked_for_with_no_dense_and_no_dead_latents(target: float) -> None:
    """On held-out rows within 5 %, thresholds calibrated on yet others."""
    x, other, held_out = _large()
    steps = 1500 if target < 100 else 2500  # five times what is there has to be learned first
    config = TrainConfig(SITE, d_sae=4096, target_l0=target, steps=steps, batch_size=512, frequency_weight=0.1)
    sae, numbers = _train(config, {SITE: x}, {SITE: other})
    support, _ = sae.encode_sparse(held_out)
    frequency = torch.bincount(support.latents, minlength=4096) / len(held_out)
    assert len(support.rows) / len(held_out) == pytest.approx(target, rel=0.05)
    assert frequency.max() <= 0.1
    assert (frequency == 0).float().mean() < 0.05
    assert numbers["l0_train"] == pytest.approx(target, rel=0.05)  # as the controller left it
