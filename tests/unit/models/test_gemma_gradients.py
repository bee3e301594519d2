"""Gradients through captures and interventions, against finite differences and the linear attribution
identity."""

import pytest
import torch
from torch import Tensor

from gemscope.core.sites import Site
from gemscope.models.capture import Capture
from gemscope.models.freeze import FreezeNorms, FreezePatterns
from gemscope.models.gemma import Gemma
from gemscope.models.interventions import Add, Edit, Leaf, Replace
from unit.models.tiny_gemma import KINDS, TEXTS, Kind, gemma


def _target(g: Gemma, capture: Capture, token: int = 50) -> Tensor:
    """One logit at the last position, before Gemma 2's cap."""
    return capture["final_norm"][0, -1] @ g.unembedding()[token]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [True, False], ids=["own-run", "reference-run"])
def test_frozen_norms_and_patterns_make_the_logit_a_sum_of_activation_times_gradient(kind: Kind, own: bool) -> None:
    g = gemma(kind, dtype=torch.float64)
    tokens, other = g.tokens("hello world and we"), g.tokens("words in Lyon today")
    reference = g.capture(tokens if own else other, [*g.every_layer("pattern"), *FreezeNorms.sites(4)])
    cut: list[Site] = g.every_layer("mlp_out")
    freeze = [FreezePatterns(reference), FreezeNorms(None if own else reference), *map(Leaf, cut)]
    run = g.capture(tokens, ["embed", *cut, "final_norm"], interventions=freeze, grad=True)
    target = _target(g, run)
    leaves = [run["embed"], *(run[site] for site in cut)]
    gradients = torch.autograd.grad(target, leaves)
    total = sum((x * gradient).sum() for x, gradient in zip(leaves, gradients, strict=True))
    assert abs((total - target).item()) < 1e-12 * max(1.0, abs(target.item()))
    assert all((x * d).sum().abs().item() > 1e-6 for x, d in zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_without_freezing_the_sum_is_something_else(kind: Kind) -> None:
    """Free norms are of degree zero. Free patterns matter for Gemma 2 only: Gemma 3's query and key norms
    make them of degree zero as well, so that by Euler's theorem the sum is the logit all the same."""
    g = gemma(kind, dtype=torch.float64)
    tokens = g.tokens("hello world and we")
    cut = g.every_layer("mlp_out")
    patterns = FreezePatterns(g.capture(tokens, g.every_layer("pattern")))
    for freeze in ([], [patterns], [FreezeNorms()]):
        run = g.capture(tokens, ["embed", *cut, "final_norm"], interventions=[*freeze, *map(Leaf, cut)], grad=True)
        leaves = [run["embed"], *(run[site] for site in cut)]
        gradients = torch.autograd.grad(_target(g, run), leaves)
        total = sum((x * gradient).sum() for x, gradient in zip(leaves, gradients, strict=True))
        same = abs((total - _target(g, run)).item()) < 1e-3
        assert same == (freeze != [] and freeze[0] is not patterns and kind != "gemma2")


SITES = (
    "embed",
    "resid_pre.2",
    "q.1",
    "v.2",
    "pattern.1",
    "z.2",
    "resid_mid.1",
    "mlp_act.2",
    "mlp_out.0",
    "final_in",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", SITES)
def test_gradients_at_a_site_equal_finite_differences(kind: Kind, site: str) -> None:
    """In float64, with frozen norms and watched patterns (transformers' own norms and softmax round to
    float32)."""
    g = gemma(kind, dtype=torch.float64)
    tokens = g.tokens("hello world and we")
    qk = kind != "gemma2"
    freeze = FreezeNorms(g.capture(tokens, FreezeNorms.sites(4, qk=qk)), qk=qk)
    sites = [site, "final_norm", *g.every_layer("pattern")]
    run = g.capture(tokens, sites, interventions=[freeze], grad=True)
    (gradient,) = torch.autograd.grad(_target(g, run), run[site])
    x = run[site].detach()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)

    def at(step: float) -> float:
        moved = Replace(site, x + step * direction)
        return _target(g, g.capture(tokens, sites, interventions=[freeze, moved])).item()

    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_tensors_are_connected_in_the_order_of_the_pass(kind: Kind) -> None:
    g = gemma(kind)
    tokens = g.tokens(TEXTS[0])
    sites = ["embed", "pattern.0", *g.every_layer("resid_mid"), *g.every_layer("resid_post")]
    run = g.capture(tokens, sites, logits=True, grad=True)
    plain = g.capture(tokens, sites, logits=True)
    assert run["embed"].is_leaf
    assert all(torch.equal(run[s].detach(), plain[s]) for s in run.acts)
    assert torch.equal(run.logits.detach(), plain.logits)
    assert run.logits.requires_grad
    gradients = torch.autograd.grad(run.logits[0, -1, 7], [run[s] for s in run.acts])
    assert all(bool(d.abs().sum() > 0) for d in gradients)
    assert not any(p.grad is not None for p in g.model.parameters())
    assert not plain["resid_post.3"].requires_grad


def test_an_interventions_own_vector_gets_a_gradient() -> None:
    g = gemma()
    tokens = g.tokens(TEXTS[0])
    vector = torch.zeros(24, requires_grad=True)
    run = g.capture(tokens, ["resid_post.1", "final_norm"], interventions=[Add("resid_post.1", vector)], grad=True)
    by_vector, by_site = torch.autograd.grad(_target(g, run), [vector, run["resid_post.1"]])
    assert torch.allclose(by_vector, by_site.sum((0, 1)), atol=1e-5)


def test_a_leaf_cuts_the_graph() -> None:
    g = gemma()
    run = g.capture(
        g.tokens(TEXTS[0]),
        ["embed", "resid_post.1", "final_norm"],
        interventions=[Leaf("resid_post.1")],
        grad=True,
    )
    before, at = torch.autograd.grad(_target(g, run), [run["embed"], run["resid_post.1"]], allow_unused=True)
    assert before is None
    assert bool(at.abs().sum() > 0)
    assert run["resid_post.1"].is_leaf


def test_grad_works_inside_no_grad_and_leaves_the_mode_alone() -> None:
    g = gemma()
    tokens = g.tokens("hello world")
    with torch.no_grad():
        run = g.capture(tokens, ["resid_post.1"], grad=True)
        assert not torch.is_grad_enabled()
    assert run["resid_post.1"].requires_grad
    assert not g.capture(tokens, ["resid_post.1"])["resid_post.1"].requires_grad
    assert torch.is_grad_enabled()


def test_the_lens_is_differentiable() -> None:
    g = gemma()
    x = torch.randn(2, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (gradient,) = torch.autograd.grad(g.unembed(x)[0, 5], x)
    assert bool(gradient[0].abs().sum() > 0)
    assert bool((gradient[1] == 0).all())


def test_an_edit_may_keep_a_graph_of_its_own() -> None:
    """A dictionary in the place of an activation, trained through the rest of the model."""
    g = gemma()
    weight = torch.eye(24).requires_grad_()
    tokens = g.tokens(TEXTS[0])
    run = g.capture(tokens, (), logits=True, grad=True, interventions=[Edit("resid_post.1", lambda x: x @ weight)])
    (gradient,) = torch.autograd.grad(run.logits[0].logsumexp(-1).sum(), weight)
    assert bool(gradient.abs().sum() > 0)
