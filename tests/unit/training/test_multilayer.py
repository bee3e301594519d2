"""Learners over several layers: gradients against float64 autograd, folding, resume, target L0, selection."""

import dataclasses
from typing import Any

import pytest
import torch

from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import is_largest
from gemscope.dictionaries.activations import jump_relu, step
from gemscope.training.config import TrainConfig
from gemscope.training.multilayer import MultiLayerConfig, MultiLayerLearner
from gemscope.training.single import SingleLayerLearner

N, D, D_OUT, F, B = 3, 10, 8, 12, 40
READS = [Site("mlp_in", i) for i in range(N)]
WRITES = [Site("mlp_out", i) for i in range(N)]


def rows(count: int = 600, seed: int = 0) -> dict[Site, torch.Tensor]:
    """Correlated activations of a fake model: later layers keep what earlier ones had, sizes differ."""
    g = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(77)
    sources = (torch.rand(count, 20, generator=g) < 0.15) * (0.5 + torch.rand(count, 20, generator=g))
    found: dict[Site, torch.Tensor] = {}
    for i in range(N):
        found[READS[i]] = (sources @ torch.randn(20, D, generator=fixed) + 1.0) * (i + 1.0)
        found[WRITES[i]] = (sources @ torch.randn(20, D_OUT, generator=fixed) - 0.5) * (3.0 - i)
    return found


def config(**change: Any) -> MultiLayerConfig:
    given: dict[str, Any] = {
        "site": READS[0],
        "target_site": WRITES[0],
        "kind": "clt",
        "layers": tuple(range(N)),
        "d_sae": F,
        "target_l0": 5.0,
        "steps": 30,
        "batch_size": B,
        "calibration_rows": 600,
        "dead_after_rows": 100,
        "sparsity_warmup": 0.0,
    }
    return MultiLayerConfig(**{**given, **change})


def double(learner: MultiLayerLearner) -> None:
    learner.weights = {name: t.double() for name, t in learner.weights.items()}


def dense_codes(learner: MultiLayerLearner, pre: torch.Tensor, theta: torch.Tensor | None, target: float):
    """Activations and soft or hard counts [batch, layers, latents], every entry of the dense matrices looked at."""
    cfg = learner.config
    if theta is not None:
        given = pre.flatten(1), theta.flatten(), learner.bandwidth, cfg.ste_to_input
        return jump_relu(*given).view_as(pre), step(*given).view_as(pre)
    flat = pre.detach().flatten(1)
    kept = is_largest(flat, int(target))
    if cfg.activation == "batchtopk":
        kept = is_largest(flat.view(1, -1), round(target * len(pre))).view_as(flat)
    acts = pre.relu() * kept.view_as(pre)
    return acts, (cfg.tanh_scale / learner.pre_scale * acts).tanh()


def dense_loss(learner: MultiLayerLearner, W: dict[str, torch.Tensor], x: Any, y: Any, dead: torch.Tensor, done: int):
    """The objective as the docstring has it, every matrix dense; weights as ``TrainConfig`` has them."""
    cfg, spread = learner.config, learner.spread
    target = learner.first_l0 * (cfg.target_l0 / learner.first_l0) ** min(1.0, done / (cfg.annealing * cfg.steps))
    pre = torch.stack([x[i] @ W[f"W_enc.{i}"].T + W[f"b_enc.{i}"] for i in range(N)], 1)
    theta = torch.stack([W[f"threshold.{i}"] for i in range(N)]) if cfg.penalised else None
    acts, gates = dense_codes(learner, pre, theta, target)
    few = is_largest(pre.detach().flatten(1).masked_fill(~dead, -1.0), min(cfg.aux_k or D_OUT // 2, int(dead.sum())))
    own = pre.relu() * few.view_as(pre)
    loss = torch.zeros((), dtype=torch.float64)

    def written(acts: torch.Tensor, m: int, p: int = F) -> torch.Tensor:
        tables = [W[f"W_dec.{s}"] if cfg.tied else W[f"W_dec.{s}.{m}"] for s in range(m + 1)]
        return torch.stack([acts[:, s, :p] @ table[:p] for s, table in enumerate(tables)]).sum(0)

    for m in range(N):
        base = W[f"b_dec.{m}"] + (x[m] @ W[f"W_skip.{m}"] if cfg.has_skip else 0)
        nested = [(base + written(acts, m, p) - y[m]).square().sum(1).mean() for p in [*cfg.prefixes, F]]
        loss = loss + torch.stack(nested).mean()
        if theta is None and dead.any():
            left = (y[m] - base - written(acts, m)).detach()
            loss = loss + cfg.aux_weight * (left - written(own, m)).square().sum(1).mean()
    p = gates.mean(0)
    loss = loss + cfg.frequency_weight * spread * (p * (1 + p / cfg.frequency_scale)).sum()
    if theta is not None:
        off = gates.sum((1, 2)) - target
        loss = loss + cfg.sparsity_weight * spread * 2 / target * off.square().mean()
        gap = (theta - pre).relu().flatten(1)[:, dead]
        loss = loss + cfg.dead_weight * spread * gap.sum(1).mean()
    return loss


TOPK = {"activation": "topk", "skip": True}
BATCHTOPK = {"activation": "batchtopk", "target_l0": 5.3, "first_k_factor": 2.0}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tied": True},
        {"skip": True, "prefixes": (3, 7)},
        {"tied": True, "prefixes": (5,), "frequency_weight": 0.2},
        {"frequency_weight": 0.3, "dead_weight": 0.7, "skip": True},
        {"ste_to_input": True},
        {"prefixes": (5,), "batch_size": 300},
        TOPK,
        TOPK | {"prefixes": (3, 7), "frequency_weight": 0.3, "aux_weight": 0.5},
        TOPK | {"aux_k": 2, "tied": True, "batch_size": 300},
        TOPK | {"aux_weight": 0.0},
        BATCHTOPK,
        BATCHTOPK | {"prefixes": (4,), "aux_k": 7, "frequency_weight": 0.1},
    ],
)
def test_gradients_agree_with_float64_autograd(change: dict[str, Any]) -> None:
    cfg, data = config(**change), rows(1000)
    learner = MultiLayerLearner(cfg, data)
    for done in range(6):  # somewhere that is not the start
        learner.update({s: v[done * B : (done + 1) * B] for s, v in data.items()}, done)
    double(learner)
    seldom = torch.arange(N * F) % 4 == 3  # dead: never above the others, or above their thresholds
    for layer, some in enumerate(seldom.view(N, F)):
        learner.weights[f"b_enc.{layer}"][some] -= 0.0 if cfg.penalised else 0.4
        if cfg.penalised:
            learner.weights[f"threshold.{layer}"][some] += 2.0
    learner.idle_rows[:] = seldom * 90
    batch = {site: v[300 : 300 + cfg.batch_size] for site, v in data.items()}
    x = [t.double() for t in learner._inputs(batch)]
    y = [batch[site].double() / m.scale for site, m in zip(WRITES, learner.write, strict=True)]
    W = {name: t.clone().requires_grad_() for name, t in learner.weights.items()}
    found: dict[str, torch.Tensor] = {}
    result = learner.backward(x, y, 6, lambda name, grad: found.__setitem__(name, grad))
    dead = learner.idle_rows > cfg.dead_after_rows
    assert dead.any(), "no latent was dead, so nothing was tested"
    assert ("aux" in result.terms) == (not cfg.penalised and cfg.aux_weight > 0)
    loss = dense_loss(learner, W, x, y, dead, 6)
    loss.backward()
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-9)
    assert found.keys() == W.keys()
    for name, weight in W.items():
        assert weight.grad is not None
        error = (found[name] - weight.grad).norm() / weight.grad.norm()
        assert error < 1e-6, (name, error)


@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
@pytest.mark.parametrize("activation", ["jumprelu", "topk", "batchtopk"])
def test_what_is_exported_applies_to_raw_activations(kind: str, activation: str) -> None:
    more: dict[str, Any] = {"kind": kind, "activation": activation}
    if kind == "crosscoder":
        more |= {"target_site": None}
    else:
        more |= {"skip": True}
    cfg, data = config(**more), rows()
    learner = MultiLayerLearner(cfg, data)
    for done in range(10):
        learner.update({s: v[done * B : (done + 1) * B] for s, v in data.items()}, done)
    raw, _ = learner.finished(data)
    W, x = learner.weights, learner._inputs(data)
    if activation == "jumprelu":  # undo the calibration: what is compared is the folding
        factor = learner.finished(data)[1]["threshold_factor"]
        theta = [W[f"threshold.{i}"] * factor for i in range(N)]
    else:
        factor = learner.finished(data)[1]["threshold_factor"]
        theta = [torch.full((F,), learner.level * factor)] * N
    pre = torch.stack([x[i] @ W[f"W_enc.{i}"].T + W[f"b_enc.{i}"] for i in range(N)], 1)
    if activation == "topk":
        flat = pre.relu().flatten(1)
        smallest = flat.topk(5, dim=1)[0][:, -1:]
        acts = (flat * (flat >= smallest)).view_as(pre)
    else:
        acts = torch.where(pre > torch.stack(theta), pre, 0.0)
    raw_out = raw(torch.stack([data[s] for s in cfg.reads], 1))
    for m in range(N):
        out = W[f"b_dec.{m}"] + sum(acts[:, i] @ W[f"W_dec.{i}.{m}"] for i in range(m + 1))
        if cfg.has_skip:
            out = out + x[m] @ W[f"W_skip.{m}"]
        close = (raw_out[:, m] - out * learner.write[m].scale).abs().amax(1) < 1e-3
        assert close.float().mean() > 0.99  # a pre-activation within rounding of its threshold may fall either way
    assert [b.shape for b in raw.b_dec] == [(D if kind == "crosscoder" else D_OUT,)] * N


@pytest.mark.parametrize("activation", ["jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_state_goes_on_bit_for_bit(activation: str, moments: str) -> None:
    cfg, data = config(activation=activation, moments=moments), rows()

    def batch(done: int) -> dict[Site, torch.Tensor]:
        return {s: v[done * B : (done + 1) * B] for s, v in data.items()}

    one = MultiLayerLearner(cfg, data)
    for done in range(5):
        one.update(batch(done), done)
    state = {k: v for k, v in one.state_dict().items()}
    state["weights"] = {k: v.clone() for k, v in state["weights"].items()}
    state["adam"] = {"steps": 5, "squares": {k: v.clone() for k, v in state["adam"]["squares"].items()}}
    state["idle_rows"] = state["idle_rows"].clone()
    losses = [one.update(batch(done), done).loss.item() for done in range(5, 10)]
    other = MultiLayerLearner(cfg, data)
    other.load_state_dict(state)
    assert [other.update(batch(done), done).loss.item() for done in range(5, 10)] == losses
    assert all(torch.equal(one.weights[k], other.weights[k]) for k in one.weights)


@pytest.mark.parametrize("activation", ["jumprelu", "topk", "batchtopk"])
def test_the_error_falls_and_the_joint_l0_is_the_target(activation: str) -> None:
    data = rows(4000)
    cfg = config(activation=activation, d_sae=24, steps=200, batch_size=256, target_l0=6.0, prefixes=(12,))
    learner = MultiLayerLearner(cfg, data)
    fvu = []
    for done in range(200):
        at = torch.randint(0, 4000, (256,), generator=torch.Generator().manual_seed(done))
        fvu.append(learner.update({s: v[at] for s, v in data.items()}, done).fvu.item())
    dictionary, numbers = learner.finished(data)
    assert sum(fvu[-20:]) / 20 < 0.65 < fvu[0]
    fresh = rows(4000, seed=5)
    x = torch.stack([fresh[s] for s in READS], 1)
    l0 = (dictionary.encode(x) > 0).sum((1, 2)).float().mean().item()
    assert l0 == pytest.approx(6.0, rel=0.05)
    assert numbers["l0"] == pytest.approx(6.0, rel=0.02)
    for layer in range(N):
        norms = sum(learner.weights[f"W_dec.{layer}.{m}"].square().sum(1) for m in range(layer, N))
        torch.testing.assert_close(norms, torch.ones(24))


def test_one_layer_is_an_sae_or_a_transcoder() -> None:
    data = rows()
    for kind, target in (("sae", None), ("transcoder", WRITES[1]), ("skip_transcoder", WRITES[1])):
        cfg = config(kind=kind, site=READS[1], target_site=target, layers=(), target_l0=3.0)
        learner = MultiLayerLearner(cfg, data)
        first = learner.update({s: v[:B] for s, v in data.items()}, 0).loss.item()
        dictionary, _ = learner.finished(data)
        assert dictionary.kind == kind
        assert first > 0
        again = MultiLayerLearner(cfg, data, start=dictionary)
        recon = learner.finished(data)[0](data[READS[1]])
        torch.testing.assert_close(again.finished(data)[0](data[READS[1]]), recon, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_decoders_begin_as_the_targets_that_go_with_the_first_activations(tied: bool) -> None:
    data = rows()
    learner = MultiLayerLearner(config(tied=tied, from_data=True), data)
    x, y = learner._inputs(data), learner._targets(data)
    count = round(len(x[0]) * learner.first_l0 / (N * F))
    for layer in range(N):
        for latent in (0, F - 1):
            pre = x[layer] @ learner.weights[f"W_enc.{layer}"][latent]
            strongest = pre.argsort(descending=True)[:count]
            sums = [pre[strongest] @ (y[m][strongest] - y[m].mean(0)) for m in range(layer, N)]
            wanted = torch.stack([torch.stack(sums).sum(0)] * (N - layer)) if tied else torch.stack(sums)
            names = [f"W_dec.{layer}" if tied else f"W_dec.{layer}.{m}" for m in range(layer, N)]
            found = torch.stack([learner.weights[name][latent] for name in names])
            torch.testing.assert_close(found, wanted / wanted.norm(), rtol=1e-4, atol=1e-5)


def test_frozen_weights_stay() -> None:
    data = rows()
    learner = MultiLayerLearner(config(frozen=("W_dec", "b_dec")), data)
    before = {k: v.clone() for k, v in learner.weights.items()}
    learner.update({s: v[:B] for s, v in data.items()}, 0)
    same = {k.split(".")[0] for k, v in learner.weights.items() if torch.equal(v, before[k])}
    assert same == {"W_dec", "b_dec"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": "tanh"}, "quadratic"),
        ({"beta1": 0.9}, "beta1"),
        ({"product_dtype": "bfloat16"}, "fp32"),
        ({"activation": "batchtopk", "frozen": ("threshold",)}, "leave 'threshold' out"),
        ({"kind": "crosscoder", "target_site": None, "skip": True}, "skip"),
        ({"layers": (0,)}, "two or more layers"),
    ],
)
def test_what_it_does_not_know_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**change)


def test_a_dictionary_of_another_size_is_no_start() -> None:
    data = rows()
    dictionary, _ = MultiLayerLearner(config(), data).finished(data)
    with pytest.raises(InputError, match="same kind and size"):
        MultiLayerLearner(dataclasses.replace(config(), d_sae=16), data, start=dictionary)


def test_the_state_of_the_other_learner_is_refused_in_one_sentence() -> None:
    data = rows()
    cfg = TrainConfig(READS[0], d_sae=F, target_l0=3.0, batch_size=B, calibration_rows=600)
    one, several = SingleLayerLearner(cfg, data), MultiLayerLearner(cfg, data)
    with pytest.raises(InputError, match="this checkpoint of a sae was written by a single process"):
        several.load_state_dict(one.state_dict())
    with pytest.raises(InputError, match="this checkpoint of a sae was written by several processes"):
        one.load_state_dict(several.state_dict())


def test_a_tied_dictionary_goes_on_tied() -> None:
    """Taken up and finished without a step in between it is the same function, but for the scales of the new rows."""
    data = rows()
    learner = MultiLayerLearner(config(tied=True), data)
    for done in range(5):
        learner.update({s: v[done * B : (done + 1) * B] for s, v in data.items()}, done)
    first, _ = learner.finished(data)
    again = MultiLayerLearner(config(tied=True), data, start=first)
    assert {name for name in again.weights if name.startswith("W_dec")} == {f"W_dec.{i}" for i in range(N)}
    x = torch.stack([data[s] for s in READS], 1)
    torch.testing.assert_close(again.finished(data)[0](x), first(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="go on without 'tied'"):
        MultiLayerLearner(config(tied=True), data, start=MultiLayerLearner(config(), data).finished(data)[0])
