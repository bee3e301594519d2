"""The SAE against plain formulas in float64; folding is exact and reversible."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.core.errors import InputError
from gemscope.dictionaries.logit_effects import logit_effects
from gemscope.dictionaries.sae import SAE


def random_sae(seed: int, d_in: int = 6, d_sae: int = 15, dtype: torch.dtype = torch.float64) -> SAE:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return SAE(normal(d_in, d_sae), normal(d_sae), normal(d_sae, d_in), normal(d_in), normal(d_sae).abs())


def _oracle(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scalar loops, no matrix product: codes and reconstruction."""
    acts = torch.zeros(len(x), sae.d_sae, dtype=torch.float64)
    recon = torch.zeros_like(x)
    for b in range(len(x)):
        for i in range(sae.d_sae):
            pre = sae.b_enc[i].item() + sum(x[b, k].item() * sae.W_enc[k, i].item() for k in range(sae.d_in))
            acts[b, i] = pre if pre > sae.threshold[i].item() else 0.0
        for k in range(sae.d_in):
            recon[b, k] = sae.b_dec[k].item() + sum(
                acts[b, i].item() * sae.W_dec[i, k].item() for i in range(sae.d_sae)
            )
    return acts, recon


@pytest.mark.parametrize("seed", range(3))
def test_forward_equals_scalar_loops_in_float64(seed: int) -> None:
    sae, x = random_sae(seed), torch.randn(4, 6, dtype=torch.float64)
    acts, recon = _oracle(sae, x)
    torch.testing.assert_close(sae.encode(x), acts, rtol=0, atol=1e-12)
    torch.testing.assert_close(sae(x), recon, rtol=0, atol=1e-12)
    torch.testing.assert_close(sae.decode(acts), recon, rtol=0, atol=1e-12)
    assert 0 < (acts > 0).sum() < acts.numel()


def test_leading_axes_are_kept_and_sparse_codes_are_the_dense_ones() -> None:
    sae, x = random_sae(0), torch.randn(2, 3, 6, dtype=torch.float64)
    assert sae(x).shape == x.shape
    rows = x.reshape(6, 6)
    support, values = sae.encode_sparse(rows)
    dense = torch.zeros(6, 15, dtype=torch.float64)
    dense[support.rows, support.latents] = values
    torch.testing.assert_close(dense, sae.encode(rows), rtol=0, atol=1e-12)
    torch.testing.assert_close(dense.reshape(2, 3, 15), sae.encode(x), rtol=0, atol=1e-12)


def test_half_precision_activations_are_computed_in_the_dtype_of_the_weights() -> None:
    sae, x = random_sae(0, dtype=torch.float32), torch.randn(3, 6).bfloat16()
    assert sae(x).dtype == torch.float32
    assert torch.equal(sae(x), sae(x.float()))


def test_weights_ask_for_no_gradient_and_gradients_to_x_pass_through_active_latents() -> None:
    sae, x = random_sae(1), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(sae(x).sum(), x)
    expected = ((sae.encode(x) > 0) * sae.W_dec.sum(1)) @ sae.W_enc.T
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)
    assert not any(p.requires_grad for p in sae.parameters())


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_folding_is_exact_and_reversible(seed: int, scale: float) -> None:
    """``trained`` sees x / scale and subtracts b_dec before its encoder; the folded one sees x and does
    neither.
    """
    trained = random_sae(seed)
    x = scale * torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    acts = (x / scale - trained.b_dec) @ trained.W_enc + trained.b_enc
    acts = torch.where(acts > trained.threshold, acts, 0.0)
    recon = acts @ trained.W_dec + trained.b_dec

    folded = trained.fold_pre_bias().fold_scale(scale)
    torch.testing.assert_close(folded.encode(x) / scale, acts, rtol=0, atol=1e-11)
    torch.testing.assert_close(folded(x) / scale, recon, rtol=0, atol=1e-11)
    # Gemma Scope, appendix B: b_enc' = C b_enc - C W_enc b_dec
    by_paper = scale * trained.b_enc - scale * (trained.b_dec @ trained.W_enc)
    torch.testing.assert_close(folded.b_enc / scale, by_paper / scale, rtol=0, atol=1e-12)
    back = folded.fold_scale(1 / scale).unfold_pre_bias()
    for name, tensor in trained.named_parameters():
        torch.testing.assert_close(back.get_parameter(name), tensor, rtol=1e-12, atol=1e-12)


def test_folding_returns_a_new_dictionary() -> None:
    sae = random_sae(0)
    before = {name: tensor.clone() for name, tensor in sae.named_parameters()}
    for other in (sae.fold_scale(2.0), sae.fold_pre_bias(), sae.unfold_pre_bias()):
        for tensor in other.parameters():
            tensor.data.zero_()
    assert all(torch.equal(sae.get_parameter(name), tensor) for name, tensor in before.items())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_folding_refuses_a_scale_that_is_not_positive(scale: float) -> None:
    with pytest.raises(InputError, match="scale"):
        random_sae(0).fold_scale(scale)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    good = {name: tensor.detach() for name, tensor in random_sae(0).named_parameters()}
    with pytest.raises(InputError, match=r"threshold has shape \(14,\).*\(15,\)"):
        SAE(**(good | {"threshold": good["threshold"][:-1]}))
    with pytest.raises(InputError, match=r"W_dec is torch\.float32"):
        SAE(**(good | {"W_dec": good["W_dec"].float()}))


def test_logit_effects_rank_tokens_as_the_final_norm_and_unembedding_do() -> None:
    """The change of the logits along a direction, from a residual stream that is large against it."""
    torch.manual_seed(0)
    gain, unembedding = torch.rand(6, dtype=torch.float64) + 0.5, torch.randn(20, 6, dtype=torch.float64)
    direction = torch.randn(1, 6, dtype=torch.float64)
    effects = logit_effects(direction, gain, unembedding)
    for token in range(20):
        by_hand = sum((direction[0, k] * gain[k] * unembedding[token, k]).item() for k in range(6))
        assert effects[0, token].item() == pytest.approx(by_hand, abs=1e-12)
    normed = direction[0] / direction[0].square().mean().sqrt()
    logits = (normed * gain) @ unembedding.T
    assert torch.equal(logits.argsort(), effects[0].argsort())
