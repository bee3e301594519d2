"""What attention heads write into the residual stream, exactly: through W_O and the norm behind it."""

import torch
from torch import nn

from gemscope.core.arrays import Float, Tensor
from gemscope.models.freeze import rms_factor
from gemscope.models.gemma import Gemma


def head_values(gemma: Gemma, v: Float[Tensor, "pos d_kv"]) -> Float[Tensor, "pos head head_dim"]:
    """The value that each query head reads at each position: key/value heads repeated for their group."""
    shape = gemma.shape
    values = v.unflatten(-1, (shape.n_kv_heads, shape.head_dim))
    return values.repeat_interleave(shape.n_heads // shape.n_kv_heads, dim=1)


def output_weights(gemma: Gemma, layer: int) -> Float[Tensor, "head head_dim d_model"]:
    """W_O, head by head: a head adds ``z_h @ W_O[h]`` to ``attn_out_raw``."""
    weight = gemma.decoder.layer(layer).get_submodule("self_attn.o_proj").get_parameter("weight").detach()
    return weight.T.unflatten(0, (gemma.shape.n_heads, gemma.shape.head_dim))


def post_norm(
    gemma: Gemma, layer: int, attn_out_raw: Float[Tensor, "pos d_model"]
) -> tuple[Float[Tensor, "pos 1"], Float[Tensor, " d_model"]]:
    """Factor and gain of the norm behind W_O: attn_out = attn_out_raw * factor * gain."""
    norm = gemma.decoder.layer(layer).get_submodule("post_attention_layernorm")
    return rms_factor(attn_out_raw, norm), gain_of(norm)


def gain_of(norm: nn.Module) -> Float[Tensor, " d_model"]:
    """1 + weight, in float32 or better."""
    weight = norm.get_parameter("weight").detach()
    return 1.0 + weight.to(torch.promote_types(weight.dtype, torch.float32))


def value_norms(gemma: Gemma, layer: int, v: Float[Tensor, "pos d_kv"]) -> Float[Tensor, "head pos"]:
    """Norm of what each head would write if it read one position with weight 1, before the norm's factor."""
    gain = gain_of(gemma.decoder.layer(layer).get_submodule("post_attention_layernorm"))
    values, weights = head_values(gemma, v).to(gain.dtype), output_weights(gemma, layer)
    norms = [((values[:, h] @ weights[h].to(gain.dtype)) * gain).norm(dim=-1) for h in range(gemma.shape.n_heads)]
    return torch.stack(norms)
