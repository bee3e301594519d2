"""What several layers have of the one-layer learner: a target L0 in training, the limit on frequencies, rates, AuxK."""

import dataclasses
from typing import Any

import pytest
import torch

from gemscope.core.sites import Site
from gemscope.training.multilayer import MultiLayerConfig, MultiLayerLearner

SITES = [Site("resid_post", layer) for layer in (1, 2)]
CONFIG = MultiLayerConfig(
    SITES[0],
    kind="crosscoder",
    layers=(1, 2),
    d_sae=48,
    target_l0=6.0,
    steps=120,
    annealing=0.2,
    batch_size=128,
    calibration_rows=1500,
)


def rows(count: int = 3000) -> dict[Site, torch.Tensor]:
    """Two layers of the same 40 features, a few of them on a third of the rows."""
    g = torch.Generator().manual_seed(0)
    share = torch.where(torch.arange(40) < 4, 0.35, 0.08)
    sources = (torch.rand(count, 40, generator=g) < share) * (0.5 + torch.rand(count, 40, generator=g))
    return {site: sources @ torch.randn(40, 16, generator=g) + 1.0 for site in SITES}


def trained(config: MultiLayerConfig) -> tuple[MultiLayerLearner, dict[Site, torch.Tensor], list[float]]:
    data = rows()
    learner = MultiLayerLearner(config, data)
    l0: list[float] = []
    for done in range(config.steps):
        at = torch.randint(0, 3000, (config.batch_size,), generator=torch.Generator().manual_seed(done))
        l0.append(learner.update({site: x[at] for site, x in data.items()}, done).l0.item())
    return learner, data, l0


@pytest.mark.parametrize("weight", [0.0, 0.02])
def test_the_l0_in_training_ends_at_the_target(weight: float) -> None:
    """With a frequency penalty too, which pulls all thresholds upwards."""
    learner, _, l0 = trained(dataclasses.replace(CONFIG, frequency_weight=weight, frequency_scale=0.5))
    assert sum(l0[-20:]) / 20 == pytest.approx(6.0, rel=0.05)
    learner.control.done = 400  # before, it is too early to complain
    learner.control.mean, learner.control.log_ratio = 6.1, 0.01
    assert learner.warnings() == ()
    learner.control.mean, learner.control.log_ratio = 12.0, 0.7
    assert "L0 is 12.0 where 6 was asked for" in learner.warnings()[0]


def test_no_latent_of_any_layer_is_more_frequent_than_the_limit() -> None:
    learner, data, _ = trained(dataclasses.replace(CONFIG, steps=50))
    highest: list[float] = []
    for weight in (0.0, 0.02):
        learner.config = dataclasses.replace(learner.config, frequency_weight=weight, frequency_scale=0.1)
        dictionary, numbers = learner.finished(data)
        active = (dictionary.encode(torch.stack([data[site] for site in SITES], 1)) > 0).float()
        assert active.sum((1, 2)).mean().item() == pytest.approx(6.0, rel=0.01)
        assert numbers["l0"] == pytest.approx(6.0, rel=0.01)
        highest.append(active.mean(0).max().item())
    assert highest[1] <= 0.1 < highest[0]


def test_the_threshold_of_a_too_frequent_latent_rises_in_every_layer() -> None:
    data = rows(1500)
    after: list[torch.Tensor] = []
    for weight in (0.0, 1e-9):  # the penalty itself is then nothing
        learner = MultiLayerLearner(dataclasses.replace(CONFIG, frequency_weight=weight), data)
        for layer in range(2):
            learner.weights[f"threshold.{layer}"][3] = 0.0
        learner.update({site: x[:128] for site, x in data.items()}, 0)
        after.append(torch.stack([learner.weights[f"threshold.{layer}"] for layer in range(2)]))
    size = 0.5 * learner.pre_scale
    torch.testing.assert_close(after[1][:, 3] - after[0][:, 3], torch.full((2,), 0.05 * size), rtol=0.01, atol=0)


@pytest.mark.parametrize(("shape", "at_75"), [("linear", 0.25), ("cosine", 0.146447), ("constant", 1.0)])
def test_rates_follow_the_shape_that_was_asked_for(shape: Any, at_75: float) -> None:
    data = rows(1500)
    config = dataclasses.replace(CONFIG, steps=100, warmup=0.0, decay=1.0, decay_shape=shape)
    learner = MultiLayerLearner(config, data)
    seen: dict[str, float] = {}
    learner.adam.update = lambda name, weight, grad, rate: seen.__setitem__(name, rate)  # type: ignore[method-assign]
    learner.update({site: x[:128] for site, x in data.items()}, 75)
    assert seen["W_dec.0.1"] == pytest.approx(config.learning_rate * at_75, rel=1e-5)
    assert seen["threshold.1"] == pytest.approx(config.threshold_learning_rate * learner.pre_scale * at_75, rel=1e-5)


def test_aux_gives_dead_latents_a_gradient_and_no_others() -> None:
    data = rows(1500)
    found: list[dict[str, torch.Tensor]] = []
    for weight in (0.0, 1.0):
        learner = MultiLayerLearner(dataclasses.replace(CONFIG, activation="topk", aux_weight=weight), data)
        for layer in range(2):
            learner.weights[f"b_enc.{layer}"][::2] -= 0.5
        learner.idle_rows[:] = 10**6
        batch = {site: x[:600] for site, x in data.items()}
        x, y = learner._inputs(batch), learner._targets(batch)
        grads: dict[str, torch.Tensor] = {}
        learner.backward(x, y, 0, lambda name, grad, grads=grads: grads.__setitem__(name, grad))
        found.append(grads)
    dead = (learner.idle_rows > 0).view(2, -1)
    assert dead.sum() > 20
    for layer in range(2):
        difference = (found[1][f"W_enc.{layer}"] - found[0][f"W_enc.{layer}"]).norm(dim=1)
        assert difference[dead[layer]].max() > 1e-4
        assert difference[~dead[layer]].max() < 1e-6
        torch.testing.assert_close(found[1][f"b_dec.{layer}"], found[0][f"b_dec.{layer}"])
