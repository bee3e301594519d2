"""Places in a model: ``Site("resid_post", 12)``, written ``resid_post.12``.

The names are those of docs/design.md section 2. TransformerLens hook names (``blocks.12.hook_resid_post``) and Hugging
Face module names (``model.layers.12.post_feedforward_layernorm``, meaning that module's output) are read as aliases.
"""

import re
from dataclasses import dataclass
from typing import Literal

from gemscope.core.errors import SiteError

Width = Literal["d_model", "d_z", "d_q", "d_kv", "d_mlp", "pattern"]


@dataclass(frozen=True)
class SiteKind:
    """What a site name means, whatever the layer."""

    width: Width
    """Which of the model's sizes the last axis has; a ``pattern`` is [head, query, key] instead."""
    tl: str
    """TransformerLens' name for the same tensor, below ``blocks.{layer}.`` for per-layer sites."""
    module: str | None
    """Hugging Face module whose *output* this is, below ``layers.{layer}.``; None when it is no module's output."""
    per_layer: bool = True


SITE_KINDS: dict[str, SiteKind] = {
    "embed": SiteKind("d_model", "hook_embed", "embed_tokens", per_layer=False),
    "resid_pre": SiteKind("d_model", "hook_resid_pre", None),
    "attn_in": SiteKind("d_model", "ln1.hook_out", "input_layernorm"),
    "q": SiteKind("d_q", "attn.hook_q", "self_attn.q_proj"),
    "k": SiteKind("d_kv", "attn.hook_k", "self_attn.k_proj"),
    "v": SiteKind("d_kv", "attn.hook_v", "self_attn.v_proj"),
    "pattern": SiteKind("pattern", "attn.hook_pattern", None),
    "z": SiteKind("d_z", "attn.hook_z", None),
    "attn_out_raw": SiteKind("d_model", "attn.hook_out", "self_attn.o_proj"),
    "attn_out": SiteKind("d_model", "hook_attn_out", "post_attention_layernorm"),
    "resid_mid": SiteKind("d_model", "hook_resid_mid", None),
    "mlp_in": SiteKind("d_model", "mlp.hook_in", "pre_feedforward_layernorm"),
    "mlp_act": SiteKind("d_mlp", "mlp.hook_post", None),
    "mlp_out_raw": SiteKind("d_model", "mlp.hook_out", "mlp"),
    "mlp_out": SiteKind("d_model", "hook_mlp_out", "post_feedforward_layernorm"),
    "resid_post": SiteKind("d_model", "hook_resid_post", ""),
    "final_in": SiteKind("d_model", "ln_final.hook_in", None, per_layer=False),
    "final_norm": SiteKind("d_model", "ln_final.hook_out", "norm", per_layer=False),
}
"""Every site, in the order in which a forward pass computes them within a layer."""

_ORDER = {name: i for i, name in enumerate(SITE_KINDS)}
_BY_TL = {kind.tl: name for name, kind in SITE_KINDS.items()}
_BY_MODULE = {kind.module: name for name, kind in SITE_KINDS.items() if kind.module is not None}
_PLAIN = re.compile(r"([a-z_]+)(?:\.(\d+))?")
_TL = re.compile(r"(?:blocks\.(\d+)\.)?([a-z0-9_.]+)")
_MODULE = re.compile(r"(?:language_model\.|model\.)*(?:layers\.(\d+)\.?)?([a-z_.]*)")


@dataclass(frozen=True, order=False)
class Site:
    """One place in a model: a site name and, except for ``embed``, ``final_in`` and ``final_norm``, a layer.

    Raises SiteError for an unknown name, a missing layer, or a layer where none belongs. Whether the layer exists is
    known only to the model (``Gemma.check_site``).
    """

    name: str
    layer: int | None = None

    def __post_init__(self) -> None:
        kind = SITE_KINDS.get(self.name)
        if kind is None:
            raise SiteError(f"unknown site {self.name!r}; the sites are {', '.join(SITE_KINDS)}.")
        if kind.per_layer and (self.layer is None or self.layer < 0):
            raise SiteError(f"site {self.name!r} needs a layer of 0 or more, as in '{self.name}.0'.")
        if not kind.per_layer and self.layer is not None:
            raise SiteError(f"site {self.name!r} has no layers; write just '{self.name}'.")

    @property
    def kind(self) -> SiteKind:
        """What the name means."""
        return SITE_KINDS[self.name]

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: sites in the order in which a forward pass computes them."""
        if self.name == "embed":
            return (-1, 0)
        return (1 << 30 if self.layer is None else self.layer, _ORDER[self.name])

    @property
    def tl_name(self) -> str:
        """TransformerLens' name, e.g. ``blocks.3.hook_resid_post``."""
        return self.kind.tl if self.layer is None else f"blocks.{self.layer}.{self.kind.tl}"

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name}.{self.layer}"

    @classmethod
    def parse(cls, text: "str | Site") -> "Site":
        """Read ``resid_post.12``, a TransformerLens hook name or a Hugging Face module name (its output).

        Raises SiteError, with the spellings that are understood.
        """
        if isinstance(text, Site):
            return text
        text = text.strip()
        for read in (_read_plain, _read_tl, _read_module):
            if (found := read(text)) is not None:
                return cls(*found)
        name = text.split(".")[0]
        if name in SITE_KINDS:
            raise SiteError(f"cannot read site {text!r}: write the layer as a number, as in '{name}.3'.")
        raise SiteError(
            f"unknown site {text!r}; write for example 'resid_post.3' (sites: {', '.join(SITE_KINDS)}), a"
            " TransformerLens name such as 'blocks.3.hook_resid_post', or a module name such as 'model.layers.3'."
        )


def _read_plain(text: str) -> tuple[str, int | None] | None:
    match = _PLAIN.fullmatch(text)
    if match is None or match[1] not in SITE_KINDS:
        return None
    return match[1], None if match[2] is None else int(match[2])


def _read_tl(text: str) -> tuple[str, int | None] | None:
    match = _TL.fullmatch(text)
    if match is None or (name := _BY_TL.get(match[2])) is None:
        return None
    layer = None if match[1] is None else int(match[1])
    return (name, layer) if SITE_KINDS[name].per_layer == (layer is not None) else None


def _read_module(text: str) -> tuple[str, int | None] | None:
    match = _MODULE.fullmatch(text)
    if match is None or (name := _BY_MODULE.get(match[2])) is None:
        return None
    layer = None if match[1] is None else int(match[1])
    return (name, layer) if SITE_KINDS[name].per_layer == (layer is not None) else None
