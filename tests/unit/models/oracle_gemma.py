"""The whole decoder written out by hand from its weights, one named value after the other: the truth for the
sites."""

import torch
from torch import Tensor
from torch.nn import functional

from gemscope.models.gemma import Gemma


def norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * (1.0 + weight.float())).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def visible(n: int, window: int | None) -> Tensor:
    """[query, key]: a query sees itself and what came before, at most ``window`` keys in all."""
    query, key = torch.arange(n)[:, None], torch.arange(n)[None]
    seen = key <= query
    return seen if window is None else seen & (query - key < window)


def pattern_of(q: Tensor, k: Tensor, scaling: float, softcap: float | None, seen: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    bias = torch.where(seen, torch.zeros(()), torch.finfo(q.dtype).min)
    return torch.softmax(scores + bias, dim=-1, dtype=torch.float32).to(q.dtype)


def fused(q: Tensor, k: Tensor, v: Tensor, scaling: float, seen: Tensor, window: int | None, group: int) -> Tensor:
    n = q.shape[2]
    if window is None or n < window:
        return functional.scaled_dot_product_attention(q, k, v, scale=scaling, is_causal=True, enable_gqa=True)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return functional.scaled_dot_product_attention(q, k, v, scale=scaling, attn_mask=seen[None, None])


@torch.no_grad()
def decode(gemma: Gemma, ids: Tensor, watched: frozenset[int]) -> dict[str, Tensor]:
    """Every site's value for [batch, pos] ids without padding; ``watched`` layers use the explicit
    softmax."""
    trunk, config, shape = gemma.decoder.trunk, gemma.decoder.config, gemma.shape
    weights = dict(trunk.named_parameters())
    values: dict[str, Tensor] = {}
    scale = torch.tensor(shape.d_model**0.5).to(gemma.dtype)
    x = values["embed"] = weights["embed_tokens.weight"][ids] * scale
    positions = torch.arange(ids.shape[1])[None]
    group, scaling = shape.n_heads // shape.n_kv_heads, config.query_pre_attn_scalar**-0.5
    softcap = config.attn_logit_softcapping
    for i in range(shape.n_layers):

        def weight(name: str, i: int = i) -> Tensor:
            return weights[f"layers.{i}.{name}.weight"]

        def put(site: str, value: Tensor, i: int = i) -> Tensor:
            values[f"{site}.{i}"] = value
            return value

        put("resid_pre", x)
        h = put("attn_in", norm(x, weight("input_layernorm")))
        q, k, v = (put(s, functional.linear(h, weight(f"self_attn.{s}_proj"))) for s in "qkv")
        q, k, v = (t.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2) for t in (q, k, v))
        kind = config.layer_types[i]
        if config.model_type == "gemma2":
            cos, sin = trunk.rotary_emb(x, positions)
        else:
            q, k = norm(q, weight("self_attn.q_norm")), norm(k, weight("self_attn.k_norm"))
            cos, sin = trunk.rotary_emb(x, positions, kind)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        window = config.sliding_window if kind == "sliding_attention" else None
        seen = visible(ids.shape[1], window)
        put("pattern", pattern_of(q, k.repeat_interleave(group, 1), scaling, softcap, seen))
        if i in watched or softcap is not None:
            z = torch.matmul(values[f"pattern.{i}"], v.repeat_interleave(group, 1))
        else:
            z = fused(q, k, v, scaling, seen, window, group)
        z = put("z", z.transpose(1, 2).flatten(2))
        a = put("attn_out_raw", functional.linear(z, weight("self_attn.o_proj")))
        a = put("attn_out", norm(a, weight("post_attention_layernorm")))
        x = put("resid_mid", x + a)
        m = put("mlp_in", norm(x, weight("pre_feedforward_layernorm")))
        gate = functional.gelu(functional.linear(m, weight("mlp.gate_proj")), approximate="tanh")
        m = put("mlp_act", gate * functional.linear(m, weight("mlp.up_proj")))
        m = put("mlp_out_raw", functional.linear(m, weight("mlp.down_proj")))
        m = put("mlp_out", norm(m, weight("post_feedforward_layernorm")))
        x = put("resid_post", x + m)
    values["final_in"] = x
    values["final_norm"] = norm(x, weights["norm.weight"])
    logits = functional.linear(values["final_norm"], weights["embed_tokens.weight"])
    cap = config.final_logit_softcapping
    values["logits"] = logits if cap is None else torch.tanh(logits / cap) * cap
    return values
