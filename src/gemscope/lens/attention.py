"""Attention of all layers and heads on one text, in three units.

- ``weight``: the pattern itself, softmax(q k^T). Rows sum to one.
- ``written``: the norm of the vector that a query gets from a key: weight times the key's value through W_O, with the
  scale and gain of the norm behind it, so that the vectors of all heads and keys add up to ``attn_out`` (Kobayashi et
  al. 2020, "Attention is not only a weight", equation 4, for Gemma's sandwich norms).
- ``effect``: weight * (v . dL/dz), the first-order change of the chosen next token's logit L at the last position, with
  everything after it following, if the query read this key a little more strongly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from gemscope.core.arrays import Bool, Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.lens import pictures
from gemscope.lens.inputs import Asked, Target, as_tokens, find_target, identity
from gemscope.lens.lines import TOKEN, cut, fit, hang, number, pad, short
from gemscope.lens.result import Result
from gemscope.lens.writing import head_values, post_norm, value_norms
from gemscope.models.gemma import Gemma
from gemscope.models.layout import LayerAttention
from gemscope.models.pieces import shown
from gemscope.models.tokens import Batch, Tokens

Kind = Literal["weight", "written", "effect"]
KINDS: tuple[Kind, ...] = ("weight", "written", "effect")
MOST_BYTES = 8 * 2**30
"""Maps larger than this are refused."""


@dataclass(frozen=True, eq=False, repr=False)
class AttentionMaps(Result):
    """What every query of a text gets from every key, in every head."""

    model: str
    tokens: Tokens
    layers: tuple[LayerAttention, ...]
    """The layers that were read: local or global, the window, and which key/value head each head reads."""
    kind: Kind
    values: Float[Tensor, "layer head query key"]
    """float32 on the CPU; 0 where a query cannot see a key."""
    target: Target | None = None
    """The next token that an ``effect`` is on."""

    @property
    def title(self) -> str:
        n, heads, pos = self.values.shape[:3]
        what = f"effect on {self.target}" if self.target else self.kind
        return f"{self.name} · attention ({what}) · {n} layers × {heads} heads · {pos} tokens"

    def head(self, layer: int, head: int) -> Float[Tensor, "query key"]:
        """The map of one head; raises InputError when it was not read."""
        return self.values[self.row(layer), self._head(head)]

    def row(self, layer: int) -> int:
        """Where ``layer`` stands in ``values``; raises InputError when it was not read."""
        for row, about in enumerate(self.layers):
            if about.layer == layer:
                return row
        known = ", ".join(str(about.layer) for about in self.layers)
        raise InputError(f"layer {layer} was not read; the layers that were are {known}.")

    def _head(self, head: int) -> int:
        if not 0 <= head < self.values.shape[1]:
            raise InputError(f"there is no head {head}; each layer has heads 0 to {self.values.shape[1] - 1}.")
        return head

    def strongest(self, layer: int, head: int, top: int = 4) -> list[list[tuple[int, float]]]:
        """For each query of one head, its ``top`` keys by size with their values."""
        found: list[list[tuple[int, float]]] = []
        for query, row in enumerate(self.head(layer, head)):
            keys = row[: query + 1].abs().topk(min(top, query + 1)).indices.tolist()
            found.append([(key, float(row[key])) for key in keys if row[key] != 0])
        return found

    def edges(self, top: int) -> list[tuple[int, int, int, int, float]]:
        """The largest values of all heads: (layer, head, query, key, value)."""
        best = self.values.abs().flatten().topk(min(top, self.values.numel())).indices
        places = torch.stack(torch.unravel_index(best, self.values.shape), dim=1).tolist()
        return [(self.layers[i].layer, h, q, k, float(self.values[i, h, q, k])) for i, h, q, k in places]

    def as_dict(self) -> dict[str, Any]:
        heads = [
            {"layer": about.layer, "head": head, "keys": self.strongest(about.layer, head, 3)}
            for about in self.layers
            for head in range(self.values.shape[1])
        ]
        return {
            "kind": "attention",
            "model": self.model,
            "unit": self.kind,
            "target": None if self.target is None else self.target.as_dict(),
            "tokens": tokens_dict(self.tokens),
            "layers": [layer_dict(about) for about in self.layers],
            "heads": heads,
        }

    def arrays(self) -> Mapping[str, Tensor]:
        return {"values": self.values, "ids": self.tokens.ids}

    def text(self, width: int = 80, top: int = 10) -> str:
        """The layers and, but for plain weights, the ``top`` largest values."""
        lines = [cut(self.title, width), "", pad("layer", 8) + pad("sees", 16) + "heads by key/value head"]
        for about in self.layers:
            lines += hang(pad(str(about.layer), 8) + pad(sees(about), 16), groups(about), width)
        if self.kind != "weight":
            lines += ["", pad("head", 8) + pad("query", TOKEN + 6) + pad("reads", TOKEN + 6) + f"{self.kind:>10}"]
            for layer, head, *places, value in self.edges(top):
                words = (pad(f"{shown(self.tokens.pieces[i])}@{i}", TOKEN + 6) for i in places)
                lines.append(pad(f"{layer}.{head}", 8) + "".join(words) + number(value, 10, 3))
        return "\n".join(lines)

    def head_text(self, layer: int, head: int, width: int = 80, top: int = 4) -> str:
        """One head, a line a query: its strongest keys."""
        about = self.layers[self.row(layer)]
        lines = [
            f"head {layer}.{self._head(head)} · {sees(about)} · key/value head {about.kv_group[head]} · {self.kind}"
        ]
        places = max(3, len(str(len(self.tokens) - 1)))
        lines += ["", " " * (places + 1) + pad("query", TOKEN) + "reads"]
        for query, keys in enumerate(self.strongest(layer, head, top)):
            words = [f"{shown(self.tokens.pieces[key])}@{key} {short(value, 8, 2)}" for key, value in keys]
            token = pad(shown(self.tokens.pieces[query]), TOKEN)
            lines.append(f"{query:>{places}} {token}{fit(words, max(width, 60) - TOKEN - places - 1, '  ')}")
        return "\n".join(lines)

    def plot(self, head: tuple[int, int] | None = None) -> Any:
        """All heads as small maps, or one head with its tokens."""
        if head is None:
            return pictures.mosaic(self.values, [label(about) for about in self.layers], self.title)
        title = f"{self.name} · head {head[0]}.{head[1]} · {sees(self.layers[self.row(head[0])])} · {self.kind}"
        names = [shown(piece) for piece in self.tokens.pieces]
        return pictures.matrix(self.head(*head), names, title, signed=self.kind == "effect")


def attend(
    gemma: Gemma,
    text: str | Tokens,
    *,
    kind: Kind = "weight",
    layers: Sequence[int] | None = None,
    target: Asked | None = None,
    other: Asked | None = None,
) -> AttentionMaps:
    """Attention of ``layers`` (None: all) on a text, in the unit ``kind``.

    ``target`` and ``other`` name the next token an ``effect`` is on (None: the model's most likely one) and the one it
    is compared with. Raises InputError, SiteError, ContextLengthError.
    """
    tokens = as_tokens(gemma, text)
    about, wanted = plan(gemma, tokens, kind, layers, target, other)
    values = read_maps(gemma, gemma.batch([tokens]), [one.layer for one in about], kind, wanted)
    return AttentionMaps(identity(gemma), tokens, about, kind, values, wanted)


def plan(
    gemma: Gemma,
    tokens: Tokens,
    kind: Kind,
    layers: Sequence[int] | None = None,
    target: Asked | None = None,
    other: Asked | None = None,
) -> tuple[tuple[LayerAttention, ...], Target | None]:
    """The layers that are to be read, and the target of an ``effect``; raises as ``attend`` does."""
    chosen = range(gemma.shape.n_layers) if layers is None else dict.fromkeys(layers)
    about = tuple(gemma.shape.attention(layer) for layer in chosen)
    _check(gemma, tokens, about, kind, other if target is None else target)
    return about, _target(gemma, tokens, target, other) if kind == "effect" else None


def read_maps(
    gemma: Gemma, batch: Batch, layers: Sequence[int], kind: Kind, target: Target | None = None
) -> Float[Tensor, "layer head query key"]:
    """The maps of the one text of ``batch``, without its padding."""
    if kind == "effect":
        assert target is not None
        return _effects(gemma, batch, layers, target)
    names = ("pattern",) if kind == "weight" else ("pattern", "v", "attn_out_raw")
    seen = gemma.capture(batch, [Site(name, layer) for layer in layers for name in names])
    found: list[Tensor] = []
    for layer in layers:
        pattern = seen.item(0, Site("pattern", layer)).float()
        if kind == "written":
            norms = value_norms(gemma, layer, seen.item(0, Site("v", layer)))
            factor, _ = post_norm(gemma, layer, seen.item(0, Site("attn_out_raw", layer)))
            pattern = pattern * norms.float()[:, None, :] * factor.float()[None]
        found.append(pattern.cpu())
    return torch.stack(found)


def _effects(
    gemma: Gemma, batch: Batch, layers: Sequence[int], target: Target
) -> Float[Tensor, "layer head query key"]:
    names = ("pattern", "v", "z")
    sites = [Site(name, layer) for layer in layers for name in names]
    seen = gemma.capture(batch, [*sites, "final_in"], grad=True)
    last = len(batch.items[0]) - 1
    logit = effect_logit(gemma.unembed(seen["final_in"][0, last]), target)
    gradients = torch.autograd.grad(logit, [seen[Site("z", layer)] for layer in layers])
    found: list[Tensor] = []
    for layer, gradient in zip(layers, gradients, strict=True):
        values = head_values(gemma, seen.item(0, Site("v", layer)).detach())
        slope = gradient[0, : last + 1].unflatten(-1, (gemma.shape.n_heads, gemma.shape.head_dim))
        through = torch.einsum("qhd,khd->hqk", slope, values)
        found.append((seen.item(0, Site("pattern", layer)).detach() * through).float().cpu())
    return torch.stack(found)


def effect_logit(logits: Float[Tensor, " vocab"], target: Target) -> Float[Tensor, ""]:
    """The target's logit, less the other's."""
    return logits[target.token] if target.other is None else logits[target.token] - logits[target.other]


def visible(about: LayerAttention, n: int) -> Bool[Tensor, "query key"]:
    """Which keys a query of this layer can see, in a text of ``n`` tokens."""
    query, key = torch.arange(n)[:, None], torch.arange(n)[None]
    return (key <= query) if about.window is None else (key <= query) & (query - key < about.window)


def sees(about: LayerAttention) -> str:
    """``global`` or ``local 512``."""
    return "global" if about.window is None else f"local {about.window}"


def label(about: LayerAttention) -> str:
    """``3 global`` or ``0 local 512``."""
    return f"{about.layer} {sees(about)}"


def groups(about: LayerAttention) -> list[str]:
    """The heads that share a key/value head, bracketed: ``(0 1)``, ``(2 3)``."""
    shared: dict[int, list[str]] = {}
    for head, kv in enumerate(about.kv_group):
        shared.setdefault(kv, []).append(str(head))
    return [f"({' '.join(heads)})" for heads in shared.values()]


def layer_dict(about: LayerAttention) -> dict[str, Any]:
    """Plain JSON values."""
    return {"layer": about.layer, "kind": about.kind, "window": about.window, "kv_group": list(about.kv_group)}


def tokens_dict(tokens: Tokens) -> dict[str, Any]:
    """Plain JSON values."""
    return {"text": tokens.text, "ids": tokens.ids.tolist(), "pieces": list(tokens.pieces)}


def _target(gemma: Gemma, tokens: Tokens, target: Asked | None, other: Asked | None) -> Target:
    last = gemma.capture(tokens, ["final_in"])["final_in"][0, -1]
    return find_target(gemma, gemma.unembed(last), target, other)


def _check(gemma: Gemma, tokens: Tokens, about: Sequence[LayerAttention], kind: str, target: Asked | None) -> None:
    if kind not in KINDS:
        raise InputError(f"unknown unit {kind!r}; use one of {', '.join(KINDS)}.")
    if not about:
        raise InputError("there is no layer to read; give at least one.")
    if target is not None and kind != "effect":
        raise InputError(f"a target says what an effect is on, and {kind!r} has none; ask for the unit effect.")
    size = len(about) * gemma.shape.n_heads * len(tokens) ** 2 * 4
    if size > MOST_BYTES:
        raise InputError(
            f"the maps of {len(about)} layers on {len(tokens)} tokens take {size / 2**30:.0f} GiB (limit"
            f" {MOST_BYTES // 2**30}); shorten the text or choose layers."
        )
