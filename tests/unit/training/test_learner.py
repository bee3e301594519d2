"""One update: initial weights, constraints after every step, and the gradient of the whole objective."""

import dataclasses

import pytest
import torch

from gemscope.dictionaries.activations import jump_relu, step
from gemscope.dictionaries.sae import SAE
from gemscope.training.config import TrainConfig
from gemscope.training.data import moments
from gemscope.training.single import SingleLayerLearner, remove_parallel
from unit.training.worlds import SITE, superposition

CONFIG = TrainConfig(SITE, d_sae=64, target_l0=4.0, first_l0_factor=1.5, steps=50, batch_size=256)


def _learner(config: TrainConfig = CONFIG) -> tuple[SingleLayerLearner, torch.Tensor]:
    x, _ = superposition(4096)
    return SingleLayerLearner(config, {SITE: x}), x


def test_moments_are_those_of_the_rows() -> None:
    x, _ = superposition(3000)
    found = moments(x, SITE)
    assert (x / found.scale).square().sum(1).mean().item() == pytest.approx(1.0, rel=1e-5)
    around = (x / found.scale - x.mean(0) / found.scale).square().sum(1).mean().item()
    assert found.spread == pytest.approx(around, rel=1e-4)
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-4, atol=1e-4)


def test_initial_weights() -> None:
    learner, x = _learner()
    w = learner.weights
    assert torch.equal(w["W_enc"], w["W_dec"].T)
    torch.testing.assert_close(w["W_dec"].norm(dim=1), torch.ones(64))
    assert not w["b_enc"].any()
    torch.testing.assert_close(w["b_dec"] * learner.moments.scale, x.mean(0), rtol=1e-4, atol=1e-4)
    centred = (x - x.mean(0)) / learner.moments.scale @ w["W_enc"]
    assert (centred > w["threshold"]).float().sum(1).mean().item() == pytest.approx(6.0, rel=0.02)
    assert w["threshold"].dtype == torch.float32


def test_constraints_hold_after_every_step() -> None:
    learner, x = _learner(dataclasses.replace(CONFIG, threshold_learning_rate=5.0))
    reached_zero = False
    for done in range(20):
        learner.update({SITE: x[done * 128 : (done + 1) * 128]}, done)
        torch.testing.assert_close(learner.weights["W_dec"].norm(dim=1), torch.ones(64), rtol=0, atol=1e-6)
        assert learner.weights["threshold"].min() >= 0
        reached_zero |= bool((learner.weights["threshold"] == 0).any())
    assert reached_zero, "the threshold's clamp was never tried"


def test_remove_parallel_leaves_only_what_turns_the_rows() -> None:
    W_dec = torch.nn.functional.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1)
    grad = torch.randn(7, 5, dtype=torch.float64)
    before = grad.clone()
    remove_parallel(grad, W_dec)
    torch.testing.assert_close((grad * W_dec).sum(1), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)
    removed = before - grad
    along = (removed * W_dec).sum(1, keepdim=True) * W_dec
    torch.testing.assert_close(removed, along, rtol=0, atol=1e-12)


def test_the_optimiser_sees_no_parallel_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, x = _learner()
    seen: list[float] = []

    def look() -> None:
        W_dec = learner.weights["W_dec"]
        assert W_dec.grad is not None
        seen.append((W_dec.grad * W_dec).sum(1).abs().max().item() / W_dec.grad.norm(dim=1).max().item())

    monkeypatch.setattr(learner.optimizer, "step", look)
    learner.update({SITE: x[:256]}, 0)
    assert seen[0] < 1e-6


def test_one_update_follows_the_whole_objective_written_densely() -> None:
    """Gradients of Gemma Scope 2's eq. 5 with the pre-encoder bias, over all latents by dense autograd; the target
    still stands at 1.5 * 4."""
    config = dataclasses.replace(CONFIG, sparsity_warmup=0.0, dead_weight=0.0)
    learner, _ = _learner(config)
    x, _ = superposition(256, seed=5)  # not the calibration rows, some of which lie exactly on a threshold
    w = {name: tensor.detach().clone().requires_grad_() for name, tensor in learner.weights.items()}
    rows = x / learner.moments.scale
    pre_acts = (rows - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    recon = jump_relu(pre_acts, w["threshold"], learner.bandwidth) @ w["W_dec"] + w["b_dec"]
    l0 = step(pre_acts, w["threshold"], learner.bandwidth).sum(1)
    weight = config.sparsity_weight * learner.moments.spread
    loss = ((rows - recon).square().sum(1) + weight * 2 / 6.0 * (l0 - 6.0).square()).mean()
    loss.backward()
    grad_dec = w["W_dec"].grad
    assert grad_dec is not None
    remove_parallel(grad_dec, w["W_dec"].detach())

    found: dict[str, torch.Tensor] = {}
    step_once = learner.optimizer.step

    def keep() -> None:
        found.update({name: tensor.grad.clone() for name, tensor in learner.weights.items() if tensor.grad is not None})
        step_once()

    learner.optimizer.step = keep  # type: ignore[method-assign]
    result = learner.update({SITE: x}, 0)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert result.l0.item() == pytest.approx(l0.mean().item(), rel=1e-6)
    for name, tensor in w.items():
        assert tensor.grad is not None
        torch.testing.assert_close(found[name], tensor.grad, rtol=1e-3, atol=2e-6)


def test_learning_rates_follow_the_schedule_and_thresholds_have_their_own() -> None:
    config = dataclasses.replace(CONFIG, steps=100, warmup=0.1, decay=0.5)
    learner, x = _learner(config)
    pre_scale = learner.bandwidth / config.bandwidth
    for done, factor in [(0, 0.1), (10, 1.0), (50, 1.0), (75, 0.5), (99, 0.02)]:
        learner.update({SITE: x[:64]}, done)
        rates = [group["lr"] for group in learner.optimizer.param_groups]
        assert rates[0] == pytest.approx(config.learning_rate * factor)
        assert rates[1] == pytest.approx(config.threshold_learning_rate * pre_scale * factor)
        assert learner.optimizer.param_groups[1]["params"][0] is learner.weights["threshold"]


def test_training_is_indifferent_to_the_scale_of_the_activations() -> None:
    """A power of two changes no bit of the arithmetic, so the finished dictionaries differ by exactly that
    factor.
    """
    finished: list[SAE] = []
    for scale in (1.0, 64.0):
        x = superposition(4096)[0] * scale
        learner = SingleLayerLearner(CONFIG, {SITE: x})
        for done in range(10):
            learner.update({SITE: x[done * 256 : (done + 1) * 256]}, done)
        finished.append(learner.finished({SITE: x})[0])
    small, large = finished
    assert torch.equal(small.W_enc, large.W_enc)
    assert torch.equal(small.W_dec, large.W_dec)
    for name in ("b_enc", "b_dec", "threshold"):
        torch.testing.assert_close(small.get_parameter(name) * 64, large.get_parameter(name), rtol=1e-6, atol=0)


def test_the_finished_dictionary_does_on_raw_rows_what_training_did_on_scaled_ones() -> None:
    learner, x = _learner()
    for done in range(10):
        learner.update({SITE: x[done * 256 : (done + 1) * 256]}, done)
    finished, numbers = learner.finished({SITE: x})
    factor = numbers["threshold_factor"]
    w = learner.weights
    pre_acts = (x / learner.moments.scale - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    acts = torch.where(pre_acts > factor * w["threshold"], pre_acts, 0.0)
    recon = (acts @ w["W_dec"] + w["b_dec"]) * learner.moments.scale
    same = ((finished.encode(x) > 0) == (acts > 0)).all(1)  # rounding may decide a row that sits on a threshold
    assert same.float().mean() > 0.999
    torch.testing.assert_close(finished(x)[same], recon.detach()[same], rtol=1e-4, atol=1e-4)


def test_dead_latents_are_counted_in_rows_and_drawn_back() -> None:
    config = dataclasses.replace(CONFIG, dead_after_rows=1000, dead_weight=1e-2)
    learner, x = _learner(config)
    with torch.no_grad():
        learner.weights["threshold"][5] = 100.0
    learner.update({SITE: x[:600]}, 0)
    assert learner.idle_rows[5] == 600
    assert learner.weights["threshold"][5] == 100.0
    learner.update({SITE: x[600:1200]}, 1)
    assert learner.idle_rows[5] == 1200
    assert learner.weights["threshold"][5] < 100.0
    assert learner.idle_rows[learner.weights["threshold"] < 1].min() == 0
