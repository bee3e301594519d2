"""Folding of scales, biases and gains: exact against the formula before it, and reversible."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.artifacts.config import AnyDictionary
from gemscope.core.errors import InputError
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.multilayer import MultiLayer
from unit.dictionaries.zoo import ACTIVATIONS, KINDS, inputs, random_dictionary

SCALES = st.floats(1e-2, 1e2)


def _assert_same(a: AnyDictionary, b: AnyDictionary, rtol: float = 1e-12) -> None:
    for name, tensor in a.named_parameters():
        torch.testing.assert_close(b.get_parameter(name), tensor, rtol=rtol, atol=1e-12)


@given(kind=st.sampled_from(KINDS), activation=st.sampled_from(ACTIVATIONS), into=SCALES, out=SCALES)
@settings(max_examples=60, deadline=None)
def test_scale_in_and_out(kind: str, activation: Activation, into: float, out: float) -> None:
    d = random_dictionary(kind, activation)
    out = into if kind == "sae" else out
    x = inputs(d, 4) * into
    folded = d.fold_scale(into, out)
    torch.testing.assert_close(folded(x) / out, d(x / into), rtol=0, atol=1e-10)
    torch.testing.assert_close(folded.encode(x) / into, d.encode(x / into), rtol=0, atol=1e-11)
    _assert_same(d, folded.fold_scale(1 / into, 1 / out))


@pytest.mark.parametrize("kind", ["crosscoder", "clt_skip"])
def test_a_scale_per_position(kind: str) -> None:
    d = random_dictionary(kind)
    assert isinstance(d, MultiLayer)
    into, out = [2.0, 3.0, 0.5], [1.0, 5.0, 0.25]
    x = inputs(d, 4)
    by_in, by_out = (torch.tensor(s, dtype=torch.float64)[:, None] for s in (into, out))
    folded = d.fold_scale(into, out)
    torch.testing.assert_close(folded(x * by_in), d(x) * by_out, rtol=0, atol=1e-11)
    _assert_same(d, folded.fold_scale([1 / s for s in into], [1 / s for s in out]))
    with pytest.raises(InputError, match="2 scales were given for 3"):
        d.fold_scale([1.0, 2.0])
    with pytest.raises(InputError, match="TopK"):
        random_dictionary(kind, Activation("topk", 3)).fold_scale(into)


@pytest.mark.parametrize("kind", ["transcoder", "clt"])
def test_powers_of_two_fold_bit_for_bit(kind: str) -> None:
    d = random_dictionary(kind, dtype=torch.float32)
    back = d.fold_scale(8.0, 0.5).fold_scale(1 / 8.0, 2.0)
    assert all(torch.equal(back.get_parameter(name), tensor) for name, tensor in d.named_parameters())


@pytest.mark.parametrize("kind", ["sae", "crosscoder"])
def test_the_pre_encoder_bias_is_b_dec(kind: str) -> None:
    d = random_dictionary(kind)
    bias = torch.stack(list(d.b_dec)) if isinstance(d, MultiLayer) else d.b_dec
    x = inputs(d, 4)
    folded = d.fold_pre_bias()
    torch.testing.assert_close(folded.encode(x), d.encode(x - bias), rtol=0, atol=1e-12)
    _assert_same(d, folded.unfold_pre_bias())


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "clt"])
def test_a_transcoders_b_dec_is_never_subtracted_from_its_input(kind: str) -> None:
    d = random_dictionary(kind, d_out=5)  # as wide as the input, so that nothing but the rule could tell
    with pytest.raises(InputError, match="belongs to"):
        d.fold_pre_bias()
    x = inputs(d, 4)
    bias = inputs(d, 1, seed=9)[0]
    folded = d.fold_pre_bias(list(bias) if isinstance(d, MultiLayer) else bias)
    torch.testing.assert_close(folded.encode(x), d.encode(x - bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gain_of_the_norm_that_is_read(kind: str) -> None:
    d = random_dictionary(kind)
    x = inputs(d, 4)
    gain = inputs(d, 1, seed=7)[0].abs() + 0.5
    given_gain = list(gain) if isinstance(d, MultiLayer) else gain
    folded = d.fold_input_gain(given_gain)
    torch.testing.assert_close(folded(x * gain), d(x), rtol=0, atol=1e-11)
    inverse = list(1 / gain) if isinstance(d, MultiLayer) else 1 / gain
    _assert_same(d, folded.fold_input_gain(inverse))
    with pytest.raises(InputError, match="zero"):
        d.fold_input_gain([g * 0 for g in given_gain] if isinstance(d, MultiLayer) else gain * 0)


def test_an_sae_has_one_scale() -> None:
    with pytest.raises(InputError, match="cannot differ"):
        random_dictionary("sae").fold_scale(2.0, 3.0)
