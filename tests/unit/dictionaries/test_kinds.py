"""All five kinds with all four activations against number-by-number formulas in float64, and what they share."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gemscope.artifacts.config import AnyDictionary
from gemscope.core.errors import InputError
from gemscope.dictionaries import base, sparse
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.multilayer import Crosscoder, CrossLayerTranscoder, MultiLayer
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.single import SingleLayer
from unit.dictionaries.zoo import ACTIVATIONS, KINDS, by_formula, inputs, random_dictionary

EVERY = list(itertools.product(KINDS, ACTIVATIONS))
IDS = [f"{kind}-{activation.kind}" for kind, activation in EVERY]


def _positions(dictionary: AnyDictionary, x: torch.Tensor) -> torch.Tensor:
    return x if isinstance(dictionary, MultiLayer) else x[:, None]


def _dense(support: sparse.Support, values: torch.Tensor) -> torch.Tensor:
    dense = values.new_zeros(support.batch, support.d_sae)
    dense[support.rows, support.latents] = values
    return dense


@pytest.mark.parametrize(("kind", "activation"), EVERY, ids=IDS)
def test_codes_and_reconstruction_equal_the_formula(kind: str, activation: Activation) -> None:
    d = random_dictionary(kind, activation)
    x = inputs(d, 4)
    acts, recon = by_formula(d, _positions(d, x))
    assert 0 < (acts > 0).sum() < acts.numel()
    torch.testing.assert_close(_positions(d, d.encode(x)), acts, rtol=0, atol=1e-12)
    torch.testing.assert_close(_positions(d, d(x)), recon, rtol=0, atol=1e-12)
    support, values = d.encode_sparse(x)
    torch.testing.assert_close(_dense(support, values).view(acts.shape), acts, rtol=0, atol=1e-12)
    skip = recon - by_formula(d, torch.zeros_like(_positions(d, x)))[1] if "skip" in kind else None
    decoded = d.decode(d.encode(x))
    torch.testing.assert_close(d.decode_sparse(support, values), decoded, rtol=0, atol=1e-12)
    if skip is None:
        torch.testing.assert_close(decoded, d(x), rtol=0, atol=1e-12)
    else:
        assert not torch.allclose(decoded, d(x))


@pytest.mark.parametrize(("kind", "activation"), EVERY, ids=IDS)
def test_the_gradient_to_x_is_that_of_the_dense_computation(kind: str, activation: Activation) -> None:
    d = random_dictionary(kind, activation, seed=3)
    x = inputs(d, 4, seed=5).requires_grad_()
    weight = torch.randn_like(d(x))
    (found,) = torch.autograd.grad((d(x) * weight).sum(), x)
    dense = d.decode(d.encode(x))
    if isinstance(d, MultiLayer) and d.W_skip is not None:
        dense = dense + torch.stack([x[:, m] @ W for m, W in enumerate(d.W_skip)], dim=1)
    elif isinstance(d, SingleLayer) and d.W_skip is not None:
        dense = dense + x @ d.W_skip
    (expected,) = torch.autograd.grad((dense * weight).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert not any(p.requires_grad for p in d.parameters())


@given(
    kind=st.sampled_from(KINDS),
    activation=st.sampled_from(ACTIVATIONS),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 20), st.integers(1, 4)),
    batch=st.lists(st.integers(0, 3), min_size=1, max_size=2),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_keeps_its_leading_axes(
    kind: str, activation: Activation, sizes: tuple[int, int, int, int], batch: list[int]
) -> None:
    d_in, d_out, d_sae, n = sizes
    d = random_dictionary(kind, activation, d_in=d_in, d_out=d_out, d_sae=d_sae, n=n)
    x = inputs(d, *batch)
    recon, acts = d(x), d.encode(x)
    assert recon.shape == (*x.shape[:-1], d.d_out)
    assert acts.shape == (*x.shape[:-1], d_sae)
    assert torch.equal(d.error(x, recon), torch.zeros_like(recon))
    latents = list(range(0, d.n_latents, 2))
    flat = acts.reshape(*batch, d.n_latents)
    torch.testing.assert_close(d.encode(x, latents), flat[..., latents], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_storage_computes_in_fp32_what_the_rounded_weights_say(kind: str) -> None:
    for activation in ACTIVATIONS:
        half = random_dictionary(kind, activation, dtype=torch.bfloat16)
        whole = random_dictionary(kind, activation, dtype=torch.bfloat16).float()
        x = inputs(half, 6)
        assert half(x).dtype == half.encode(x).dtype == torch.float32
        torch.testing.assert_close(half(x), whole(x), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(half.encode(x), whole.encode(x), rtol=1e-5, atol=1e-5)
        assert half.dtype == torch.bfloat16
        x.requires_grad_()
        (grad,) = torch.autograd.grad(half(x).sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(whole(x).sum(), x)[0], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("kind", "activation"), EVERY, ids=IDS)
@pytest.mark.parametrize("blocks", [(1, 1), (5, 7), (13, 3), (4, 40)])
def test_the_codes_do_not_depend_on_slices_and_blocks(
    kind: str, activation: Activation, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    d = random_dictionary(kind, activation, seed=2)
    x = inputs(d, 5)
    whole, values = d.encode_sparse(x)
    monkeypatch.setattr(base, "SLICE", blocks[0])
    monkeypatch.setattr(sparse, "_BLOCK", {"cpu": blocks[1]})
    cut, again = d.encode_sparse(x)
    assert torch.equal(whole.rows, cut.rows)
    assert torch.equal(whole.latents, cut.latents)
    torch.testing.assert_close(values, again, rtol=0, atol=1e-12)


def _tied(k: int, values: list[float]) -> tuple[SAE, torch.Tensor]:
    """An SAE whose pre-activations are ``values`` for the input 1."""
    W_enc = torch.tensor([values], dtype=torch.float64)
    zero, W_dec = torch.zeros(len(values), dtype=torch.float64), torch.ones(len(values), 1, dtype=torch.float64)
    d = SAE(W_enc, zero, W_dec, torch.zeros(1, dtype=torch.float64), activation=Activation("topk", k))
    return d, torch.ones(1, 1, dtype=torch.float64)


@given(
    k=st.integers(1, 8),
    values=st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=9),
    width=st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_topk_gives_ties_to_the_lower_index_dense_sparse_and_in_slices(k: int, values: list[float], width: int) -> None:
    d, x = _tied(k, values)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    expected = [max(v, 0.0) if i in order else 0.0 for i, v in enumerate(values)]
    assert d.encode(x)[0].tolist() == expected
    before, base.SLICE = base.SLICE, width
    try:
        support, found = d.encode_sparse(x)
    finally:
        base.SLICE = before
    assert _dense(support, found)[0].tolist() == expected
    assert d.encode(x, list(range(len(values))))[0].tolist() == expected
    assert support.latents.tolist() == sorted(support.latents.tolist())


def test_topk_of_a_multi_layer_kind_is_over_all_positions() -> None:
    d = random_dictionary("clt", Activation("topk", 4))
    assert ((d.encode(inputs(d, 20)) > 0).sum((1, 2)) == 4).all()
    assert len({tuple(row) for row in (d.encode(inputs(d, 20)) > 0).sum(2).tolist()}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_the_dictionary_of_the_first_latents(kind: str) -> None:
    for activation in ACTIVATIONS[:3]:
        d = random_dictionary(kind, activation, prefixes=(2, 5, 9))
        x, part = inputs(d, 4), d.prefix(5)
        assert type(part) is type(d)
        assert (part.d_sae, part.prefixes) == (5, (2,))
        torch.testing.assert_close(part.encode(x), d.encode(x)[..., :5], rtol=0, atol=1e-12)
        acts = d.encode(x).clone()
        acts[..., 5:] = 0
        torch.testing.assert_close(part.decode(part.encode(x)), d.decode(acts), rtol=0, atol=1e-12)
    top = random_dictionary(kind, Activation("topk", 4)).prefix(1)
    assert top.activation.top == (3 if isinstance(top, MultiLayer) else 1)
    for n in (0, 14):
        with pytest.raises(InputError, match="has 13"):
            random_dictionary(kind).prefix(n)


def test_rows_and_columns_by_index() -> None:
    d = random_dictionary("transcoder")
    assert isinstance(d, SingleLayer)
    assert torch.equal(d.decoder_rows([7, 0, 7]), d.W_dec[[7, 0, 7]])
    assert torch.equal(d.encoder_columns(torch.tensor([3, 1])), d.W_enc[:, [3, 1]].T)
    with pytest.raises(InputError, match=r"no latent 13.*0 to 12"):
        d.decoder_rows([13])
    with pytest.raises(InputError, match="no latent -1"):
        d.encoder_columns([-1])
    c = random_dictionary("clt")
    assert isinstance(c, CrossLayerTranscoder)
    assert torch.equal(c.decoder_rows(1, [4, 2], 2), c.W_dec[1][1][[4, 2]])
    assert torch.equal(c.encoder_columns(2, [4, 2]), c.W_enc[2][:, [4, 2]].T)
    with pytest.raises(InputError, match="position 1 write to positions 1 and later, not to 0"):
        c.decoder_rows(1, [0], 0)
    with pytest.raises(InputError, match="no position 3"):
        c.encoder_columns(3, [0])


def test_what_a_later_layer_finds_reaches_no_earlier_one() -> None:
    d = random_dictionary("crosscoder")
    x = inputs(d, 3)
    changed = x.clone()
    changed[:, 1] += 1
    assert torch.equal(d(changed)[:, 0], d(x)[:, 0])
    assert not torch.allclose(d(changed)[:, 1], d(x)[:, 1])
    assert not torch.allclose(d(changed)[:, 2], d(x)[:, 2])
    assert isinstance(d, Crosscoder)
    assert [len(W) for W in d.W_dec] == [3, 2, 1]


def test_wide_codes_are_never_dense() -> None:
    """A million latents, 200 rows: dense codes would take 800 MB in fp32, the limit here is far below."""
    F = 1 << 20
    W = torch.zeros(1, F).index_fill_(1, torch.tensor([3, F - 1]), 1.0)
    d = SAE(W, torch.zeros(F), torch.ones(F, 1), torch.zeros(1), torch.full((F,), 0.5))
    with _Sizes() as sizes:
        recon = d(torch.ones(200, 1))
    assert torch.equal(recon, torch.full((200, 1), 2.0))
    assert F <= sizes.largest <= F + 1


class _Sizes(TorchDispatchMode):
    """The largest result of any operation."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple) else (found,):
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        return found


@pytest.mark.parametrize(
    ("kind", "k", "message"),
    [("jumprelu", 3, "has no k"), ("topk", None, "needs a k"), ("topk", 2.5, "whole"), ("batchtopk", 0, "above 0")],
)
def test_an_activation_that_cannot_be_is_refused(kind: str, k: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Activation(kind, k)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    c = random_dictionary("clt")
    assert isinstance(c, CrossLayerTranscoder)
    good = [list(c.W_enc), list(c.b_enc), list(c.W_dec), list(c.b_dec)]
    assert c.threshold is not None
    with pytest.raises(InputError, match=r"b_enc has 2 tensors, but W_enc 3"):
        CrossLayerTranscoder(good[0], good[1][:2], good[2], good[3], list(c.threshold))
    with pytest.raises(InputError, match=r"W_dec\[1\] has shape \(3, 13, 6\).*\(2, 13, 6\)"):
        CrossLayerTranscoder(good[0], good[1], [good[2][0]] * 3, good[3], list(c.threshold))
    with pytest.raises(InputError, match="needs a threshold"):
        CrossLayerTranscoder(*good)
    with pytest.raises(InputError, match="has no threshold"):
        CrossLayerTranscoder(*good, list(c.threshold), activation=Activation("relu"))
    with pytest.raises(InputError, match=r"\(2, 4, 5\).*\(3, 5\): position, width"):
        c(torch.zeros(2, 4, 5, dtype=torch.float64))
