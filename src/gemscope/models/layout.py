"""Where things are in a Gemma: the decoder inside any of the three classes, and its sizes.

Notable: the decoder is recognised by its structure, not by its class name, so that the text models (270M,
1B), the multimodal wrapper (4B, 12B, 27B) and Gemma 2 are one case from here on.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import SiteError, UnsupportedModelError
from gemscope.core.sites import Site

Kind = Literal["local", "global"]

_TRUNK = ("embed_tokens", "layers", "norm", "rotary_emb")
_BLOCK = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "mlp.down_proj",
    "post_feedforward_layernorm",
)


@dataclass(frozen=True)
class LayerAttention:
    """How one layer attends."""

    layer: int
    kind: Kind
    """``local`` layers see a sliding window, ``global`` layers everything before."""
    window: int | None
    """Number of keys a query sees at most, itself included; None for a global layer."""
    kv_group: tuple[int, ...]
    """For each query head, the key/value head it reads (grouped-query attention)."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    vocab_size: int
    """Rows of the embedding; a multimodal Gemma has 64 more than its tokenizer has text pieces."""
    context: int
    """Most positions the model can read."""
    sliding_window: int | None
    layer_kinds: tuple[Kind, ...]

    @property
    def d_q(self) -> int:
        """Width of ``q``: all query heads. Not d_model."""
        return self.n_heads * self.head_dim

    @property
    def d_z(self) -> int:
        """Width of ``z``, the concatenated heads. Not d_model."""
        return self.n_heads * self.head_dim

    @property
    def d_kv(self) -> int:
        """Width of ``k`` and of ``v``: all key/value heads."""
        return self.n_kv_heads * self.head_dim

    def attention(self, layer: int) -> LayerAttention:
        """How ``layer`` attends; raises SiteError when there is no such layer."""
        if not 0 <= layer < self.n_layers:
            raise SiteError(f"there is no layer {layer}; this model has layers 0 to {self.n_layers - 1}.")
        kind = self.layer_kinds[layer]
        group = self.n_heads // self.n_kv_heads
        return LayerAttention(
            layer=layer,
            kind=kind,
            window=self.sliding_window if kind == "local" else None,
            kv_group=tuple(head // group for head in range(self.n_heads)),
        )

    def check(self, site: str | Site) -> Site:
        """The parsed site; raises SiteError when it or its layer does not exist, naming the layers that
        do."""
        site = Site.parse(site)
        if site.layer is not None and site.layer >= self.n_layers:
            raise SiteError(f"there is no layer {site.layer}; this model has layers 0 to {self.n_layers - 1}.")
        return site

    def width(self, site: Site) -> int:
        """Size of the last axis at ``site``; raises SiteError for ``pattern``, which is [head, query,
        key]."""
        if site.kind.width == "pattern":
            raise SiteError(f"site '{site}' has no width: a pattern is [head, query, key].")
        return int(getattr(self, site.kind.width))


@dataclass(frozen=True, eq=False)
class Decoder:
    """The text decoder of a loaded model: its modules, found once."""

    trunk: nn.Module
    """The module with ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``."""
    head: nn.Module
    """``lm_head``, tied to the embedding."""
    shape: ModelShape
    config: Any
    """transformers' text config, the very object the attention modules read."""
    softcap: float | None
    """Gemma 2's cap on the logits; None for Gemma 3."""

    def layer(self, index: int) -> nn.Module:
        """Block ``index``."""
        return self.trunk.get_submodule(f"layers.{index}")

    @property
    def final(self) -> nn.Module:
        """The norm after the last block."""
        return self.trunk.get_submodule("norm")

    def unembed(self, normed: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of values that are already normalised, with Gemma 2's cap.

        The rows are packed into a fresh matrix first: on a CPU in bf16 a strided slice is 50 to 350 times
        slower.
        """
        rows = normed.reshape(-1, normed.shape[-1])
        if rows.device.type == "cpu" and rows.dtype == torch.bfloat16:
            rows = rows.clone()
        logits: Tensor = self.head(rows)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.reshape(*normed.shape[:-1], logits.shape[-1])


def find_decoder(model: PreTrainedModel, name: str) -> Decoder:
    """The decoder inside ``model``; raises UnsupportedModelError when its structure is not Gemma 2's or
    3's."""
    get_decoder = getattr(model, "get_decoder", None)
    trunk = get_decoder() if callable(get_decoder) else None
    head = model.get_output_embeddings()
    if not isinstance(trunk, nn.Module) or not isinstance(head, nn.Module) or not _is_gemma(trunk):
        raise UnsupportedModelError(
            f"{name!r} is a {type(model).__name__}, not a Gemma 2 or Gemma 3; load for example 'google/gemma-3-270m'."
        )
    config = cast(Any, trunk).config
    kinds: tuple[Kind, ...] = tuple("local" if kind == "sliding_attention" else "global" for kind in config.layer_types)
    shape = ModelShape(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        d_mlp=config.intermediate_size,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        sliding_window=config.sliding_window,
        layer_kinds=kinds,
    )
    return Decoder(trunk, head, shape, config, config.final_logit_softcapping)


def _is_gemma(trunk: nn.Module) -> bool:
    names = {name for name, _ in trunk.named_modules()}
    has_block = all(f"layers.0.{part}" in names for part in _BLOCK)
    return has_block and all(part in names for part in _TRUNK)
