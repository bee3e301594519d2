"""Matching and metrics against scipy, scikit-learn and loops in float64; the truth itself scores 1."""

import itertools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

from gemscope.core.errors import InputError
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.multilayer import Crosscoder
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.transcoder import SkipTranscoder
from gemscope.evaluation.worlds.codes import CodesConfig
from gemscope.evaluation.worlds.matching import adjusted, assignment, match, random_floor
from gemscope.evaluation.worlds.metrics import best_readers, decoder_rows, encoder_rows, score, shared_auc
from gemscope.evaluation.worlds.tiers import tier
from gemscope.evaluation.worlds.world import World, WorldConfig


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
        lambda shape: hypothesis.extra.numpy.arrays(np.float64, shape, elements=st.integers(0, 6).map(float))
    )
)
def test_the_assignment_is_the_best_one_ties_included(cost: np.ndarray) -> None:
    rows, columns = assignment(cost)
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == min(cost.shape)
    assert rows.tolist() == sorted(rows.tolist())
    assert cost[rows, columns].sum() == cost[linear_sum_assignment(cost)].sum()


@pytest.mark.parametrize("shape", [(120, 120), (60, 200), (200, 60)])
def test_large_assignments_cost_what_scipys_cost(shape: tuple[int, int]) -> None:
    cost = np.random.default_rng(0).random(shape)
    assert cost[assignment(cost)].sum() == pytest.approx(cost[linear_sum_assignment(cost)].sum(), abs=1e-12)


def test_a_match_by_trying_every_permutation() -> None:
    generator = torch.Generator().manual_seed(0)
    learned, true = (torch.randn(5, 4, generator=generator) for _ in range(2))
    cosines = torch.nn.functional.cosine_similarity(learned.double()[:, None], true.double()[None], dim=-1).abs()
    best = max(float(cosines[list(range(5)), list(order)].mean()) for order in itertools.permutations(range(5)))
    found = match(learned, true)
    assert found.mcc == pytest.approx(best, abs=1e-12)
    assert found.best.tolist() == cosines.argmax(1).tolist()
    assert found.uniqueness == len(set(cosines.argmax(1).tolist())) / 5
    flipped = match(-4 * learned[torch.randperm(5)], true)
    assert flipped.mcc == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "latents", "floor"), [("easy", 128, 0.333), ("nano", 64, 0.365), ("mini", 128, 0.280)]
)
def test_random_directions_score_the_documented_floors(name: str, latents: int, floor: float) -> None:
    """Documented for random truths; these worlds' are pushed apart a little."""
    world = World(tier(name).world)
    everywhere = torch.ones(latents, world.config.d, dtype=torch.bool)
    assert random_floor(everywhere, world.decoder)[0] == pytest.approx(floor, abs=0.008)
    assert adjusted(floor, floor) == 0
    assert adjusted(1.0, floor) == 1


def _world(**more: object) -> World:
    return World(WorldConfig(CodesConfig(10, most=0.4, least=0.1), 8, **more))  # pyright: ignore[reportArgumentType]


def _random_sae(world: World, latents: int = 6) -> SAE:
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(8, latents, generator=generator)
    W_dec = torch.randn(latents, 8, generator=generator)
    return SAE(
        W, torch.zeros(latents), W_dec, torch.zeros(8), torch.full((latents,), 3.0), activation=Activation("jumprelu")
    )


def test_every_number_of_a_random_dictionary_is_the_slow_ones() -> None:
    world = _world()
    sae = _random_sae(world)
    found = score(world, sae, rows=500, seed=3)
    drawn = world.draw(500, world.generator(2, 3))
    x, holds = drawn.x[:, 0].double(), (drawn.codes > 0).numpy()
    pre = x @ sae.W_enc.double() + sae.b_enc.double()
    acts = torch.where(pre > 3.0, pre, 0.0)
    recon = acts @ sae.W_dec.double() + sae.b_dec.double()
    fires, best = (acts > 0).numpy(), match(sae.W_dec, world.decoder).best.tolist()
    pairs = [(holds[:, feature], fires[:, latent]) for latent, feature in enumerate(best)]
    for name, function in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        wanted = float(np.mean([function(h, f, zero_division=0) for h, f in pairs]))
        assert getattr(found.detection, name) == pytest.approx(wanted, abs=1e-12)
    floor = [2 * h.mean() * f.mean() / (h.mean() + f.mean()) for h, f in pairs]
    assert found.detection.f1_floor == pytest.approx(float(np.mean(floor)), abs=1e-12)
    explained = 1 - (x - recon).square().sum() / (x - x.mean(0)).square().sum()
    assert found.explained == pytest.approx(float(explained), abs=1e-5)
    assert found.shrinkage == pytest.approx(float((recon.norm(dim=1) / x.norm(dim=1)).mean()), abs=1e-5)
    assert (found.l0, found.true_l0) == (fires.sum() / 500, holds.sum() / 500)
    assert (found.dead, found.latents, found.rows) == (int((fires.sum(0) == 0).sum()), 6, 500)


def test_the_floor_of_f1_is_what_shuffled_rows_give() -> None:
    world = _world()
    sae = _random_sae(world)
    drawn = world.draw(40_000, world.generator(2, 0))
    fires = sae.encode(drawn.x[:, 0]) > 0
    shuffled = (drawn.codes > 0)[torch.randperm(40_000, generator=torch.Generator().manual_seed(0))]
    best = match(sae.W_dec, world.decoder).best
    both = (fires & shuffled[:, best]).double().sum(0)
    f1 = (2 * both / (fires.sum(0) + shuffled[:, best].sum(0)).clamp(min=1)).mean().item()
    assert score(world, sae, rows=40_000).detection.f1_floor == pytest.approx(f1, abs=0.01)


def test_the_truth_scores_one() -> None:
    """Orthogonal features can be read exactly."""
    world = World(
        WorldConfig(CodesConfig(8, most=0.4, least=0.2), 8, "skip_transcoder", affine=1.0, orthogonal_steps=0)
    )
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    world.read = basis[None]
    bias = -(world.b_read[0] @ basis.T)
    assert world.A is not None
    write, skip = world.write[0], world.A[0]
    x = world.draw(2_000, world.generator(2, 0)).x[:, 0].double()
    readers = best_readers(world, torch.cov(x.T, correction=0)[None])
    wanted = torch.nn.functional.cosine_similarity(readers, basis.double()).abs().mean().item()
    truth = SkipTranscoder(basis.T.contiguous(), bias, write, world.b_write[0], torch.full((8,), 1e-3), W_skip=skip)
    found = score(world, truth, rows=2_000)
    numbers = (found.mcc, found.uniqueness, found.detection.f1, found.affine_r2)
    assert numbers == pytest.approx((1.0,) * 4, abs=1e-6)
    assert found.encoder_mcc == pytest.approx(wanted, abs=1e-5)
    assert (found.explained, found.mcc_adjusted) == pytest.approx((1.0, 1.0), abs=1e-5)
    assert found.l0 == pytest.approx(found.true_l0, abs=1e-3)


def test_the_best_readers_are_those_of_least_squares() -> None:
    world = _world(kind="transcoder", noise=0.3)
    drawn = world.draw(4_000, world.generator(4))
    x = drawn.x[:, 0].double() - drawn.x[:, 0].double().mean(0)
    codes = drawn.codes.double() - drawn.codes.double().mean(0)
    least = torch.linalg.lstsq(x, codes).solution.T
    found = best_readers(world, torch.cov(x.T, correction=0)[None])
    assert (
        torch.nn.functional.cosine_similarity(found, least).min() > 0.98
    )  # codes are uncorrelated but for their number


def _crosscoder(n: int = 2, d_sae: int = 7) -> Crosscoder:
    generator = torch.Generator().manual_seed(5)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Crosscoder(
        [rand(8, d_sae) for _ in range(n)],
        [rand(d_sae) for _ in range(n)],
        [rand(n - i, d_sae, 8) for i in range(n)],
        [rand(8) for _ in range(n)],
        [torch.full((d_sae,), 2.0) for _ in range(n)],
    )


def test_latents_of_several_layers_are_laid_side_by_side() -> None:
    made = _crosscoder(3)
    decoder, encoder = decoder_rows(made).view(3, 7, 3, 8), encoder_rows(made).view(3, 7, 3, 8)
    for layer in range(3):
        for place in range(3):
            wanted = made.W_dec[layer][place - layer] if place >= layer else torch.zeros(7, 8)
            assert torch.equal(decoder[layer, :, place], wanted)
            read = made.W_enc[layer].T if place == layer else torch.zeros(7, 8)
            assert torch.equal(encoder[layer, :, place], read)


def test_the_call_of_shared_features_is_a_roc_area() -> None:
    world = _world(kind="crosscoder", layers=2, shared=4)
    made = _crosscoder()
    learned = decoder_rows(made)
    found = match(learned, world.decoder)
    norms = learned[found.pairs[0]].view(-1, 2, 8).norm(dim=2)
    wanted = roc_auc_score(world.in_all_layers[found.pairs[1]], norms.min(1).values / norms.max(1).values)
    assert shared_auc(world, learned, found) == pytest.approx(wanted, abs=1e-12)
    whole = score(world, made, rows=300)
    assert (whole.shared_auc, whole.latents) == (pytest.approx(wanted, abs=1e-12), 14)


def test_a_dictionary_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match="world for a crosscoder over 2"):
        score(_world(kind="crosscoder", layers=2, shared=4), _random_sae(_world()))
