"""Direct logit attribution: which component wrote the answer (Elhage et al. 2021, "A Mathematical Framework").

The stream before the final norm is a sum: the embedding, and what each head and each MLP added. With the norm's scale
kept as it was, the logit is linear in that sum, so the parts add up to it exactly. What a part does through later
layers is not in its number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.core.sites import Site
from gemscope.lens import pictures
from gemscope.lens.attention import sees, tokens_dict
from gemscope.lens.inputs import Asked, Target, as_tokens, find_target, identity, place_in
from gemscope.lens.lines import cut, fit, number, pad
from gemscope.lens.result import Result
from gemscope.lens.writing import gain_of, head_values, output_weights, post_norm
from gemscope.models.freeze import rms_factor
from gemscope.models.gemma import Gemma
from gemscope.models.layout import LayerAttention
from gemscope.models.pieces import shown
from gemscope.models.tokens import Tokens


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Result):
    """The parts of one logit difference, in logits: embed + attention + mlp + rounding = logit."""

    model: str
    tokens: Tokens
    position: int
    """Where the next token is predicted."""
    target: Target
    layers: tuple[LayerAttention, ...]
    logit: float
    """The target's logit less the other's, or less the mean over the vocabulary; before Gemma 2's cap."""
    embed: float
    attention: Float[Tensor, "layer head"]
    mlp: Float[Tensor, " layer"]
    rounding: float
    """What the model's own additions lost or gained by rounding: about 1e-6 in float32, more in bfloat16."""
    keys: Float[Tensor, "layer head key"]
    """Each head's part by the position it was read from; sums to ``attention``."""

    @property
    def title(self) -> str:
        against = "" if self.target.other is not None else " − mean"
        piece = shown(self.tokens.pieces[self.position])
        return f"{self.name} · logit of {self.target}{against} after {piece}@{self.position}: {self.logit:.2f}"

    @property
    def components(self) -> list[tuple[str, float]]:
        """Every part by name (``embed``, ``attention 3.1``, ``mlp 3``, ``rounding``), in the order of a pass."""
        found = [("embed", self.embed)]
        for row, about in enumerate(self.layers):
            found += [(f"attention {about.layer}.{h}", float(x)) for h, x in enumerate(self.attention[row])]
            found.append((f"mlp {about.layer}", float(self.mlp[row])))
        return [*found, ("rounding", self.rounding)]

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": "attribution",
            "model": self.model,
            "tokens": tokens_dict(self.tokens),
            "position": self.position,
            "target": self.target.as_dict(),
            "logit": self.logit,
            "components": [{"name": name, "logit": value} for name, value in self.components],
        }

    def arrays(self) -> Mapping[str, Tensor]:
        return {"attention": self.attention, "mlp": self.mlp, "keys": self.keys, "ids": self.tokens.ids}

    def read_from(self, row: int, head: int, top: int = 3) -> list[tuple[int, float]]:
        """The positions through which a head wrote most, with their parts."""
        keys = self.keys[row, head]
        best = keys.abs().topk(min(top, len(keys))).indices.tolist()
        return [(key, float(keys[key])) for key in best if keys[key] != 0]

    def text(self, width: int = 80, top: int = 12) -> str:
        width = max(width, 60)
        lines = [cut(self.title, width), "", pad("layer", 20) + f"{'attention':>10}{'mlp':>10}{'sum so far':>12}"]
        total = self.embed
        lines.append(pad("embed", 40) + number(total, 12, 3))
        for row, about in enumerate(self.layers):
            a, m = float(self.attention[row].sum()), float(self.mlp[row])
            total += a + m
            lines.append(
                pad(f"{about.layer} {sees(about)}", 20) + number(a, 10, 3) + number(m, 10, 3) + number(total, 12, 3)
            )
        lines += ["", pad("strongest parts", 20) + f"{'logit':>10}  read from"]
        place = {about.layer: row for row, about in enumerate(self.layers)}
        for name, value in sorted(self.components, key=lambda part: -abs(part[1]))[:top]:
            line = pad(name, 20) + number(value, 10, 3)
            if name.startswith("attention"):
                layer, head = name.removeprefix("attention ").split(".")
                keys = self.read_from(place[int(layer)], int(head))
                words = [f"{shown(self.tokens.pieces[key])}@{key} {x:+.2f}" for key, x in keys]
                line += "  " + fit(words, width - 32, "  ")
            lines.append(line)
        return "\n".join(lines)

    def plot(self) -> Any:
        names = [f"{about.layer}" for about in self.layers]
        return pictures.attribution(self.embed, self.attention, self.mlp, names, self.title)


@torch.no_grad()
def attribute(
    gemma: Gemma,
    text: str | Tokens,
    *,
    target: Asked | None = None,
    other: Asked | None = None,
    position: int = -1,
) -> Attribution:
    """The parts of a next token's logit at a position.

    ``target`` None: the model's most likely token; ``other`` None: the mean logit over the vocabulary. Raises
    InputError, ContextLengthError.
    """
    tokens, shape = as_tokens(gemma, text), gemma.shape
    at, layers = place_in(tokens, position), range(gemma.shape.n_layers)
    names = ("pattern", "v", "attn_out_raw", "mlp_out")
    seen = gemma.capture(tokens, ["embed", *(Site(name, layer) for layer in layers for name in names), "final_in"])
    wanted = find_target(gemma, gemma.unembed(seen["final_in"][0, at]), target, other)
    last = seen["final_in"][0, at].double().cpu()
    c = _direction(gemma, wanted) * gain_of(gemma.decoder.final).double().cpu()
    c = c * rms_factor(last, gemma.decoder.final)
    keys, mlp = torch.zeros(shape.n_layers, shape.n_heads, len(tokens)).double(), torch.zeros(shape.n_layers).double()
    for layer in layers:
        keys[layer, :, : at + 1] = _heads(gemma, seen, layer, at, c)
        mlp[layer] = seen[Site("mlp_out", layer)][0, at].double().cpu() @ c
    embed, logit = float(seen["embed"][0, at].double().cpu() @ c), float(last.double() @ c)
    attention = keys.sum(-1)
    rounding = logit - embed - float(attention.sum() + mlp.sum())
    about = tuple(shape.attention(layer) for layer in layers)
    return Attribution(identity(gemma), tokens, at, wanted, about, logit, embed, attention, mlp, rounding, keys)


def _direction(gemma: Gemma, target: Target) -> Float[Tensor, " d_model"]:
    rows = gemma.unembedding()
    other = rows.double().mean(0) if target.other is None else rows[target.other].double()
    return (rows[target.token].double() - other).cpu()


def _heads(gemma: Gemma, seen: Any, layer: int, at: int, c: Float[Tensor, " d_model"]) -> Float[Tensor, "head key"]:
    """What each head wrote along ``c`` at one position, by the key it was read from."""

    def at_layer(name: str) -> Tensor:
        return seen[Site(name, layer)][0].double().cpu()

    factor, gain = post_norm(gemma, layer, at_layer("attn_out_raw")[at : at + 1])
    through = output_weights(gemma, layer).double().cpu() @ (c * gain.double().cpu() * factor[0])
    values = head_values(gemma, at_layer("v")[: at + 1])
    return at_layer("pattern")[:, at, : at + 1] * torch.einsum("khd,hd->hk", values, through)
