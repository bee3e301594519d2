"""The sparse arithmetic against dense matrices and dense autograd, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.dictionaries import sparse
from gemscope.dictionaries.activations import jump_relu, step
from gemscope.dictionaries.sparse import (
    Support,
    decode_prefixes,
    decode_sparse,
    dots,
    encode_above,
    times_latents,
    times_rows,
)


def _case(seed: int, batch: int = 9, d: int = 4, d_sae: int = 11, share: float = 0.3):
    torch.manual_seed(seed)
    dense = torch.randn(batch, d_sae, dtype=torch.float64) * (torch.rand(batch, d_sae) < share)
    rows, latents = dense.nonzero(as_tuple=True)
    return dense, Support(rows, latents, batch, d_sae), dense[rows, latents]


@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
@settings(max_examples=25, deadline=None)
def test_products_equal_those_of_the_dense_matrix(seed: int, share: float) -> None:
    dense, support, values = _case(seed, share=share)
    by_latent = torch.randn(11, 4, dtype=torch.float64)
    by_row = torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(times_latents(support, values, by_latent), dense @ by_latent, rtol=0, atol=1e-12)
    torch.testing.assert_close(times_rows(support, values, by_row), dense.T @ by_row, rtol=0, atol=1e-12)
    expected = (by_row @ by_latent.T)[support.rows, support.latents]
    torch.testing.assert_close(dots(support, by_row, by_latent), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(support.per_row(values), dense.sum(1), rtol=0, atol=1e-12)


@given(seed=st.integers(0, 10_000), prefixes=st.lists(st.integers(1, 11), min_size=1, unique=True).map(sorted))
@settings(max_examples=20, deadline=None)
def test_prefixes_equal_the_dense_matrix_cut_off_with_every_gradient(seed: int, prefixes: list[int]) -> None:
    dense, support, values = _case(seed)
    W_dec = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    values.requires_grad_()
    dense = torch.zeros_like(dense).index_put((support.rows, support.latents), values)
    weights = torch.randn(len(prefixes), 9, 4, dtype=torch.float64)
    expected = [dense[:, :p] @ W_dec[:p] for p in prefixes]
    found = decode_prefixes(support, values, W_dec, prefixes)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((torch.stack(r) * weights).sum(), [values, W_dec]) for r in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def _parameters(seed: int, d_in: int = 5, d_sae: int = 13) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    shapes = [(17, d_in), (d_in, d_sae), (d_sae,), (d_sae, d_in), (d_sae,)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[4] = tensors[4].abs()
    return [t.requires_grad_() for t in tensors]


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_every_gradient_equals_that_of_the_dense_computation(seed: int) -> None:
    """A whole step written twice: over all latents with dense autograd, and over the entries above the window
    only.
    """
    bandwidth, target = 0.7, 3.0
    x, W_enc, b_enc, W_dec, threshold = _parameters(seed)
    pre_acts = x @ W_enc + b_enc
    recon = jump_relu(pre_acts, threshold, bandwidth) @ W_dec
    l0 = step(pre_acts, threshold, bandwidth).sum(1)
    dense = (recon - x.detach()).square().sum() + (l0 - target).square().sum()
    expected = torch.autograd.grad(dense, [x, W_enc, b_enc, W_dec, threshold])

    support, entries = encode_above(x, W_enc, b_enc, threshold.detach() - bandwidth / 2)
    at = threshold[support.latents]
    recon = decode_sparse(support, jump_relu(entries, at, bandwidth), W_dec)
    l0 = support.per_row(step(entries, at, bandwidth))
    loss = (recon - x.detach()).square().sum() + (l0 - target).square().sum()
    torch.testing.assert_close(loss, dense, rtol=1e-12, atol=0)
    found = torch.autograd.grad(loss, [x, W_enc, b_enc, W_dec, threshold])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("block", [1, 13, 40, 1 << 20])
def test_the_result_does_not_depend_on_the_block_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W_enc, b_enc, _, threshold = (t.detach() for t in _parameters(3))
    whole = x @ W_enc + b_enc
    monkeypatch.setattr(sparse, "_BLOCK", {"cpu": block})
    support, values = encode_above(x, W_enc, b_enc, threshold)
    rows, latents = (whole > threshold).nonzero(as_tuple=True)
    assert torch.equal(support.rows, rows)
    assert torch.equal(support.latents, latents)
    torch.testing.assert_close(values, whole[rows, latents], rtol=0, atol=1e-12)


def test_no_active_latent_at_all_is_a_valid_batch() -> None:
    x, W_enc, b_enc, W_dec, threshold = _parameters(5)
    support, values = encode_above(x, W_enc, b_enc, threshold.detach() + 1e6)
    recon = decode_sparse(support, values, W_dec)
    recon.sum().backward()
    assert len(values) == 0
    assert torch.equal(recon, torch.zeros(17, 5, dtype=torch.float64))
    assert W_enc.grad is not None
    assert not W_enc.grad.any()
