"""The entries found by screening are exactly those of a dense matrix, ties, empty rows and dead latents included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.dictionaries import screening
from gemscope.dictionaries.activation import is_largest
from gemscope.dictionaries.screening import above, top_of_batch, top_of_rows
from gemscope.dictionaries.sparse import Support


def _dense(support: Support, values: torch.Tensor) -> torch.Tensor:
    found = torch.full((support.batch, support.d_sae), float("nan"), dtype=values.dtype)
    found[support.rows, support.latents] = values
    assert torch.equal(support.rows * support.d_sae + support.latents, (~found.isnan()).view(-1).nonzero()[:, 0])
    return found


def _case(seed: int, d_sae: int, whole: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole numbers make every product exact and full of ties; some rows and latents reach nothing."""
    torch.manual_seed(seed)
    if whole:
        x, E, bias = torch.randint(-2, 3, (20, 5)), torch.randint(-2, 3, (d_sae, 5)), torch.randint(-3, 2, (d_sae,))
    else:
        x, E, bias = torch.randn(20, 5), torch.randn(d_sae, 5), torch.randn(d_sae) - 0.5
    x[3] = 0
    E[d_sae // 2] = 0
    E[1] = E[0]  # duplicates
    return x.double(), E.double(), bias.double()


SIZES = st.sampled_from([1, 2, 7, 64, 96, 256, 1024, 4096])


@given(seed=st.integers(0, 10_000), d_sae=SIZES, whole=st.booleans(), screen=st.booleans())
@settings(max_examples=60, deadline=None)
def test_above(seed: int, d_sae: int, whole: bool, screen: bool) -> None:
    x, E, bias = _case(seed, max(2, d_sae), whole)
    floor = torch.randint(0, 4, (len(E),)).double()
    pre_acts = x @ E.T + bias
    found = _dense(*above(x, E, bias, floor, screen=screen))
    expected = torch.where(pre_acts > floor, pre_acts, torch.nan)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, equal_nan=True)


@given(
    seed=st.integers(0, 10_000), d_sae=SIZES, k=st.sampled_from([1, 3, 40]), whole=st.booleans(), screen=st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_top_of_rows(seed: int, d_sae: int, k: int, whole: bool, screen: bool) -> None:
    x, E, bias = _case(seed, max(2, d_sae), whole)
    pre_acts = x @ E.T + bias
    found = _dense(*top_of_rows(x, E, bias, k, screen=screen))
    kept = is_largest(pre_acts, k) & (pre_acts > 0)
    torch.testing.assert_close(found, torch.where(kept, pre_acts, torch.nan), rtol=0, atol=1e-12, equal_nan=True)


@given(
    seed=st.integers(0, 10_000),
    d_sae=SIZES,
    count=st.sampled_from([1, 30, 400, 10**6]),
    guess=st.sampled_from([None, -1.0, 0.0, 1.0, 1e3]),
    whole=st.booleans(),
    screen=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_top_of_batch_whatever_the_guess(
    seed: int, d_sae: int, count: int, guess: float | None, whole: bool, screen: bool
) -> None:
    x, E, bias = _case(seed, max(2, d_sae), whole)
    flat = (x @ E.T + bias).view(1, -1)
    support, values, smallest = top_of_batch(x, E, bias, count, guess=guess, screen=screen)
    kept = (is_largest(flat, min(count, flat.shape[1])) & (flat > 0)).view(20, -1)
    pre_acts = flat.view(20, -1)
    expected = torch.where(kept, pre_acts, torch.nan)
    torch.testing.assert_close(_dense(support, values), expected, rtol=0, atol=1e-12, equal_nan=True)
    assert smallest == pytest.approx(float(pre_acts[kept].min()) if kept.any() else 0.0, abs=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_screen_loses_nothing_at_real_sizes(size: float) -> None:
    """Where rounding to bf16 reorders thousands of near-ties, the fp32 result still comes out."""
    torch.manual_seed(0)
    x, E, bias = size * torch.randn(300, 320), torch.randn(2048, 320), size * torch.randn(2048)
    floor = torch.full((2048,), 30 * size)
    for find in (
        lambda screen: above(x, E, bias, floor, screen=screen),
        lambda screen: top_of_rows(x, E, bias, 32, screen=screen),
        lambda screen: top_of_batch(x, E, bias, 300 * 32, screen=screen)[:2],
    ):
        (plain, values), (screened, found) = find(False), find(True)
        differing = set(zip(plain.rows.tolist(), plain.latents.tolist(), strict=True)) ^ set(
            zip(screened.rows.tolist(), screened.latents.tolist(), strict=True)
        )
        assert len(differing) <= 2  # two fp32 products may round a tie differently
        if not differing:
            torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-4 * size)


def test_bf16_alone_would_not_do() -> None:
    """The bound matters: choosing by the rounded product changes many choices."""
    torch.manual_seed(0)
    x, E, bias = torch.randn(300, 320), torch.randn(2048, 320), torch.zeros(2048)
    rounded = (x.bfloat16() @ E.T.bfloat16()).float()
    chosen = is_largest(rounded, 32)
    support, _ = top_of_rows(x, E, bias, 32, screen=True)
    assert (~chosen[support.rows, support.latents]).sum() > 20


@pytest.mark.parametrize("rows", [1, 7, 256])
def test_the_result_does_not_depend_on_the_block_size(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, E, bias = _case(0, 96, False)
    expected = top_of_rows(x, E, bias, 5)
    monkeypatch.setattr(screening, "_ROWS", rows)
    monkeypatch.setattr(screening, "_BLOCK", {"cpu": 1})
    found = top_of_rows(x, E, bias, 5)
    assert torch.equal(found[0].rows, expected[0].rows)
    assert torch.equal(found[0].latents, expected[0].latents)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_screen_bears_the_worst_rounding(sign: float) -> None:
    """Every number is just below the middle of two of bf16, so all products lose almost 2 x 2^-8 of themselves."""
    worst = 1 + 2.0**-8 - 2.0**-20
    x, E = torch.full((3, 64), worst), torch.full((64, 64), worst)
    E[1:] *= 0.5
    product = 64 * worst**2
    assert float(x.bfloat16()[0] @ E.bfloat16()[0]) < (1 - 1.9 * 2.0**-8) * product
    bias = torch.full((64,), sign * 3.0)
    floor = torch.full((64,), product * (1 - 1e-6)) + bias
    support, _ = above(x, E, bias, floor, screen=True)
    assert support.rows.tolist() == [0, 1, 2]
    assert support.latents.tolist() == [0, 0, 0]
