"""The rules of Gemma Scope 2: ten repositories, ``google/gemma-scope-2-{size}-{pt|it}``.

Sources: the technical paper's Table 1 (kinds, layers, widths), the folder names of the release, and SAELens 6.54.12,
whose registry of 8,784 single-layer dictionaries and their L0 the rules here reproduce without an exception that is
not written down below.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gemscope.artifacts.catalogue.artifact import WIDTHS, Artifact, Kind, Standing
from gemscope.core.sites import Site

SUITE: Literal["gemma-scope-2"] = "gemma-scope-2"


@dataclass(frozen=True)
class Size:
    """A Gemma 3 as far as its dictionaries depend on it."""

    n_layers: int
    d_model: int
    d_z: int
    """Heads times head width."""
    deep: tuple[int, int, int, int]
    """The layers that were studied most: 25, 50, 65 and 85 % of the depth."""


SIZES: dict[str, Size] = {
    "270m": Size(18, 640, 1024, (5, 9, 12, 15)),
    "1b": Size(26, 1152, 1024, (7, 13, 17, 22)),
    "4b": Size(34, 2560, 2048, (9, 17, 22, 29)),
    "12b": Size(48, 3840, 4096, (12, 24, 31, 41)),
    "27b": Size(62, 5376, 4096, (16, 31, 40, 53)),
}

L0_NAMES = ("small", "medium", "big")
_L0_RAMP = {"small": (10, 20), "medium": (30, 60), "big": (60, 150)}
_BIG_OF_ALL = (60, 120)

JOINT_L0 = {"medium": 50, "big": 150}
"""Targets of crosscoders and CLTs; that of ``medium`` is the paper's, no config was seen that states it."""

_JOINT_WIDTHS = {"crosscoder": ("65k", "262k", "524k", "1m"), "clt": ("262k", "524k")}
_CLT_SIZES = ("270m", "1b")
_QUOTED = {
    ("1b-pt", "crosscoder/layer_7_13_17_22_width_262k_l0_medium"),
    ("270m-pt", "crosscoder/layer_5_9_12_15_width_1m_l0_big"),
    ("1b-pt", "clt/width_262k_l0_medium_affine"),
}

_SITES = {"resid_post": ("resid_post",) * 2, "attn_out": ("z",) * 2, "mlp_out": ("mlp_out",) * 2}
_SITES["transcoder"] = ("mlp_in", "mlp_out")
_SHORT = {"resid_post": "res", "attn_out": "att", "mlp_out": "mlp", "transcoder": "transcoders"}

_27B_GAPS = {("small", 4), ("small", 5), ("small", 43), ("big", 4), ("big", 43)}
_4B_IT_16K = (0, 1, 2, 3, 4, 6, 7, 9, 10, 12)


def l0_target(layer: int, n_layers: int, l0_name: str, *, every_layer: bool = False) -> int:
    """The L0 a single-layer dictionary was trained for, as its config.json states it.

    Linear in the layer over the first third of the network, then constant, rounded down; ``every_layer`` is for the
    ``*_all`` folders, whose ``big`` ends at 120 instead of 150.
    """
    low, high = _BIG_OF_ALL if every_layer and l0_name == "big" else _L0_RAMP[l0_name]
    return (low * n_layers + (high - low) * min(n_layers, 3 * layer)) // n_layers


def latents_per_layer(width: int, n_layers: int) -> int:
    """Latents of each encoder of a CLT named after its total ``width``: the layer's share, rounded down to 32s."""
    return width // n_layers // 32 * 32


def artifacts() -> Iterator[Artifact]:
    """All of Gemma Scope 2: by repository, single layers first."""
    for size in SIZES:
        for variant in ("pt", "it"):
            yield from _single_layer(size, variant)
            yield from _joint(size, variant)


def _single_layer(size: str, variant: str) -> Iterator[Artifact]:
    for site in _SITES:
        for every_layer in (False, True):
            layers = range(SIZES[size].n_layers) if every_layer else SIZES[size].deep
            for width in _widths(site, size, every_layer):
                for l0_name in ("small", "big") if every_layer else L0_NAMES:
                    for layer in layers:
                        for affine in (False, True) if site == "transcoder" else (False,):
                            yield _one_layer(size, variant, site, every_layer, layer, width, l0_name, affine)
            if (site, every_layer) == ("resid_post", False):
                for layer in layers:
                    yield _one_layer(size, variant, site, False, layer, "262k", "medium", False, seed=1)


def _widths(site: str, size: str, every_layer: bool) -> tuple[str, ...]:
    if every_layer:
        return ("16k", "262k")
    wide = site == "resid_post" or (site == "mlp_out" and size == "1b")
    return ("16k", "65k", "262k", "1m") if wide else ("16k", "65k", "262k")


def _one_layer(
    size: str,
    variant: str,
    site: str,
    every_layer: bool,
    layer: int,
    width: str,
    l0_name: str,
    affine: bool,
    seed: int = 0,
) -> Artifact:
    shape = SIZES[size]
    category = site + "_all" * every_layer
    leaf = f"layer_{layer}_width_{width}_l0_{l0_name}" + "_affine" * affine + f"_seed_{seed}" * bool(seed)
    d_in = shape.d_z if site == "attn_out" else shape.d_model
    kind: Kind = "sae" if site != "transcoder" else "skip_transcoder" if affine else "transcoder"
    reads, writes = _SITES[site]
    standing = _standing(f"{size}-{variant}", category, leaf, layer, width, l0_name, affine)
    release = f"gemma-scope-2-{size}-{variant}-{_SHORT[site]}" + "-all" * every_layer
    # SAELens names the transcoders of the four deep layers by their whole path, everything else by the last folder.
    entry = f"{category}/{leaf}" if category == "transcoder" else leaf
    registered = standing == "registered"
    source = _neuronpedia(size, variant, category, layer, width, l0_name, affine) if registered and not seed else None
    return Artifact(
        name=f"gemma-scope-2-{size}-{variant}/{category}/{leaf}",
        suite=SUITE,
        repo=_repo(size, variant),
        folder=f"{category}/{leaf}",
        model=_model(size, variant),
        category=category,
        kind=kind,
        reads=(Site(reads, layer),),
        writes=(Site(writes, layer),),
        width_name=width,
        width=WIDTHS[width],
        d_in=d_in,
        d_out=d_in if kind == "sae" else shape.d_model,
        d_sae=WIDTHS[width],
        l0_name=l0_name,
        l0=l0_target(layer, shape.n_layers, l0_name, every_layer=every_layer),
        standing=standing,
        seed=seed,
        saelens=(release, entry) if registered else None,
        neuronpedia=source,
        note="" if registered else "not in SAELens' registry; it may be missing on the hub",
    )


def _repo(size: str, variant: str) -> str:
    return f"google/gemma-scope-2-{size}-{variant}"


def _model(size: str, variant: str) -> str:
    return "google/gemma-3-270m" if (size, variant) == ("270m", "pt") else f"google/gemma-3-{size}-{variant}"


def _standing(repo: str, category: str, leaf: str, layer: int, width: str, l0_name: str, affine: bool) -> Standing:
    """What the registry lacks: most of two repositories, and five transcoders of 27b in each variant."""
    if repo == "270m-pt" and category == "transcoder":
        listed = leaf in ("layer_9_width_16k_l0_small_affine", "layer_15_width_262k_l0_big_affine")
    elif repo == "27b-pt" and category not in ("resid_post", "resid_post_all", "transcoder_all"):
        listed = False
    else:
        gap = repo.startswith("27b") and category == "transcoder_all" and width == "16k" and not affine
        listed = not (gap and (l0_name, layer) in _27B_GAPS)
    return "registered" if listed else "unregistered"


def _neuronpedia(
    size: str, variant: str, category: str, layer: int, width: str, l0_name: str, affine: bool
) -> str | None:
    """Model and source on Neuronpedia; no rule gives the ten layers of 4b-it's 16k transcoders, so they are a list."""
    repo = f"{size}-{variant}"
    model = f"gemma-3-{size}" + "-it" * (variant == "it")
    if category == "resid_post" and l0_name == "medium" and repo not in ("27b-pt", "12b-it"):
        wide_too = variant == "pt" or size == "27b"
        return f"{model}/{layer}-gemmascope-2-res-{width}" if width != "1m" or wide_too else None
    if category == "transcoder_all" and l0_name == "small" and affine and repo in ("4b-it", "27b-it"):
        shown = width == "262k" or (repo == "4b-it" and layer in _4B_IT_16K)
        return f"{model}/{layer}-gemmascope-2-transcoder-{width}" if shown else None
    return None


def _joint(size: str, variant: str) -> Iterator[Artifact]:
    for width in _JOINT_WIDTHS["crosscoder"]:
        for l0_name in JOINT_L0:
            yield _multi_layer(size, variant, "crosscoder", width, l0_name, False)
    for width in _JOINT_WIDTHS["clt"] if size in _CLT_SIZES else ():
        for l0_name in JOINT_L0:
            for affine in (False, True):
                yield _multi_layer(size, variant, "clt", width, l0_name, affine)


def _multi_layer(
    size: str, variant: str, kind: Literal["crosscoder", "clt"], width: str, l0_name: str, affine: bool
) -> Artifact:
    shape = SIZES[size]
    deep = "_".join(str(layer) for layer in shape.deep)
    layers = shape.deep if kind == "crosscoder" else range(shape.n_layers)
    prefix = f"layer_{deep}_" if kind == "crosscoder" else ""
    folder = f"{kind}/{prefix}width_{width}_l0_{l0_name}" + "_affine" * affine
    reads, writes = ("resid_post", "resid_post") if kind == "crosscoder" else ("mlp_in", "mlp_out")
    quoted = (f"{size}-{variant}", folder) in _QUOTED
    note = "" if quoted else "in the paper's table, but no listing of the repository has been seen"
    if l0_name == "medium":
        note += "; " * bool(note) + "L0 50 is the table's figure, no config.json has been seen"
    return Artifact(
        name=f"gemma-scope-2-{size}-{variant}/{folder}",
        suite=SUITE,
        repo=_repo(size, variant),
        folder=folder,
        model=_model(size, variant),
        category=kind,
        kind=kind,
        reads=tuple(Site(reads, layer) for layer in layers),
        writes=tuple(Site(writes, layer) for layer in layers),
        width_name=width,
        width=WIDTHS[width],
        d_in=shape.d_model,
        d_out=shape.d_model,
        d_sae=WIDTHS[width] // 4 if kind == "crosscoder" else latents_per_layer(WIDTHS[width], shape.n_layers),
        l0_name=l0_name,
        l0=JOINT_L0[l0_name],
        standing="quoted" if quoted else "announced",
        note=note,
    )
