"""Thresholds from quantiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.dictionaries.sae import SAE
from gemscope.training import calibration
from gemscope.training.calibration import first_thresholds, set_thresholds, threshold_factor


def _sae(seed: int) -> SAE:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(6, 40, generator=g)
    return SAE(
        W,
        torch.randn(40, generator=g) / 3,
        W.T.contiguous(),
        torch.zeros(6),
        torch.rand(40, generator=g) + 0.3,
    )


def test_every_latent_starts_equally_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_LATENTS", 7)  # 40 latents in several blocks, the last one smaller
    torch.manual_seed(0)
    x, W_enc, b_enc = torch.randn(500, 6), torch.randn(6, 40), torch.zeros(40)
    threshold, scale = first_thresholds(x, W_enc, b_enc, 4.0)
    pre_acts = x @ W_enc + b_enc
    frequency = (pre_acts > threshold).float().mean(0)
    torch.testing.assert_close(frequency, torch.full((40,), 0.1), rtol=0, atol=0.0021)
    assert scale == pytest.approx(pre_acts.var(0).mean().sqrt().item(), rel=1e-4)


def test_first_thresholds_are_never_negative() -> None:
    threshold, _ = first_thresholds(torch.randn(100, 4), torch.randn(4, 10), torch.full((10,), -9.0), 3.0)
    assert threshold.min() == 0


@given(seed=st.integers(0, 1000), target=st.floats(0.5, 12))
@settings(max_examples=30, deadline=None)
def test_the_factor_gives_the_target_on_the_rows_it_was_fitted_on(seed: int, target: float) -> None:
    sae, x = _sae(seed), torch.randn(200, 6, generator=torch.Generator().manual_seed(seed))
    factor = threshold_factor(sae, x, target)
    sae.threshold.mul_(factor)
    assert (sae.encode(x) > 0).sum().item() == pytest.approx(200 * target, abs=1.01)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_no_latent_is_more_frequent_than_the_limit_and_the_others_make_up_for_it(seed: int) -> None:
    sae, x = _sae(seed), torch.randn(400, 6, generator=torch.Generator().manual_seed(seed))
    set_thresholds(sae, x, 4.0)
    before = (sae.encode(x) > 0).float().mean(0)
    limit = float(before.quantile(0.95))
    set_thresholds(sae, x, 4.0, limit)
    active = (sae.encode(x) > 0).float()
    assert active.sum(0).max() <= 0.9 * limit * 400 + 1  # two products may round a tie differently
    assert active.sum(1).mean() == pytest.approx(4.0, rel=0.01)
    assert (active.mean(0)[before < 0.5 * limit] >= before[before < 0.5 * limit]).all()


def test_a_target_that_no_factor_reaches_leaves_the_thresholds_alone() -> None:
    sae, x = _sae(0), torch.randn(200, 6)
    assert threshold_factor(sae, x, 39.0) == 1.0
    sae.threshold.zero_()
    assert threshold_factor(sae, x, 2.0) == 1.0
