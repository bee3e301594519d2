"""The names that other formats have for sites: hook points of Hugging Face modules and of TransformerLens.

A hook point is a module's path followed by ``.input`` or ``.output``: ``model.layers.12.output``. Several layers are
written together: ``model.layers.{5,9,12,15}.output``, and ``{all}`` stands for as many as there are.
"""

import re
from collections.abc import Sequence

from gemscope.artifacts.reading import shown
from gemscope.core.errors import FormatError, InputError, SiteError
from gemscope.core.sites import SITE_KINDS, Site

_INPUTS = {
    "resid_pre": "input",
    "z": "self_attn.o_proj.input",
    "resid_mid": "pre_feedforward_layernorm.input",
    "mlp_act": "mlp.down_proj.input",
}
"""Sites that are no module's output, as the input of one."""

_SUFFIX = {
    name: _INPUTS.get(name) or (f"{kind.module}.output" if kind.module else "output")
    for name, kind in SITE_KINDS.items()
    if kind.per_layer and name != "pattern"
}
_OTHER_SPELLINGS = {
    "input_layernorm.input": "resid_pre",
    "post_attention_layernorm.input": "attn_out_raw",
    "mlp.input": "mlp_in",
    "post_feedforward_layernorm.input": "mlp_out_raw",
}
_SITES = {suffix: name for name, suffix in _SUFFIX.items()} | _OTHER_SPELLINGS
_WHOLE = {"embed": "model.embed_tokens.output", "final_in": "model.norm.input", "final_norm": "model.norm.output"}
_POINT = re.compile(r"(?:model\.|language_model\.)*layers\.(?:(\d{1,4})|\{([\d, ]+|all)\})\.([a-z_.]+)")
_TOP = re.compile(r"(?:model\.|language_model\.)*(embed_tokens\.output|norm\.input|norm\.output)")


def hook_point(sites: Sequence[Site]) -> str:
    """The hook point of one site, or of the same site in several layers; raises InputError where there is none."""
    names = {site.name for site in sites}
    (name,) = names if len(names) == 1 else (None,)
    if name in _WHOLE and len(sites) == 1:
        return _WHOLE[name]
    if name not in _SUFFIX:
        raise InputError(f"{', '.join(map(str, sites))} is no hook point of a module; keep this dictionary as it is.")
    layers = ",".join(str(site.layer) for site in sites)
    return f"model.layers.{layers if len(sites) == 1 else '{' + layers + '}'}.{_SUFFIX[name]}"


def read_hook_point(point: object, n: int | None, where: object) -> tuple[Site, ...]:
    """The sites of a hook point, ``n`` of them (None: one); raises FormatError for any other text."""
    if isinstance(point, str):
        if (top := _TOP.fullmatch(point)) is not None and n is None:
            return (Site(next(name for name, known in _WHOLE.items() if known.endswith(top[1]))),)
        match = _POINT.fullmatch(point)
        if match is not None and match[3] in _SITES and (layers := _layers(match, n)) is not None:
            return tuple(Site(_SITES[match[3]], layer) for layer in layers)
    wanted = "'model.layers.12.output'" if n is None else f"'model.layers.{{5,9,12,15}}.output' with {n} layers"
    raise FormatError(f"the hook point {shown(point)} in {where} is not understood; it should be like {wanted}.")


def _layers(match: "re.Match[str]", n: int | None) -> list[int] | None:
    if n is None:
        return None if match[1] is None else [int(match[1])]
    if match[2] == "all":
        return list(range(n))
    parts = (match[2] or match[1]).split(",")
    if not all(part.strip().isdecimal() for part in parts):
        return None
    layers = [int(part) for part in parts]
    return layers if len(layers) == n and layers == sorted(set(layers)) else None


def read_tl_hook(name: object, where: object) -> tuple[Site, bool, tuple[str, ...]]:
    """Site of a TransformerLens hook, whether what is read includes the norm's gain, and what is odd about it.

    ``ln2.hook_normalized`` is the norm's output without its gain; ``hook_mlp_in`` is what enters the norm, although its
    name says otherwise. Raises FormatError for a name that is none.
    """
    if not isinstance(name, str) or len(name) > 200:
        raise FormatError(f"the hook name in {where} is missing or no text; name the site, as in --site resid_post.12.")
    match = re.fullmatch(r"blocks\.(\d{1,4})\.(.+)", name)
    if match is not None and match[2] in ("ln2.hook_normalized", "ln1.hook_normalized"):
        return Site("mlp_in" if match[2][2] == "2" else "attn_in", int(match[1])), False, ()
    if match is not None and match[2] == "hook_mlp_in":
        note = f"{name} in {where} is what enters the MLP's norm (resid_mid), not what the MLP reads (mlp_in)."
        return Site("resid_mid", int(match[1])), True, (note,)
    try:
        return Site.parse(name), True, ()
    except SiteError as error:
        raise FormatError(
            f"the hook name {shown(name)} in {where} is not understood; write for example 'blocks.12.hook_resid_post'."
        ) from error
