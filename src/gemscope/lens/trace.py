"""The residual stream layer by layer: how large it is, how much each layer turns it, which latents are active."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.sae import SAE
from gemscope.lens import pictures
from gemscope.lens.attention import sees, tokens_dict
from gemscope.lens.inputs import as_tokens, identity, place_in
from gemscope.lens.lines import TOKEN, cut, fit, number, pad
from gemscope.lens.result import Result
from gemscope.models.gemma import Gemma
from gemscope.models.layout import LayerAttention
from gemscope.models.pieces import shown
from gemscope.models.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Microscope:
    """A dictionary for a layer's stream, and what is known of its latents."""

    dictionary: SAE
    names: Mapping[int, str] = field(default_factory=dict[int, str])
    """Latent -> what it is called."""
    largest: Float[Tensor, " d_sae"] | None = None
    """Each latent's largest known activation (0: never seen active); latents are then ranked by their share of it."""

    def strongest(self, x: Float[Tensor, "pos d_in"], top: int) -> list[list["Active"]]:
        """For each row, its strongest latents. Raises InputError when ``x`` has another width."""
        if x.shape[1] != self.dictionary.d_in:
            raise InputError(
                f"the dictionary reads width {self.dictionary.d_in} and the model's stream has {x.shape[1]};"
                " give dictionaries of this model."
            )
        acts = self.dictionary.encode(x.to(self.dictionary.dtype))
        rank = acts
        if self.largest is not None:
            most = self.largest.to(acts)
            rank = torch.where(most > 0, acts / most, (acts > 0).to(acts.dtype))
        best = rank.topk(min(top, acts.shape[1]), dim=1)
        value = acts.gather(1, best.indices)
        return [
            [
                Active(j, float(a), float(r) if self.largest is not None else None, self.names.get(j))
                for j, a, r in zip(best.indices[row].tolist(), value[row], best.values[row], strict=True)
                if a > 0
            ]
            for row in range(len(x))
        ]


@dataclass(frozen=True)
class Active:
    """One latent that is active at a position."""

    latent: int
    activation: float
    strength: float | None
    """Share of its largest known activation; None where that is unknown."""
    name: str | None

    def __str__(self) -> str:
        size = f"{self.activation:.2f}" if self.strength is None else f"{self.strength:.0%}"
        return f"{self.latent}{'' if self.name is None else ' ' + self.name} {size}"


@dataclass(frozen=True, eq=False, repr=False)
class ActivationTrace(Result):
    """Sizes and directions of the stream; every array is over all positions."""

    model: str
    tokens: Tokens
    layers: tuple[LayerAttention, ...]
    embed_norm: Float[Tensor, " pos"]
    resid_norm: Float[Tensor, "layer pos"]
    """Norm of ``resid_post``."""
    attention_norm: Float[Tensor, "layer pos"]
    """Norm of ``attn_out``."""
    mlp_norm: Float[Tensor, "layer pos"]
    """Norm of ``mlp_out``."""
    cosine_before: Float[Tensor, "layer pos"]
    """Between the stream before and after the layer: how little the layer turns it."""
    cosine_last: Float[Tensor, "layer pos"]
    """Between the stream after the layer and after the last one."""
    latents: tuple[tuple[tuple[Active, ...], ...], ...]
    """[layer][position]: the strongest latents; empty where there is no dictionary, and at control tokens."""

    @property
    def title(self) -> str:
        return f"{self.name} · residual stream · {len(self.layers)} layers × {len(self.tokens)} positions"

    def as_dict(self) -> dict[str, Any]:
        latents = [
            {
                "layer": about.layer,
                "position": p,
                "latents": [
                    {"latent": a.latent, "activation": a.activation, "strength": a.strength, "name": a.name}
                    for a in found
                ],
            }
            for about, row in zip(self.layers, self.latents, strict=True)
            for p, found in enumerate(row)
            if found
        ]
        return {
            "kind": "trace",
            "model": self.model,
            "tokens": tokens_dict(self.tokens),
            **{name: value.tolist() for name, value in self._numbers().items()},
            "latents": latents,
        }

    def _numbers(self) -> dict[str, Tensor]:
        return {
            "embed_norm": self.embed_norm,
            "resid_norm": self.resid_norm,
            "attention_norm": self.attention_norm,
            "mlp_norm": self.mlp_norm,
            "cosine_before": self.cosine_before,
            "cosine_last": self.cosine_last,
        }

    def arrays(self) -> Mapping[str, Tensor]:
        return {**self._numbers(), "ids": self.tokens.ids}

    def text(self, width: int = 80, position: int = -1) -> str:
        """One position, a line a layer."""
        at = place_in(self.tokens, position)
        piece = shown(self.tokens.pieces[at])
        lines = [cut(f"{self.title} · at {piece}@{at}", max(width, 60)), ""]
        names = ("norm", "attention", "mlp", "cos before", "cos last")
        lines.append(pad("layer", TOKEN) + "".join(f"{name:>11}" for name in names))
        lines.append(pad("embed", TOKEN) + number(self.embed_norm[at], 11, 2))
        numbers = list(self._numbers().values())[1:]
        for row, about in enumerate(self.layers):
            cells = (number(x[row, at], 11, 2) for x in numbers)
            lines.append(pad(f"{about.layer} {sees(about)}", TOKEN) + "".join(cells))
            if found := self.latents[row][at]:
                lines.append("    " + fit([str(a) for a in found], max(width, 60) - 4, " · "))
        return "\n".join(lines)

    def plot(self) -> Any:
        names = [shown(piece) for piece in self.tokens.pieces]
        return pictures.trace(
            self.resid_norm, self.cosine_before, [str(a.layer) for a in self.layers], names, self.title
        )


@torch.no_grad()
def trace(
    gemma: Gemma,
    text: str | Tokens,
    *,
    dictionaries: Mapping[int, Microscope] | None = None,
    top: int = 5,
) -> ActivationTrace:
    """Follow the stream through the model; ``dictionaries`` are of ``resid_post``, by layer.

    Raises InputError when a dictionary is of another width, ContextLengthError.
    """
    tokens, layers = as_tokens(gemma, text), range(gemma.shape.n_layers)
    names = ("attn_out", "mlp_out", "resid_post")
    seen = gemma.capture(tokens, [Site("resid_pre", 0), *(Site(n, layer) for layer in layers for n in names)])

    def at(name: str, layer: int) -> Tensor:
        return seen[Site(name, layer)][0].float().cpu()

    embed = at("resid_pre", 0)
    post = [at("resid_post", layer) for layer in layers]
    before = [embed, *post[:-1]]
    latents: list[tuple[tuple[Active, ...], ...]] = []
    for layer in layers:
        one = (dictionaries or {}).get(layer)
        found: list[tuple[Active, ...]] = [()] * len(tokens)
        if one is not None:
            place = tokens.content_mask.nonzero()[:, 0].tolist()
            rows = post[layer][place].to(one.dictionary.W_enc.device)
            found = _put(found, place, one.strongest(rows, top))
        latents.append(tuple(found))
    return ActivationTrace(
        model=identity(gemma),
        tokens=tokens,
        layers=tuple(gemma.shape.attention(layer) for layer in layers),
        embed_norm=embed.norm(dim=-1),
        resid_norm=torch.stack([x.norm(dim=-1) for x in post]),
        attention_norm=torch.stack([at("attn_out", layer).norm(dim=-1) for layer in layers]),
        mlp_norm=torch.stack([at("mlp_out", layer).norm(dim=-1) for layer in layers]),
        cosine_before=torch.stack([torch.cosine_similarity(x, y) for x, y in zip(before, post, strict=True)]),
        cosine_last=torch.stack([torch.cosine_similarity(x, post[-1]) for x in post]),
        latents=tuple(latents),
    )


def _put(into: list[tuple[Active, ...]], place: list[int], found: list[list[Active]]) -> list[tuple[Active, ...]]:
    for position, active in zip(place, found, strict=True):
        into[position] = tuple(active)
    return into
