"""L0, FVU and the rest, streamed in batches, against one float64 formula over all rows."""

import json

import pytest
import torch

from gemscope.core.errors import InputError
from gemscope.evaluation.fidelity import DENSITY_BINS, FidelitySums


def case(offset: float = 0.0, rows: int = 500, d_in: int = 6, d_sae: int = 9):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, d_in, generator=generator) * torch.arange(1, d_in + 1) + offset
    recon = x + 0.3 * torch.randn(rows, d_in, generator=generator) + 0.2
    acts = torch.rand(rows, d_sae, generator=generator)
    acts = acts * (torch.rand(rows, d_sae, generator=generator) < torch.linspace(0, 0.6, d_sae))
    return x, recon, acts


def measured(x, recon, acts, *cuts):
    sums = FidelitySums(x.shape[1], acts.shape[1])
    for part in zip(x.tensor_split(cuts), recon.tensor_split(cuts), acts.tensor_split(cuts), strict=True):
        sums.add(part[0], part[1], part[2].nonzero()[:, 1])
    return sums.result()


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("cuts", [(), (1,), (3, 77, 77, 410)])
def test_every_number_equals_the_formula_over_all_rows_at_once(offset, cuts):
    x, recon, acts = case(offset)
    got = measured(x, recon, acts, *cuts)
    x, recon, acts = x.double(), recon.double(), acts.double()
    error = (x - recon).square().sum(1)
    assert got.fvu == pytest.approx((error.sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-10)
    assert got.mse == pytest.approx(error.mean().item(), rel=1e-10)
    assert got.l0 == pytest.approx((acts != 0).sum(1).double().mean().item(), rel=1e-12)
    assert got.cosine == pytest.approx(torch.cosine_similarity(x, recon).mean().item(), rel=1e-10)
    assert got.norm_ratio == pytest.approx((recon.norm(dim=1).mean() / x.norm(dim=1).mean()).item(), rel=1e-10)
    assert got.firings == tuple((acts != 0).sum(0).tolist())


def test_fvu_keeps_its_digits_where_the_mean_is_a_million_times_the_spread():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    x = spread + 1e6
    got = measured(x, x + 0.5, torch.ones(4000, 2), 1000, 2000)
    assert got.fvu == pytest.approx((0.75 * 4000 / (spread - spread.mean(0)).square().sum()).item(), rel=1e-8)


def test_predicting_the_mean_has_fvu_one_and_perfection_has_zero():
    x, _, acts = case(3.0)
    assert measured(x, x.mean(0).expand_as(x), acts).fvu == pytest.approx(1.0, abs=1e-6)
    perfect = measured(x, x, acts)
    assert perfect.fvu == 0.0
    assert perfect.cosine == pytest.approx(1.0)


def test_a_constant_bias_counts_as_error():
    x, _, acts = case()
    assert measured(x, x + 1, acts).mse == pytest.approx(x.shape[1])


def test_dead_dense_and_the_histogram_count_latents():
    acts = torch.zeros(1000, 5)
    acts[:1, 1] = 1.0
    acts[:100, 2] = 1.0
    acts[:101, 3] = 1.0
    acts[:, 4] = 1.0
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    got = measured(x, x, acts)
    assert (got.dead, got.alive, got.dead_fraction, got.dense_fraction) == (1, 4, 0.2, 0.4)
    bins = dict(zip(DENSITY_BINS, got.histogram, strict=False))
    assert bins[-3.0] == 1
    assert bins[-1.0] == 2
    assert bins[-0.5] == 1
    assert sum(got.histogram) == got.alive
    assert torch.allclose(got.density, torch.tensor([0, 0.001, 0.1, 0.101, 1.0], dtype=torch.float64))
    assert json.loads(json.dumps(got.as_dict()))["dead_fraction"] == 0.2


def test_rows_without_spread_are_refused():
    ones = torch.ones(5, 2)
    with pytest.raises(InputError, match="spread"):
        measured(ones, ones, ones)
