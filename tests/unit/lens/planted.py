"""A Gemma 3 whose weights were set by hand: head 0.1 reads the token before, head 1.2 is an induction head.

The stream holds a constant, a random code for the token, and a free place into which head 0.1 copies the code of the
token before. Head 0.1 asks with the same vector everywhere; its keys are that vector turned on by one position, so that
under the rotary embedding the scores are largest at distance one. Head 1.2 asks with the token's code for keys whose
copied code is the same, in the slowest rotary components only, which hardly turn over a short text. All other heads
have small random weights; the MLPs write nothing.
"""

import torch
from transformers import Gemma3ForCausalLM

from gemscope.models.gemma import Gemma
from unit.models.tiny_gemma import config, tokenizer

PREVIOUS, INDUCTION = (0, 1), (1, 2)
CODE, HEAD = 32, 64
WIDTH = 8 + 2 * CODE
_FAST = 8
"""Rotary components that tell distances apart in head 0.1."""


def planted(dtype: torch.dtype = torch.float32) -> Gemma:
    """The model, with the tiny tokenizer."""
    made = config(
        "gemma3",
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD,
        sliding_window=16,
        query_pre_attn_scalar=HEAD,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.zero_()
            elif parameter.ndim == 2:
                parameter.normal_(0.0, 0.01)
        codes = torch.randn(made.vocab_size, CODE)
        rows = torch.zeros(made.vocab_size, WIDTH)
        rows[:, 0] = 1.0
        rows[:, 8 : 8 + CODE] = codes / codes.norm(dim=1, keepdim=True)
        model.model.embed_tokens.weight.copy_(rows)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
        _previous(model.model.layers[0])
        _induction(model.model.layers[1])
    return Gemma.wrap(model.to(dtype).eval().requires_grad_(False), tokenizer(), name="planted")


def _rows(head: int) -> slice:
    return slice(head * HEAD, (head + 1) * HEAD)


def _sharpen(attention: torch.nn.Module, by: float) -> None:
    """Scores ``by`` times larger."""
    attention.get_submodule("q_norm").get_parameter("weight").fill_(by - 1)


def _previous(layer: torch.nn.Module) -> None:
    attention, head, kv = layer.get_submodule("self_attn"), PREVIOUS[1], PREVIOUS[1] // 2
    q, k, v, o = (attention.get_submodule(f"{name}_proj").get_parameter("weight") for name in "qkvo")
    for weight, at in ((q, head), (k, kv), (v, kv)):
        weight[_rows(at)] = 0
    half = HEAD // 2
    speed = 10_000.0 ** (-torch.arange(_FAST) * 2 / HEAD)
    # the query is (1, 0) in every pair; the key the same, turned by one position more
    q[head * HEAD : head * HEAD + _FAST, 0] = 1.0
    k[kv * HEAD : kv * HEAD + _FAST, 0] = speed.cos()
    k[kv * HEAD + half : kv * HEAD + half + _FAST, 0] = speed.sin()
    v[kv * HEAD : kv * HEAD + CODE, 8 : 8 + CODE] = torch.eye(CODE)
    o[8 + CODE : 8 + 2 * CODE, head * HEAD : head * HEAD + CODE] = torch.eye(CODE)
    _sharpen(attention, 4.0)


def _induction(layer: torch.nn.Module) -> None:
    attention, head, kv = layer.get_submodule("self_attn"), INDUCTION[1], INDUCTION[1] // 2
    q, k = (attention.get_submodule(f"{name}_proj").get_parameter("weight") for name in "qk")
    q[_rows(head)] = 0
    k[_rows(kv)] = 0
    half, slow = HEAD // 2, HEAD // 4
    places = [*range(slow, half), *range(half + slow, HEAD)]
    for i, place in enumerate(places):
        q[head * HEAD + place, 8 + i] = 1.0
        k[kv * HEAD + place, 8 + CODE + i] = 1.0
    _sharpen(attention, 8.0)
