"""Attention weights: explicit softmax at the layers somebody watches, the fused kernel everywhere else.

Notable: the attention function and its mask are registered with transformers under one name (without the mask
there would be no causal mask, no window and no padding, and no error). The model is switched to that name
only for a pass that watches patterns, so a plain pass runs the model's own path, fused attention included.
Gemma 2 caps its scores and has no fused kernel: its unwatched layers run the explicit softmax as well.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gemscope.core.arrays import Bool, Float, Tensor

NAME = "gemscope"

PatternTransform = Callable[[Float[Tensor, "batch head query key"]], Float[Tensor, "batch head query key"]]

_WATCHED: ContextVar[Mapping[int, PatternTransform]] = ContextVar("gemscope_watched_patterns")


@contextmanager
def watching(config: Any, layers: Mapping[int, PatternTransform]) -> Generator[None]:
    """While active, each of ``layers`` passes its pattern through its function; ``config`` is the
    decoder's."""
    before, token = config._attn_implementation, _WATCHED.set(layers)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _WATCHED.reset(token)


def attention_pattern(
    query: Float[Tensor, "batch head query head_dim"],
    key: Float[Tensor, "batch kv_head key head_dim"],
    mask: Bool[Tensor, "#batch #head query key"] | None,
    scaling: float,
    softcap: float | None,
) -> Float[Tensor, "batch head query key"]:
    """softmax(cap(q k^T * scaling)), in float32 or better, as transformers' eager attention computes it.

    Without ``mask`` the attention is causal.
    """
    scores = query @ _repeat(key, query).transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        n_query, n_key = scores.shape[-2:]
        mask = torch.ones(n_query, n_key, dtype=torch.bool, device=scores.device).tril(n_key - n_query)[None, None]
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    compute = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=compute).to(query.dtype)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: the output is [batch, query, head, head_dim]."""
    transform = _WATCHED.get().get(int(module.layer_idx))  # pyright: ignore[reportArgumentType]
    if transform is None and softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    pattern = attention_pattern(query, key, attention_mask, scaling, softcap)
    if transform is not None:
        pattern = transform(pattern)
    out = pattern @ _repeat(value, query)
    return out.transpose(1, 2).contiguous(), pattern


def _repeat(shared: Tensor, query: Tensor) -> Tensor:
    """Key/value heads repeated so that there is one for each query head."""
    return shared.repeat_interleave(query.shape[1] // shared.shape[1], dim=1)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
