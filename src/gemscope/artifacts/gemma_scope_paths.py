"""What the path of a Gemma Scope artefact says: model, site, layers, width. Used where the files do not say it.

Notable: the repository is recognised in any parent folder, also as the hub's cache spells it
(``models--google--gemma-scope-2-1b-pt``); of the 270M model the pretrained one is called without ``-pt``.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemscope.artifacts.catalogue.artifact import WIDTHS
from gemscope.artifacts.catalogue.scope2 import JOINT_L0, L0_NAMES, SIZES, l0_target
from gemscope.core.sites import Site

_REPO_2 = re.compile(r"(?:.*--)?gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)")
_REPO_1 = re.compile(r"(?:.*--)?gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)(?:-canonical)?")
_SINGLE = re.compile(r"layer_(\d{1,4})_width_(\w+?)_l0_([a-z]+)(?:_seed_\d+)?(_affine)?(?:_seed_\d+)?")
_CROSS = re.compile(r"layer_(\d{1,4}(?:_\d{1,4})+)_width_(\w+?)_l0_([a-z]+)(?:_seed_\d+)?")
_CLT = re.compile(r"width_(\w+?)_l0_([a-z]+)(?:_seed_\d+)?(_affine)?(?:_seed_\d+)?")
_MODEL = re.compile(r"(?:google/)?gemma-(?:v3|3)-(270m|1b|4b|12b|27b)(?:-(pt|it))?")

_CATEGORIES = {
    "resid_post": ("resid_post", "resid_post"),
    "attn_out": ("z", "z"),
    "mlp_out": ("mlp_out", "mlp_out"),
    "transcoder": ("mlp_in", "mlp_out"),
    "clt": ("mlp_in", "mlp_out"),
    "crosscoder": ("resid_post", "resid_post"),
}
"""Site that is read and site that is written, per folder (with or without ``_all``)."""

_SITES_1 = {"res": "resid_post", "mlp": "mlp_out", "att": "z"}


@dataclass(frozen=True)
class Place:
    """What a path says; None where it says nothing."""

    kind: str | None = None
    reads: tuple[Site, ...] | None = None
    """None for a CLT: its layers are as many as it has files."""
    writes: tuple[Site, ...] | None = None
    model: str | None = None
    affine: bool = False
    width: int | None = None
    l0: int | float | None = None
    """Gemma Scope 1: the measured mean. Gemma Scope 2: the target, by the rule of the release."""


def model_name(name: str) -> str:
    """A Gemma 3 name as its hub id: ``gemma-v3-1b-pt`` is google/gemma-3-1b-pt; any other name is left as it is."""
    match = _MODEL.fullmatch(name)
    if match is None:
        return name
    size, tune = match[1], match[2] or "pt"
    return f"google/gemma-3-{size}" if (size, tune) == ("270m", "pt") else f"google/gemma-3-{size}-{tune}"


def place_2(folder: Path) -> Place:
    """What the path of a Gemma Scope 2 folder says."""
    parts = folder.absolute().parts
    repo = _last(_REPO_2, parts)
    model = None if repo is None else model_name(f"gemma-3-{repo[1]}-{repo[2]}")
    name, top = parts[-1], parts[-2] if len(parts) > 1 else ""
    category, every_layer = top.removesuffix("_all"), top.endswith("_all")
    into, out = _CATEGORIES.get(category, (None, None))
    if (single := _SINGLE.fullmatch(name)) is not None and into and out:
        layer, affine = int(single[1]), single[4] is not None
        kind = "sae" if into == out else "skip_transcoder" if affine else "transcoder"
        reads, writes = (Site(into, layer),), (Site(out, layer),)
        n_layers = 0 if repo is None else SIZES[repo[1]].n_layers
        known = single[3] in L0_NAMES and layer < n_layers
        l0 = l0_target(layer, n_layers, single[3], every_layer=every_layer) if known else None
        return Place(kind, reads, writes, model, affine, WIDTHS.get(single[2]), l0)
    if (cross := _CROSS.fullmatch(name)) is not None:
        sites = tuple(Site("resid_post", int(layer)) for layer in cross[1].split("_"))
        return Place("crosscoder", sites, sites, model, False, WIDTHS.get(cross[2]), JOINT_L0.get(cross[3]))
    if category == "clt" and (clt := _CLT.fullmatch(name)) is not None:
        return Place("clt", None, None, model, clt[3] is not None, WIDTHS.get(clt[1]), JOINT_L0.get(clt[2]))
    return Place(model=model)


def place_1(folder: Path) -> Place:
    """What the path of a Gemma Scope 1 folder says: ``.../layer_20/width_16k/average_l0_71`` in its repository."""
    parts = folder.absolute().parts
    repo = _last(_REPO_1, parts)
    layer = _last(re.compile(r"layer_(\d{1,4})"), parts)
    width, l0 = _last(re.compile(r"width_(\w+)"), parts), _last(re.compile(r"average_l0_(\d{1,6})"), parts)
    known: dict[str, Any] = {
        "model": None if repo is None else f"google/gemma-2-{repo[1]}{'-it' if repo[2] == 'it' else ''}",
        "width": None if width is None else WIDTHS.get(width[1]),
        "l0": None if l0 is None else float(l0[1]),
    }
    if "embedding" in parts:
        return Place("sae", (Site("embed"),), (Site("embed"),), **known)
    if repo is None or layer is None:
        return Place(**known)
    if repo[3] == "transcoders":
        return Place("transcoder", (Site("mlp_in", int(layer[1])),), (Site("mlp_out", int(layer[1])),), **known)
    site = (Site(_SITES_1[repo[3]], int(layer[1])),)
    return Place("sae", site, site, **known)


def canonical(folder: Path) -> Path:
    """``.../width_16k/canonical`` is the folder beside it whose L0 is closest to 100, the smaller one of two; any other
    folder is itself.
    """
    if folder.name != "canonical" or folder.exists():
        return folder
    found = [(float(p.name.removeprefix("average_l0_")), p) for p in folder.parent.glob("average_l0_*") if _has_l0(p)]
    return min(found, key=lambda pair: (abs(pair[0] - 100), pair[0]))[1] if found else folder


def _has_l0(path: Path) -> bool:
    return path.name.removeprefix("average_l0_").isdecimal()


def _last(pattern: "re.Pattern[str]", parts: tuple[str, ...]) -> "re.Match[str] | None":
    found = [match for part in parts if (match := pattern.fullmatch(part)) is not None]
    return found[-1] if found else None
