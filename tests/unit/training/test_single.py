"""One update of every kind: initial weights, constraints, and the gradient of the whole objective."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch

from gemscope.core.errors import InputError
from gemscope.dictionaries.activation import Activation, is_largest
from gemscope.dictionaries.single import SingleLayer
from gemscope.training.config import TrainConfig
from gemscope.training.objectives import sampled_prefixes
from gemscope.training.outer import OuterGradient
from gemscope.training.single import SingleLayerLearner
from gemscope.training.start import CLASSES
from unit.training.worlds import OTHER, SITE, superposition

CONFIG = TrainConfig(SITE, d_sae=64, target_l0=4.0, first_l0_factor=1.5, steps=50, batch_size=256)
TRANSCODER: dict[str, Any] = {"kind": "transcoder", "target_site": OTHER}
SKIP: dict[str, Any] = {"kind": "skip_transcoder", "target_site": OTHER}


def _rows(count: int = 4096, seed: int = 0) -> dict[Any, torch.Tensor]:
    x = superposition(count, seed=seed)[0].double()
    turn = torch.randn(48, 10, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return {SITE: x, OTHER: (x @ turn).tanh() * 3 + 1}


def _learner(config: TrainConfig = CONFIG, **given: Any) -> SingleLayerLearner:
    return SingleLayerLearner(config, _rows(), **given)


def _gradients(learner: SingleLayerLearner, rows: dict[Any, torch.Tensor], done: int) -> dict[str, torch.Tensor]:
    """Of one update, before the optimiser changes anything; all in one dict with the loss."""
    tables = {name: OuterGradient(tuple(learner.weights[name].shape)) for name in ("E", "W_dec")}
    x, y = rows[SITE] / learner.moments_in.scale, rows[learner.config.writes[0]] / learner.moments_out.scale
    result = learner._backward(x, y, done, tables)
    found = {name: table.dense() for name, table in tables.items()} | {"loss": result.loss, "l0": result.l0}
    found |= {name: t.grad.clone() for name, t in learner.small.items() if t.grad is not None}
    learner.optimizer.zero_grad()
    return found


class _Jump(torch.autograd.Function):
    """z 1[z > t] and 1[z > t] with rectangular kernels, written out for one pair of numbers after the other."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, t: torch.Tensor, width: float, reach: bool) -> tuple[Any, Any]:
        ctx.save_for_backward(z, t)
        ctx.width, ctx.reach = width, reach
        return torch.where(z > t, z, 0.0), (z > t).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        z, t = ctx.saved_tensors
        kernel = ((z - t) / ctx.width).abs().lt(0.5).to(z.dtype) / ctx.width
        estimate = kernel * (t * grads[0] + grads[1])
        return torch.where(z > t, grads[0], 0.0) + ctx.reach * estimate, -estimate.sum(0), None, None


def _dense_objective(learner: SingleLayerLearner, rows: dict[Any, torch.Tensor], done: int) -> dict[str, torch.Tensor]:
    """The whole objective over all latents by dense autograd, from the papers' formulas."""
    c = learner.config
    w = {name: t.detach().clone().requires_grad_() for name, t in learner.weights.items()}
    x, y = rows[SITE] / learner.moments_in.scale, rows[c.writes[0]] / learner.moments_out.scale
    centred = x - (w["b_dec"] if c.kind == "sae" else learner.centre)
    z = centred @ w["E"].T + w["b_enc"]
    slope = c.tanh_scale / learner.pre_scale
    target = c.first_l0 * (c.target_l0 / c.first_l0) ** min(1.0, done / (c.annealing * c.steps))
    if c.activation == "jumprelu":
        acts, active = _Jump.apply(z, w["threshold"], learner.bandwidth, c.ste_to_input)  # type: ignore[misc]
    else:
        kept = torch.ones_like(z, dtype=torch.bool)
        if c.activation == "topk":
            kept = is_largest(z.detach(), int(c.target_l0))
        elif c.activation == "batchtopk":
            kept = is_largest(z.detach().view(1, -1), round(target * len(z))).view_as(z)
        acts = z.relu() * kept
        active = (slope * acts).tanh()
    base = w["b_dec"] + (centred @ w["W_skip"] if "W_skip" in w else 0)
    cuts = c.prefixes or (sampled_prefixes(c.d_sae, c.sampled_prefixes, c.seed, done) if c.sampled_prefixes else ())
    recons = [acts[:, :p] @ w["W_dec"][:p] + base for p in (*cuts, c.d_sae)]
    loss = sum((y - r).square().sum(1).mean() for r in recons) / len(recons)
    spread = learner.moments_out.spread
    ramp = min(1.0, done / (c.sparsity_warmup * c.steps)) if c.sparsity_warmup else 1.0
    if c.penalised:
        l0 = active.sum(1)
        penalty = {
            "quadratic": lambda: (2 / target * (l0 - target).square()).mean(),
            "linear": lambda: l0.mean(),
            "tanh": lambda: (slope * acts).tanh().sum(1).mean(),
            "l1": lambda: (acts / learner.pre_scale).sum(1).mean(),
        }[c.sparsity]()
        loss = loss + c.sparsity_weight * spread * ramp * penalty
    if c.frequency_weight:
        p = active.mean(0)
        loss = loss + c.frequency_weight * spread * ramp * (p * (1 + p / c.frequency_scale)).sum()
    idle = learner.idle_rows + len(x)
    idle[(acts.detach() != 0).any(0)] = 0
    dead = idle > c.dead_after_rows
    if dead.any() and c.penalised:
        constant = x - (w["b_dec"].detach() if c.kind == "sae" else learner.centre)
        theta = w["threshold"] if "threshold" in w else torch.zeros_like(w["b_enc"])
        gaps = (theta - constant @ w["E"].T - w["b_enc"]).relu()[:, dead]
        loss = loss + c.dead_weight * spread * gaps.sum(1).mean()
    elif dead.any():
        constant = x - (w["b_dec"].detach() if c.kind == "sae" else learner.centre)
        own = (constant @ w["E"].T + w["b_enc"])[:, dead]
        own = own.relu() * is_largest(own.detach(), min(c.aux_k or y.shape[1] // 2, int(dead.sum())))
        left = (y - recons[-1]).detach()
        loss = loss + c.aux_weight * (left - own @ w["W_dec"][dead]).square().sum(1).mean()
    loss.backward()
    found = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in w.items()}
    return found | {"loss": loss.detach(), "l0": (acts.detach() != 0).sum(1).double().mean()}


CASES: dict[str, dict[str, Any]] = {
    "jumprelu": {},
    "no warm-up": {"sparsity_warmup": 0.0},
    "to input": {"ste_to_input": True},
    "frequency": {"frequency_weight": 0.5, "frequency_scale": 0.05},
    "linear": {"sparsity": "linear"},
    "tanh": {"sparsity": "tanh"},
    "relu l1": {"activation": "relu", "sparsity": "l1"},
    "relu tanh": {"activation": "relu", "sparsity": "tanh"},
    "topk": {"activation": "topk"},
    "batchtopk": {"activation": "batchtopk", "target_l0": 3.7},
    "batchtopk annealed": {"activation": "batchtopk", "first_k_factor": 3.0},
    "topk frequency": {"activation": "topk", "frequency_weight": 0.5},
    "matryoshka": {"prefixes": (8, 20)},
    "matryoshka topk": {"prefixes": (8, 20), "activation": "topk"},
    "matryoshka batchtopk": {"prefixes": (8,), "activation": "batchtopk"},
    "sampled": {"sampled_prefixes": 4},
    "transcoder": TRANSCODER,
    "transcoder topk": TRANSCODER | {"activation": "topk"},
    "skip": SKIP,
    "skip batchtopk": SKIP | {"activation": "batchtopk", "prefixes": (16,)},
    "aux": {"activation": "topk", "dead_after_rows": 300, "aux_weight": 0.5},
    "aux k": {"activation": "batchtopk", "dead_after_rows": 300, "aux_k": 2},
    "aux skip": SKIP | {"activation": "topk", "dead_after_rows": 300},
    "dead": {"dead_after_rows": 300},
    "dead transcoder": TRANSCODER | {"dead_after_rows": 300},
    "dead relu": {"activation": "relu", "sparsity": "tanh", "dead_after_rows": 300},
}


@pytest.mark.parametrize("screen", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_that_of_the_dense_objective(case: str, screen: bool) -> None:
    """All estimators, AuxK, skip, prefixes and the bf16 screen, to 1e-6 of each gradient's size; in float64."""
    product = "bfloat16" if screen else "float32"
    config = dataclasses.replace(CONFIG, **(CASES[case] | {"product_dtype": product}))
    learner = _learner(config)
    with torch.no_grad():  # somewhere in general: nothing symmetric, nothing zero
        torch.manual_seed(1)
        for name, tensor in learner.weights.items():
            tensor += 0.02 * torch.randn_like(tensor) * (0.2 if name == "threshold" else 1)
        learner.weights["W_dec"] /= learner.weights["W_dec"].norm(dim=1, keepdim=True)
        if config.dead_after_rows == 300:
            learner.idle_rows[::3] = 200
            learner.weights["b_enc"][::3] -= {"jumprelu": 0.05, "relu": 1.5}.get(config.activation, 0.15)
    rows = _rows(200, seed=5)
    expected = _dense_objective(learner, rows, 7)
    found = _gradients(learner, rows, 7)
    if config.dead_after_rows == 300:
        assert (learner.idle_rows > 300).sum() >= 3, "no latent was dead, so nothing was tested"
    assert set(found) == set(expected)
    for name, value in expected.items():
        size = value.abs().max()
        assert size > 0, name
        assert ((found[name] - value).abs().max() / size).item() < 1e-6, name


def test_end_to_end_is_balanced_as_in_the_paper() -> None:
    """(error + alpha beta KL) / (1 + beta) with alpha = error / KL: at its value it equals the error, and its gradient
    is that of the two terms on equal footing, weighted 1 and beta."""
    config = dataclasses.replace(CONFIG, activation="topk", end_to_end=3.0, frozen=("W_dec",))
    pull = torch.randn(48, 5, dtype=torch.float64)
    learner = _learner(config, splice=lambda recon: (recon @ pull).tanh().square().sum(1).mean())
    rows = _rows(200, seed=5)
    found = _gradients(learner, rows, 0)
    plain = _gradients(_learner(dataclasses.replace(config, end_to_end=0.0)), rows, 0)
    assert found["loss"].item() == pytest.approx(plain["loss"].item(), rel=1e-6)

    b_dec = learner.weights["b_dec"].detach().clone().requires_grad_()
    x = rows[SITE] / learner.moments_in.scale
    z = (x - b_dec) @ learner.weights["E"].T + learner.weights["b_enc"].detach()
    recon = z.relu() * is_largest(z.detach(), 4) @ learner.weights["W_dec"] + b_dec
    error = (x - recon).square().sum(1).mean()
    divergence = (recon * learner.moments_out.scale @ pull).tanh().square().sum(1).mean()
    alpha = error.item() / (divergence.item() + 1e-8)
    ((error + alpha * 3.0 * divergence) / 4.0).backward()
    torch.testing.assert_close(found["b_dec"], b_dec.grad, rtol=1e-7, atol=1e-12)
    with pytest.raises(InputError, match="splice"):
        _learner(config)


# --- three gradient errors found in other libraries ---


def test_aux_reaches_the_encoder_of_dead_latents_and_leaves_the_bias_out() -> None:
    """A fused encoder that drops the auxiliary gradient cannot revive anything; a dead reconstruction that adds b_dec
    counts it twice."""
    config = dataclasses.replace(CONFIG, activation="topk", dead_after_rows=300, aux_weight=1.0)
    learner = _learner(config)
    with torch.no_grad():
        learner.idle_rows[::2] = 10_000
        learner.weights["b_enc"][::2] -= 0.15
        learner.weights["b_dec"] += 1.0
    rows = _rows(200, seed=5)
    found = _gradients(learner, rows, 0)
    without = copy.copy(learner)
    without.config = dataclasses.replace(config, aux_weight=0.0)
    plain = _gradients(without, rows, 0)
    dead = learner.idle_rows > 300
    assert dead.sum() > 5
    assert (found["E"] - plain["E"])[dead].abs().sum() > 0
    assert not (found["E"] - plain["E"])[~dead].abs().sum() > 1e-12
    torch.testing.assert_close(found["b_dec"], plain["b_dec"])  # the residual is a constant


def test_the_l0_gradient_of_a_threshold_takes_the_whole_kernel() -> None:
    """An estimate on the activations instead of the pre-activations sees the upper half of the window only."""
    from gemscope.dictionaries.activations import step

    threshold = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    pre_acts = torch.linspace(0.8, 1.2, 4001, dtype=torch.float64)[:, None]
    step(pre_acts, threshold, 0.2).sum().backward()
    inside = ((pre_acts - 1.0).abs() < 0.1).sum().item()
    assert threshold.grad is not None
    assert threshold.grad.item() == pytest.approx(-inside / 0.2, rel=1e-12)
    assert inside == pytest.approx(1999, abs=2)


def test_a_threshold_learns_in_proportion_to_nothing_but_its_gradient() -> None:
    """A logarithm inside would multiply the gradient by the threshold; ours is the plain one, whatever its size."""
    learner = _learner(dataclasses.replace(CONFIG, sparsity_warmup=0.0))
    rows = _rows(200, seed=5)
    found, expected = _gradients(learner, rows, 0), _dense_objective(learner, rows, 0)
    torch.testing.assert_close(found["threshold"], expected["threshold"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("k", [4.0, 7.5])
def test_a_batchtopk_dictionary_has_its_l0_from_the_first_checkpoint(k: float) -> None:
    """A running mean of batch minima that starts at 0 gives an L0 of many times k for hundreds of steps."""
    learner = _learner(dataclasses.replace(CONFIG, activation="batchtopk", target_l0=k))
    for done in range(2):
        learner.update(_rows(256, seed=done), done)
    dictionary, numbers = learner.finished(_rows(8192, seed=50))
    held_out = _rows(8192, seed=51)[SITE]
    assert numbers["l0"] == pytest.approx(k, rel=1e-3)
    assert len(dictionary.encode_sparse(held_out)[1]) / 8192 == pytest.approx(k, rel=0.03)


# --- initial weights, constraints, state ---


def test_initial_weights() -> None:
    learner, rows = _learner(), _rows()[SITE]
    w = learner.weights
    assert torch.equal(w["E"], w["W_dec"])
    torch.testing.assert_close(w["W_dec"].norm(dim=1), torch.ones(64).double())
    torch.testing.assert_close(w["b_dec"] * learner.moments_in.scale, rows.mean(0), rtol=1e-6, atol=1e-6)
    centred = (rows - rows.mean(0)) / learner.moments_in.scale @ w["E"].T
    assert (centred > w["threshold"]).double().sum(1).mean().item() == pytest.approx(6.0, rel=0.02)


def test_a_transcoder_starts_better_than_one_with_random_rows() -> None:
    """Its first decoder rows point where the targets of their latents lie."""
    learner, rows = _learner(dataclasses.replace(CONFIG, **TRANSCODER)), _rows(2000, seed=9)
    y = rows[OTHER] / learner.moments_out.scale - learner.weights["b_dec"]
    z = (rows[SITE] / learner.moments_in.scale - learner.centre) @ learner.weights["E"].T
    acts = z.relu() * is_largest(z, 4)
    aligned = ((acts @ learner.weights["W_dec"]).detach() * y).sum()
    random = torch.nn.functional.normalize(torch.randn(20, 64, 10, dtype=torch.float64), dim=-1)
    assert aligned > 3 * ((acts @ random) * y).sum((1, 2)).abs().mean()


@pytest.mark.parametrize("extra", [{}, TRANSCODER, SKIP | {"activation": "topk"}])
def test_constraints_hold_after_every_step(extra: dict[str, Any]) -> None:
    learner = _learner(dataclasses.replace(CONFIG, threshold_learning_rate=5.0, **extra))
    reached_zero = "threshold" not in learner.weights
    for done in range(20):
        learner.update(_rows(128, seed=done), done)
        ones = torch.ones(64, dtype=torch.float64)
        torch.testing.assert_close(learner.weights["W_dec"].norm(dim=1), ones, rtol=0, atol=1e-9)
        if "threshold" in learner.weights:
            assert learner.weights["threshold"].min() >= 0
            reached_zero |= bool((learner.weights["threshold"] == 0).any())
    assert reached_zero, "the threshold's clamp was never tried"


def test_frozen_weights_stay() -> None:
    learner = _learner(dataclasses.replace(CONFIG, frozen=("W_enc", "b_dec", "threshold")))
    before = {name: tensor.detach().clone() for name, tensor in learner.weights.items()}
    for done in range(3):
        learner.update(_rows(128, seed=done), done)
    same = {name for name, tensor in learner.weights.items() if torch.equal(tensor, before[name])}
    assert same == {"E", "b_dec", "threshold"}


PARTS_OF: dict[str, tuple[str, ...]] = {
    "sae": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "transcoder": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "skip_transcoder": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip"),
}


def given(kind: str, activation: str = "jumprelu", rows: float | None = None) -> SingleLayer:
    """A dictionary for raw activations with nothing at 0, decoder rows of norm ``rows`` or of all norms."""
    g = torch.Generator().manual_seed(5)
    d_out = 48 if kind == "sae" else 10
    tensors = {
        "W_enc": torch.randn(48, 64, generator=g) / 7,
        "b_enc": torch.randn(64, generator=g),
        "W_dec": torch.randn(64, d_out, generator=g),
        "b_dec": torch.randn(d_out, generator=g),
    }
    if rows is not None:
        tensors["W_dec"] *= rows / tensors["W_dec"].norm(dim=1, keepdim=True)
    if activation != "topk":
        tensors["threshold"] = 1 + torch.rand(64, generator=g)
    if kind == "skip_transcoder":
        tensors["W_skip"] = torch.randn(48, d_out, generator=g)
    k = None if activation == "jumprelu" else 4.0
    return CLASSES[kind](**tensors, activation=Activation(activation, k))  # type: ignore[arg-type]


def single_rows(count: int = 2048, seed: int = 0) -> dict[Any, torch.Tensor]:
    return {site: x.float() for site, x in _rows(count, seed).items()}


def trained_on(learner: SingleLayerLearner, updates: int = 4) -> SingleLayer:
    for done in range(updates):
        learner.update(single_rows(128, seed=done), done)
    made = learner.finished(single_rows(seed=9))[0]
    assert isinstance(made, SingleLayer)
    return made


FROZEN = [(kind, activation, part) for kind in PARTS_OF for activation in ("jumprelu", "batchtopk", "topk")
          for part in PARTS_OF[kind] if (activation, part) != ("topk", "threshold")]  # fmt: skip


@pytest.mark.parametrize(("kind", "activation", "part"), FROZEN)
def test_what_is_frozen_is_the_same_in_the_finished_dictionary(kind: str, activation: str, part: str) -> None:
    """For raw activations, whatever the rows' mean and scale and the norms of the decoder rows."""
    target = {} if kind == "sae" else {"target_site": OTHER}
    config = dataclasses.replace(CONFIG, kind=kind, activation=activation, frozen=(part,), learning_rate=0.05, **target)
    initial = given(kind, activation, 2.5 if activation == "topk" else None)
    before = {name: tensor.detach().clone() for name, tensor in initial.named_parameters()}
    after = dict(trained_on(SingleLayerLearner(config, single_rows(), initial=initial)).named_parameters())
    torch.testing.assert_close(after[part], before[part], rtol=0, atol=1e-5 * before[part].abs().max().item())
    moved = {name for name in before if not torch.allclose(after[name], before[name], rtol=1e-3)}
    assert moved == set(before) - {part}


@pytest.mark.parametrize("part", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("kind", PARTS_OF)
def test_a_dictionary_with_frozen_weights_reconstructs_as_it_did_in_training(kind: str, part: str) -> None:
    target = {} if kind == "sae" else {"target_site": OTHER}
    config = dataclasses.replace(CONFIG, kind=kind, frozen=(part, "threshold"), **target)
    learner = SingleLayerLearner(config, single_rows(), initial=given(kind))
    made, rows = trained_on(learner), single_rows(256, seed=7)
    y = rows[config.writes[0]]
    error = (made(rows[SITE]) - y).square().sum(1).mean().item()
    spread = learner.moments_out.spread * learner.moments_out.scale**2
    assert learner.update(rows, 4).fvu.item() == pytest.approx(error / spread, rel=1e-4)


def test_a_topk_keeps_its_encoder_only_where_training_does_not_change_which_latents_are_the_largest() -> None:
    config = dataclasses.replace(CONFIG, activation="topk", frozen=("W_enc",))
    with pytest.raises(InputError, match="freeze W_dec too"):
        SingleLayerLearner(config, single_rows(), initial=given("sae", "topk"))
    initial = given("sae", "topk")
    both = dataclasses.replace(config, frozen=("W_enc", "W_dec", "b_enc", "b_dec"))
    made = trained_on(SingleLayerLearner(both, single_rows(), initial=initial))
    torch.testing.assert_close(made(single_rows()[SITE]), initial(single_rows()[SITE]))


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_learning_rates_follow_the_schedule_and_thresholds_have_their_own(shape: str) -> None:
    config = dataclasses.replace(CONFIG, steps=100, warmup=0.1, decay=0.5, decay_shape=shape)
    learner = _learner(config)
    at_75 = {"linear": 0.5, "cosine": 0.5, "constant": 1.0}[shape]
    at_90 = {"linear": 0.2, "cosine": (1 - math.cos(0.2 * math.pi)) / 2, "constant": 1.0}[shape]
    for done, factor in [(0, 0.1), (10, 1.0), (50, 1.0), (75, at_75), (90, at_90)]:
        learner.update(_rows(64), done)
        rates = {n: g["lr"] for n, g in zip(learner.small, learner.optimizer.param_groups, strict=True)}
        assert rates["threshold"] == pytest.approx(config.threshold_learning_rate * learner.pre_scale * factor)
        assert rates["b_enc"] == pytest.approx(config.learning_rate * learner.pre_scale * factor)
        deviation = _rows()[SITE].var(0, correction=0).mean().sqrt().item() / learner.moments_in.scale
        assert rates["b_dec"] == pytest.approx(config.learning_rate * deviation * factor)


@pytest.mark.parametrize("extra", [{}, {"activation": "batchtopk", "beta1": 0.9}, SKIP, {"sparsity": "tanh"}])
def test_a_run_goes_on_bit_for_bit_from_its_state(extra: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, dead_after_rows=300, **extra)
    rows = {site: x.float() for site, x in _rows().items()}
    batches = [{site: x[128 * i : 128 * (i + 1)] for site, x in rows.items()} for i in range(10)]
    whole = SingleLayerLearner(config, rows)
    for done in range(5):
        whole.update(batches[done], done)
    state = copy.deepcopy(whole.state_dict())
    again = SingleLayerLearner(config, rows)
    again.load_state_dict(state)
    for done in range(5, 10):
        first, second = whole.update(batches[done], done), again.update(batches[done], done)
        assert first.loss.item() == second.loss.item()
    for name, tensor in whole.weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, again.weights[name])
    assert torch.equal(whole.idle_rows, again.idle_rows)


def test_moments_and_thresholds_stay_in_fp32_for_bf16_rows() -> None:
    rows = {site: x.bfloat16() for site, x in _rows().items()}
    learner = SingleLayerLearner(CONFIG, rows)
    learner.update({site: x[:128] for site, x in rows.items()}, 0)
    kept = [*learner.weights.values(), *(t.second for t in learner.tables.values())]
    kept += [m for state in learner.optimizer.state.values() for m in state.values()]
    assert {t.dtype for t in kept} == {torch.float32}


# --- the finished dictionary ---


@pytest.mark.parametrize("extra", [{}, TRANSCODER, SKIP])
@pytest.mark.parametrize("activation", ["jumprelu", "topk", "batchtopk", "relu"])
def test_the_finished_dictionary_does_on_raw_rows_what_training_did_on_scaled_ones(
    extra: dict[str, Any], activation: str
) -> None:
    sparsity = "tanh" if activation == "relu" else "quadratic"
    config = dataclasses.replace(CONFIG, activation=activation, sparsity=sparsity, **extra)
    learner, rows = _learner(config), _rows()
    for done in range(10):
        learner.update({site: x[done * 256 : (done + 1) * 256] for site, x in rows.items()}, done)
    finished, numbers = learner.finished(rows)
    w = {name: tensor.detach() for name, tensor in learner.weights.items()}
    centred = rows[SITE] / learner.moments_in.scale - (w["b_dec"] if config.kind == "sae" else learner.centre)
    z = centred @ w["E"].T + w["b_enc"]
    if activation == "jumprelu":
        acts = torch.where(z > numbers["threshold_factor"] * w["threshold"], z, 0.0)
    elif activation == "batchtopk":
        acts = z * is_largest(z.view(1, -1), 4 * len(z)).view_as(z)
    else:
        acts = z.relu() * (is_largest(z, 4) if activation == "topk" else 1)
    recon = acts @ w["W_dec"] + w["b_dec"] + (centred @ w["W_skip"] if "W_skip" in w else 0)
    assert finished.kind == config.kind
    torch.testing.assert_close(finished(rows[SITE]), recon * learner.moments_out.scale, rtol=1e-9, atol=1e-9)
    assert numbers["l0"] == pytest.approx((acts != 0).sum(1).double().mean().item(), rel=1e-6)
    if activation != "relu":
        assert numbers["l0"] == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize("extra", [{}, TRANSCODER, SKIP | {"activation": "topk"}, {"activation": "batchtopk"}])
def test_training_goes_on_from_a_finished_dictionary(extra: dict[str, Any]) -> None:
    """Taken up and finished again without a step in between, it is the same function."""
    config, rows = dataclasses.replace(CONFIG, **extra), _rows()
    learner = _learner(config)
    for done in range(5):
        learner.update({site: x[done * 256 : (done + 1) * 256] for site, x in rows.items()}, done)
    first, _ = learner.finished(rows)
    assert isinstance(first, SingleLayer)
    shifted = {site: 1.7 * x + 0.3 for site, x in rows.items()}  # another model's activations
    second, _ = SingleLayerLearner(config, shifted, initial=first).finished(rows)
    torch.testing.assert_close(second(rows[SITE]), first(rows[SITE]), rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="make them agree"):
        SingleLayerLearner(dataclasses.replace(config, d_sae=63), rows, initial=first)


def test_training_is_indifferent_to_the_scale_of_the_activations() -> None:
    """A power of two changes no bit of the arithmetic, so the finished dictionaries differ by exactly that
    factor.
    """
    finished: list[SingleLayer] = []
    for scale in (1.0, 64.0):
        x = superposition(4096)[0] * scale
        learner = SingleLayerLearner(CONFIG, {SITE: x})
        for done in range(10):
            learner.update({SITE: x[done * 256 : (done + 1) * 256]}, done)
        made = learner.finished({SITE: x})[0]
        assert isinstance(made, SingleLayer)
        finished.append(made)
    small, large = finished
    assert torch.equal(small.W_enc, large.W_enc)
    assert torch.equal(small.W_dec, large.W_dec)
    for name in ("b_enc", "b_dec", "threshold"):
        torch.testing.assert_close(small.get_parameter(name) * 64, large.get_parameter(name), rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk"])
def test_training_is_indifferent_to_the_mean_of_the_activations(activation: str) -> None:
    """A mean far from 0 makes the scaled rows small; a dictionary of x + c has the weights of one of x, and b_dec + c.

    True only if every learning rate has the unit of its weight.
    """
    config = dataclasses.replace(CONFIG, activation=activation)
    found: list[SingleLayer] = []
    for offset in (0.0, 5.0):
        x = _rows()[SITE] + offset
        learner = SingleLayerLearner(config, {SITE: x})
        for done in range(10):
            learner.update({SITE: x[done * 256 : (done + 1) * 256]}, done)
        made = learner.finished({SITE: x})[0]
        assert isinstance(made, SingleLayer)
        found.append(made)
    near, far = found
    torch.testing.assert_close(far.W_enc, near.W_enc, rtol=0, atol=1e-4)
    torch.testing.assert_close(far.W_dec, near.W_dec, rtol=0, atol=1e-4)
    torch.testing.assert_close(far.b_dec - 5, near.b_dec, rtol=0, atol=1e-4)
    torch.testing.assert_close(far.b_enc + far.W_enc.sum(0) * 5, near.b_enc, rtol=0, atol=1e-3)


def test_dead_latents_are_counted_in_rows_and_drawn_back() -> None:
    reached: list[float] = []
    for weight in (0.0, 1e-2):
        learner = _learner(dataclasses.replace(CONFIG, dead_after_rows=1000, dead_weight=weight))
        with torch.no_grad():
            learner.weights["threshold"][5] = 100.0
        learner.update(_rows(600), 0)
        assert learner.idle_rows[5] == 600
        learner.update(_rows(600, seed=1), 1)
        assert learner.idle_rows[5] == 1200
        assert learner.idle_rows[learner.weights["threshold"] < 1].min() == 0
        reached.append(learner.weights["threshold"][5].item())
    assert reached[1] < reached[0] - 1e-5  # the common factor moves both alike


def test_sampled_prefixes_follow_their_law_and_repeat() -> None:
    drawn = [p for done in range(400) for p in sampled_prefixes(1024, 5, 3, done)]
    assert sampled_prefixes(1024, 5, 3, 17) == sampled_prefixes(1024, 5, 3, 17)
    assert min(drawn) >= 1
    assert max(drawn) < 1024
    longer = sum(p > 64 for p in drawn) / 2000
    assert longer == pytest.approx((64**-0.5 - 1024**-0.5) / (1 - 1024**-0.5), abs=0.03)


# --- the controller ---


def test_a_steered_weight_reaches_the_target_and_a_stuck_one_is_reported() -> None:
    config = dataclasses.replace(CONFIG, sparsity="tanh", steps=400, learning_rate=3e-3, annealing=0.3)
    x = superposition(20_000)[0]
    learner = SingleLayerLearner(config, {SITE: x[:4096]})
    for done in range(400):
        learner.update({SITE: x[done % 80 * 250 : (done % 80 + 1) * 250]}, done)
    assert learner.control.mean == pytest.approx(4.0, rel=0.25)
    assert learner.warnings() == ()
    assert learner.control.knob != 0
    learner.control.mean, learner.control.log_ratio = 40.0, math.log(10)
    assert "L0 is 40.0 where 4 was asked for" in learner.warnings()[0]
    learner.control.knob = math.log(1e4)
    assert "reached its end" in learner.warnings()[0]
