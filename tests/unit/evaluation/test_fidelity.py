"""Everything that is measured of rows, streamed in batches, against float64 formulas over all rows at once.

The rows are awkward on purpose: means far from zero, dimensions of different spread, a few rows of enormous norm,
negative activations, documents of different length, batches cut anywhere between documents.
"""

import json

import pytest
import torch

from gemscope.core.errors import InputError
from gemscope.dictionaries.sparse import Support
from gemscope.evaluation.fidelity import DENSITY_BINS, ErrorSums, FidelitySums, Targets
from gemscope.evaluation.groups import STRETCHES, Places
from gemscope.evaluation.moments import Moments
from unit.dictionaries.zoo import random_dictionary

LENGTHS = (40, 3, 77, 1, 120, 59, 200)
NEAR = {"rel": 1e-9, "abs": 1e-12}


def case(offset: float = 0.0, outliers: int = 0, d_in: int = 6, d_sae: int = 9):
    generator = torch.Generator().manual_seed(1)
    rows = sum(LENGTHS)
    x = torch.randn(rows, d_in, generator=generator, dtype=torch.float64) * torch.arange(1, d_in + 1) + offset
    for i in range(outliers):
        x[37 * i + 5] *= 300.0 + 1e4 * i
    recon = 0.9 * x + 0.3 * torch.randn(rows, d_in, generator=generator, dtype=torch.float64) + 0.2
    acts = torch.rand(rows, d_sae, generator=generator, dtype=torch.float64) - 0.2
    acts = acts * (torch.rand(rows, d_sae, generator=generator) < torch.linspace(0, 0.6, d_sae))
    return x, recon, acts


def sums_of(x, recon, acts, cuts=(), lengths=LENGTHS, prefixes=()):
    """The sums after batches of whole documents, cut before the documents ``cuts``."""
    dictionary = random_dictionary("sae", d_in=x.shape[1], d_sae=acts.shape[1], prefixes=prefixes)
    moments = Moments(x.shape[1], len(lengths))
    errors = ErrorSums("resid_post.0", moments, len(lengths))
    sums = FidelitySums(dictionary, [errors], len(lengths))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(1, n + 1) for n in lengths]).double().log2().floor().long()
    speaker = STRETCHES + owner % 3
    for first, last in zip((0, *cuts), (*cuts, len(lengths)), strict=True):
        at = (owner >= first) & (owner < last)
        places = Places(owner[at], position[at], speaker[at])
        part = acts[at]
        row, latent = part.nonzero().unbind(1)
        sums.add(Support(row, latent, len(part), acts.shape[1]), part[row, latent], places)
        errors.add(Targets.of(x[at], moments.add(x[at], places)), recon[at], places)
    return sums


def measured(x, recon, acts, cuts=(), lengths=LENGTHS):
    return sums_of(x, recon, acts, cuts, lengths).result()


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("outliers", [0, 3])
@pytest.mark.parametrize("cuts", [(), (1,), (2, 3, 5)])
def test_every_number_equals_the_formula_over_all_rows_at_once(offset, outliers, cuts):
    x, recon, acts = case(offset, outliers)
    got = measured(x, recon, acts, cuts)
    error, norm = (x - recon).square().sum(1), x.norm(dim=1)
    assert got.rows == len(x)
    assert got.fvu == pytest.approx((error.sum() / (x - x.mean(0)).square().sum()).item(), **NEAR)
    assert got.mse == pytest.approx(error.mean().item(), **NEAR)
    assert got.cosine == pytest.approx(torch.cosine_similarity(x, recon).mean().item(), **NEAR)
    assert got.norm_ratio == pytest.approx((recon.norm(dim=1).mean() / norm.mean()).item(), **NEAR)
    assert got.bias == pytest.approx((recon.square().sum() / (x * recon).sum()).item(), **NEAR)
    assert got.l1 == pytest.approx(acts.abs().sum(1).mean().item(), **NEAR)
    site = got.by_site[0]
    assert site.norm_in == pytest.approx(norm.mean().item(), **NEAR)
    assert site.compat["l2_ratio"] == pytest.approx((recon.norm(dim=1) / norm).mean().item(), **NEAR)
    active = (acts != 0).sum(1)
    assert got.l0 == pytest.approx(active.double().mean().item(), **NEAR)
    ordered = active.sort().values.tolist()
    wanted = [ordered[max(-(-int(100 * q) * len(x) // 100) - 1, 0)] for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
    assert got.l0_quantiles == tuple(map(float, wanted))
    assert got.firings == tuple((acts != 0).sum(0).tolist())
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    texts = [len(owner[acts[:, i] != 0].unique()) for i in range(acts.shape[1])]
    assert got.texts_fired == tuple(texts)


@pytest.mark.parametrize("outliers", [0, 1, 3])
def test_the_robust_fvu_is_that_of_the_rows_of_ordinary_norm(outliers):
    x, recon, acts = case(0.5, outliers)
    keep = x.norm(dim=1) <= 10 * x.norm(dim=1).median()
    got = measured(x, recon, acts, (2, 4))
    assert got.outliers == int((~keep).sum()) == outliers
    inner = x[keep]
    wanted = (inner - recon[keep]).square().sum() / (inner - inner.mean(0)).square().sum()
    assert got.fvu_robust == pytest.approx(wanted.item(), **NEAR)


def test_an_attention_sink_flatters_the_fvu_and_not_the_robust_one():
    x, _, acts = case()
    recon = x + 0.5 * x.std(0) * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    honest = measured(x, recon, acts).fvu
    x, recon = x.clone(), recon.clone()
    x[100] = recon[100] = 300 * x[101]
    got = measured(x, recon, acts)
    assert got.fvu < 0.5 * honest
    assert got.fvu_robust == pytest.approx(honest, rel=0.02)


def test_by_position_and_by_speaker_the_errors_average_to_the_whole():
    x, recon, acts = case(2.0, 1)
    got = measured(x, recon, acts, (3,))
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    error, spread = (x - recon).square().sum(1), (x - x.mean(0)).square().sum() / len(x)
    by = {group.name: group for group in got.by_group}
    user = owner % 3 == 1
    assert by["user"].rows == int(user.sum())
    assert by["user"].fvu == pytest.approx((error[user].mean() / spread).item(), **NEAR)
    assert by["user"].l0 == pytest.approx((acts[user] != 0).sum(1).double().mean().item(), **NEAR)
    first = torch.cat([torch.arange(n) == 0 for n in LENGTHS])
    assert by["1"].fvu == pytest.approx((error[first].mean() / spread).item(), **NEAR)
    for names in (("text", "user", "model"), [name for name in by if name not in ("text", "user", "model")]):
        whole = sum(by[name].fvu * by[name].rows for name in names) / len(x)
        assert whole == pytest.approx(got.fvu, **NEAR)


def test_fvu_keeps_its_digits_where_the_mean_is_a_million_times_the_spread():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    x = spread + 1e6
    got = measured(x, x + 0.5, torch.ones(500, 2), (2, 5))
    assert got.fvu == pytest.approx((0.75 * 500 / (spread - spread.mean(0)).square().sum()).item(), rel=1e-8)


def test_predicting_the_mean_has_fvu_one_and_perfection_has_zero():
    x, _, acts = case(3.0)
    assert measured(x, x.mean(0).expand_as(x), acts).fvu == pytest.approx(1.0, abs=1e-12)
    perfect = measured(x, x, acts)
    assert perfect.fvu == 0.0
    assert perfect.cosine == pytest.approx(1.0)
    assert perfect.bias == pytest.approx(1.0)


def test_a_constant_bias_counts_as_error():
    x, _, acts = case()
    got = measured(x, x + 1, acts)
    assert got.mse == pytest.approx(x.shape[1])
    assert got.fvu == pytest.approx((x.shape[1] * len(x) / (x - x.mean(0)).square().sum()).item(), **NEAR)


def test_the_measures_do_not_depend_on_how_rows_are_batched():
    x, recon, acts = case(5.0, 2)
    whole, cut = measured(x, recon, acts), measured(x, recon, acts, (1, 2, 3, 4, 5, 6))
    for name in ("fvu", "mse", "cosine", "norm_ratio", "bias", "fvu_robust", "l1"):
        assert getattr(cut, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_negative_activations_count_in_l1_by_their_size():
    x, recon, _ = case()
    acts = torch.zeros(len(x), 3, dtype=torch.float64)
    acts[:, 0], acts[:, 1] = 1.0, -1.0
    assert measured(x, recon, acts).l1 == 2.0


def test_saebench_s_wrong_formulas_are_kept_apart_and_are_its_own():
    x, recon, acts = case(3.0)
    got = measured(x, recon, acts, (4,)).by_site[0]
    mse = (x - recon).square().sum(1)
    square = x.square().mean()  # over all entries: what its mean per dimension comes to
    wrong = 1 - mse.mean() / (x.square().sum(1).mean() - square**2)
    assert got.compat["explained_variance_saebench_bug"] == pytest.approx(wrong.item(), **NEAR)
    assert abs(got.compat["explained_variance_saebench_bug"] - (1 - got.fvu)) > 0.01
    cut = sum(LENGTHS[:4])
    parts = [mse[:cut], mse[cut:]]
    wrong = sum(part.sum() / len(part) for part in parts) / len(x)
    assert got.compat["mse_saebench_bug"] == pytest.approx(wrong.item(), **NEAR)
    legacy = torch.cat(
        [1 - (e / (p - p.mean(0)).square().sum(1)) for e, p in zip(parts, (x[:cut], x[cut:]), strict=True)]
    )
    assert got.compat["explained_variance_legacy"] == pytest.approx(legacy.mean().item(), **NEAR)


def test_dead_dense_and_the_histogram_count_latents():
    acts = torch.zeros(500, 5)
    acts[:1, 1] = 1.0
    acts[:50, 2] = 1.0
    acts[:51, 3] = 1.0
    acts[:, 4] = 1.0
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    got = measured(x, x, acts)
    assert (got.dead, got.alive, got.dead_fraction, got.dense_fraction) == (1, 4, 0.2, 0.4)
    bins = dict(zip(DENSITY_BINS, got.histogram, strict=False))
    assert bins[-3.0] == 1
    assert bins[-1.0] == 2
    assert bins[-0.5] == 1
    assert sum(got.histogram) == got.alive
    assert torch.allclose(got.density, torch.tensor([0, 0.002, 0.1, 0.102, 1.0], dtype=torch.float64))
    assert json.loads(json.dumps(got.as_dict()))["dead_fraction"] == 0.2


def test_rows_without_spread_are_refused():
    ones = torch.ones(500, 2)
    with pytest.raises(InputError, match="spread"):
        measured(ones, ones, ones)
