"""The generator against its own definitions, written out slowly, and against what was measured on the peer's worlds."""

from dataclasses import replace

import pytest
import torch

from gemscope.core.errors import InputError
from gemscope.evaluation.worlds.codes import Codes, CodesConfig, base_rates, corrected_rates
from gemscope.evaluation.worlds.directions import mean_max_cosine, spread_out, unit
from gemscope.evaluation.worlds.tiers import TIERS, tier
from gemscope.evaluation.worlds.world import Kind, Stream, World, WorldConfig
from gemscope.training.data import ActivationSource

TREES = CodesConfig(40, most=0.5, least=0.05, exponent=0.7, roots=3, branching=3, depth=2, correlation=0.2, rank=5)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rates_are_those_of_the_recipe():
    rates = base_rates(TREES).double()
    raw = torch.arange(1, 41, dtype=torch.float64) ** -0.7
    wanted = 0.05 + 0.45 * (raw - raw[-1]) / (raw[0] - raw[-1])
    torch.testing.assert_close(rates, wanted, atol=1e-6, rtol=0)

    corrected = corrected_rates(TREES, base_rates(TREES))
    first_child = 3
    for parent in range(3 + 9):
        children = range(first_child + 3 * parent, first_child + 3 * parent + 3)
        for child in children:
            others = sum(float(rates[other]) for other in children if other != child)
            given = float(rates[child] / rates[parent]) * (1 + others / float(rates[parent]))
            assert corrected[child].item() == pytest.approx(min(1.0, given), rel=1e-5)
    assert corrected[:3].tolist() == base_rates(TREES)[:3].tolist()
    assert corrected[39:].tolist() == base_rates(TREES)[39:].tolist()


def test_the_16k_world_has_the_trees_of_the_recipe():
    assert TIERS["16k"].world.codes.levels == (128, 640, 2688, 10_880)


@pytest.mark.parametrize("correlation", [0.0, 0.2])
def test_features_without_a_hierarchy_fire_at_their_rates(correlation: float):
    config = replace(TREES, roots=0, depth=0, correlation=correlation)
    rows = 40_000
    fires = (Codes(config).draw(rows, _generator()) > 0).double().mean(0)
    rates = base_rates(config).double()
    deviation = (rates * (1 - rates) / rows).sqrt()
    assert ((fires - rates).abs() < 5 * deviation).all()


def test_correlations_are_those_of_the_factors():
    config = replace(TREES, roots=0, depth=0, most=0.51, least=0.49)
    codes = Codes(config)
    assert codes.factors is not None
    fires = (codes.draw(60_000, _generator()) > 0).double()
    found = torch.corrcoef(fires.T)
    gaussian = (codes.factors.T @ codes.factors).double()
    wanted = 2 / torch.pi * torch.arcsin(gaussian)  # of signs of Gaussians, at rates of a half
    away = ~torch.eye(40, dtype=torch.bool)
    assert (found - wanted)[away].abs().max() < 0.03


def test_no_child_without_its_parent_and_no_two_siblings():
    sizes = Codes(TREES).draw(5_000, _generator())
    fires = sizes > 0
    for parent in range(12):
        children = fires[:, 3 + 3 * parent : 6 + 3 * parent]
        assert not (children.any(1) & ~fires[:, parent]).any()
        assert children.sum(1).max() <= 1


def test_a_child_is_as_large_as_its_parent_makes_it():
    config = CodesConfig(
        2, most=1.0, least=0.999, roots=1, branching=1, depth=1, mean_first=5.0, mean_last=4.0, spread=0.1
    )
    codes = Codes(config)
    sizes = codes.draw(4_000, _generator())
    both = sizes[(sizes > 0).all(1)].double()
    own = both[:, 1] * 5.0 / both[:, 0]  # without the parent
    assert own.mean().item() == pytest.approx(4.0, abs=0.05)
    assert torch.corrcoef(torch.stack([own, both[:, 0]]))[0, 1].abs() < 0.08


def test_siblings_win_equally_often():
    config = CodesConfig(4, most=0.95, least=0.9, roots=1, branching=3, depth=1)
    codes = Codes(config)
    codes.thresholds, codes.rates = codes.thresholds * 0 - 9, torch.ones(4)  # everything is drawn
    wins = (codes.draw(9_000, _generator()) > 0).double().mean(0)[1:]
    assert (wins - 1 / 3).abs().max() < 5 * (2 / 9 / 9_000) ** 0.5


@pytest.mark.parametrize(("name", "rho", "l0"), [("easy", 0.296, 3.4), ("nano", 0.343, 3.97), ("mini", 0.251, 5.45)])
def test_the_worlds_are_the_peers(name: str, rho: float, l0: float):
    """Mean largest |cosine| and L0 as measured on the peer's own worlds of these settings."""
    world = World(tier(name).world)
    assert mean_max_cosine(world.decoder) == pytest.approx(rho, abs=6e-4)
    found = (world.draw(8_000, _generator()).codes > 0).double().sum(1)
    assert found.mean().item() == pytest.approx(l0, abs=0.1)


def test_pushing_apart_lowers_the_objective():
    rows = torch.randn(60, 20, generator=_generator())
    before, after = unit(rows), spread_out(rows, 50, 3e-3)
    assert (after @ after.T).square().sum() < 0.95 * (before @ before.T).square().sum()
    torch.testing.assert_close(after.norm(dim=1), torch.ones(60))


def _small(kind: Kind) -> WorldConfig:
    several = kind in ("clt", "crosscoder")
    codes = CodesConfig(24, most=0.3, least=0.1)
    affine = 1.0 if kind in ("clt", "skip_transcoder") else 0.0
    return WorldConfig(
        codes, 16, kind, layers=3 if several else 1, shared=9 if kind == "crosscoder" else 0, affine=affine
    )


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip_transcoder", "clt", "crosscoder"])
def test_rows_are_the_sums_they_are_said_to_be(kind: Kind):
    world = World(_small(kind))
    drawn = world.draw(50, _generator())
    x, y = torch.empty_like(drawn.x).double(), torch.empty_like(drawn.y).double()
    for layer in range(world.config.layers):
        x[:, layer] = drawn.codes.double() @ world.read[layer].double() + world.b_read[layer]
        y[:, layer] = drawn.codes.double() @ world.write[layer].double() + world.b_write[layer]
        if world.A is not None:
            y[:, layer] += x[:, layer] @ world.A[layer].double()
    torch.testing.assert_close(drawn.x.double(), x, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(drawn.y.double(), y, atol=1e-4, rtol=1e-5)
    if world.config.reconstructs:
        assert drawn.y is drawn.x


def test_features_of_several_layers_are_where_they_belong():
    clt = World(_small("clt"))
    reads, writes = clt.read.norm(dim=2) > 0, clt.write.norm(dim=2) > 0
    owner = reads.int().argmax(0)
    assert reads.sum(0).tolist() == [1] * 24
    assert torch.equal(writes, owner <= torch.arange(3)[:, None])

    cross = World(_small("crosscoder"))
    layers = (cross.read.norm(dim=2) > 0).sum(0)
    assert (layers == 3).sum() == 9
    assert (layers == 1).sum() == 15
    assert torch.equal(cross.in_all_layers, layers == 3)
    assert (cross.read.norm(dim=2) > 0).sum(1).tolist() == [14, 14, 14]


def test_a_stream_is_a_source_of_the_trainer_and_repeats():
    stream = Stream(World(_small("transcoder")), 300)
    (site,) = sites = stream.world.config.writes
    assert isinstance(stream, ActivationSource)
    first, again = (list(stream.batches(sites, 100, 3, 0)) for _ in range(2))
    assert [len(batch[site]) for batch in first] == [100] * 3
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a[site], b[site])
    other = next(stream.batches(sites, 100, 3, 1))
    assert not torch.equal(first[0][site], other[site])


def test_what_cannot_be_is_said():
    with pytest.raises(InputError, match="trees hold 39 features"):
        replace(TREES, features=30)
    with pytest.raises(InputError, match="clt and crosscoder have several"):
        WorldConfig(TREES, 16, "clt")
    with pytest.raises(InputError, match="there is no world 'giant'"):
        tier("giant")
