"""Freezing what makes a Gemma nonlinear between its MLPs: attention patterns and the denominators of the
norms.

With both frozen and every MLP's output cut off as a leaf, each logit (before Gemma 2's cap) is a linear
function of the embeddings and the MLP outputs, so that the sum of activation times gradient equals the logit
exactly: the basis of attribution graphs (Ameisen et al. 2025, "Circuit Tracing", section on local replacement
models).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.models.capture import Capture
from gemscope.models.layout import Decoder
from gemscope.models.positions import Moment

_BLOCK_NORMS = {
    "input_layernorm": "resid_pre",
    "post_attention_layernorm": "attn_out_raw",
    "pre_feedforward_layernorm": "resid_mid",
    "post_feedforward_layernorm": "mlp_out_raw",
}
_QK_NORMS = {"self_attn.q_norm": "q", "self_attn.k_norm": "k"}


@dataclass(frozen=True, eq=False)
class FreezePatterns:
    """Use the attention patterns of another run as constants, at every layer whose pattern it captured."""

    reference: Capture
    """A capture of patterns over a batch of the same shape. New tokens of a generation keep their own
    patterns."""


@dataclass(frozen=True, eq=False)
class FreezeNorms:
    """Treat the factor 1 / RMS of every norm as a constant, so that norms are linear.

    The frozen norms compute in the model's dtype but at least float32, where transformers always uses
    float32.
    """

    reference: Capture | None = None
    """The run whose factors are used; it needs ``FreezeNorms.sites(...)``. None: this run's own, as
    constants. New tokens of a generation use their own."""
    qk: bool = False
    """Whether Gemma 3's query and key norms are frozen too; with frozen patterns they play no part."""

    @staticmethod
    def sites(n_layers: int, *, qk: bool = False) -> list[Site]:
        """The sites a reference needs: the inputs of all norms."""
        names = [*_BLOCK_NORMS.values(), *(_QK_NORMS.values() if qk else ())]
        return [*(Site(name, layer) for layer in range(n_layers) for name in names), Site("final_in")]

    def norms(self, decoder: Decoder) -> Iterator[tuple[nn.Module, Site]]:
        """Each norm that is frozen, with the site that is its input; raises InputError for Gemma 2 with
        ``qk``."""
        if self.qk and not hasattr(decoder.layer(0).get_submodule("self_attn"), "q_norm"):
            raise InputError("this model has no query and key norms (Gemma 2); freeze with qk=False.")
        paths = {**_BLOCK_NORMS, **(_QK_NORMS if self.qk else {})}
        for layer in range(decoder.shape.n_layers):
            for path, name in paths.items():
                yield decoder.layer(layer).get_submodule(path), Site(name, layer)
        yield decoder.final, Site("final_in")

    def apply(self, x: Tensor, norm: nn.Module, site: Site, moment: Moment) -> Tensor:
        """The norm's output for ``x``, by its frozen factor: x * factor * (1 + weight)."""
        compute = torch.promote_types(x.dtype, torch.float32)
        factor = self._factor(x, norm, site, moment).detach().to(x.device, compute)
        weight: Tensor = norm.get_parameter("weight")
        return (x.to(compute) * factor * (1.0 + weight.to(compute))).type_as(x)

    def _factor(self, x: Tensor, norm: nn.Module, site: Site, moment: Moment) -> Tensor:
        own = rms_factor(x, norm)
        if self.reference is None or moment.start >= moment.prompt:
            return own
        value = self.reference[site]
        if x.ndim == 4:  # the query and key norms see [batch, head, pos, head_dim]
            value = value.unflatten(-1, (-1, x.shape[-1])).transpose(1, 2)
        if value.shape[0] != x.shape[0] or value.shape[-2] != moment.prompt:
            raise InputError(
                f"the reference run has shape {tuple(value.shape)} at '{site}' and this one {tuple(x.shape)};"
                " freeze norms from a run over a batch of the same shape."
            )
        frozen = rms_factor(value.to(x.device), norm)
        return torch.cat([frozen, own[..., moment.prompt :, :]], dim=-2)


def rms_factor(x: Float[Tensor, "*batch width"], norm: nn.Module) -> Float[Tensor, "*batch 1"]:
    """1 / sqrt(mean(x^2) + eps), in float32 or better."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    eps = norm.eps
    assert isinstance(eps, float)
    return torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
