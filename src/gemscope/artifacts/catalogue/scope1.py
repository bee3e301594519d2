"""The rules of Gemma Scope 1: nine repositories for Gemma 2, ``google/gemma-scope-{size}-{pt|it}-{site}``.

A folder there is named after the L0 that was *measured* (``layer_20/width_16k/average_l0_71``), which no rule gives.
The catalogue therefore has one ``canonical`` entry per layer and width: the L0 next to 100, found on the hub when it is
fetched. Any other is had by its full name, which is checked for form, not for existence.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from gemscope.artifacts.catalogue.artifact import WIDTHS, Artifact
from gemscope.core.sites import Site

SUITE: Literal["gemma-scope-1"] = "gemma-scope-1"
CANONICAL_L0 = 100


class _Size(NamedTuple):
    n_layers: int
    d_model: int
    d_z: int


_SIZES = {"2b": _Size(26, 2304, 2048), "9b": _Size(42, 3584, 4096), "27b": _Size(46, 4608, 4096)}

_ALL = None
_RELEASED: dict[tuple[str, str, str], dict[str, tuple[int, ...] | None]] = {
    ("2b", "pt", "res"): {
        "16k": _ALL,
        "32k": (12,),
        "65k": _ALL,
        "131k": (12,),
        "262k": (12,),
        "524k": (12,),
        "1m": (5, 12, 19),
    },
    ("2b", "pt", "mlp"): {"16k": _ALL, "65k": _ALL},
    ("2b", "pt", "att"): {"16k": _ALL, "65k": _ALL},
    ("2b", "pt", "transcoders"): {"16k": _ALL},
    ("9b", "pt", "res"): {
        "16k": _ALL,
        "32k": (20,),
        "65k": (20,),
        "131k": _ALL,
        "262k": (20,),
        "524k": (20,),
        "1m": (9, 20, 31),
    },
    ("9b", "pt", "mlp"): {"16k": _ALL, "131k": _ALL},
    ("9b", "pt", "att"): {"16k": _ALL, "131k": _ALL},
    ("9b", "it", "res"): {"16k": (9, 20, 31), "131k": (9, 20, 31)},
    ("27b", "pt", "res"): {"131k": (10, 22, 34)},
}
"""Size, variant and site of each repository -> width -> layers (None: every layer). The paper's Table 1."""

_NOT_CANONICAL = {("2b", "131k"), ("9b", "262k")}
"""Released, but left out of SAELens' canonical list."""
_EMBEDDING = {"2b": (6, 21, 44, 111), "9b": (7, 14, 22, 80)}
"""L0 of the SAEs on the embeddings, width 4k."""
_TIES = {("gemma-scope-9b-pt-att", "layer_27/width_16k"): 136}
"""Where two L0s are equally far from 100 and the canonical one is the larger."""

_SITES = {"res": ("resid_post",) * 2, "mlp": ("mlp_out",) * 2, "att": ("z",) * 2, "transcoders": ("mlp_in", "mlp_out")}
_FULL_NAME = re.compile(r"(gemma-scope-[\w-]+/layer_\d+/width_\w+)/average_l0_(\d+)")


def artifacts() -> Iterator[Artifact]:
    """One entry per layer and width, and the SAEs on the embeddings."""
    for (size, variant, site), widths in _RELEASED.items():
        for width, layers in widths.items():
            for layer in range(_SIZES[size].n_layers) if layers is None else layers:
                yield _one_layer(size, variant, site, width, layer)
        if (variant, site) == ("pt", "res"):
            yield from (_embedding(size, l0) for l0 in _EMBEDDING.get(size, ()))


def by_full_name(name: str, known: dict[str, Artifact]) -> Artifact | None:
    """The artefact of a name that ends in ``average_l0_N``, made from its canonical sibling; None if it has none."""
    match = _FULL_NAME.fullmatch(name)
    if match is None:
        return None
    sibling = known.get(f"{match[1]}/canonical") or known.get(match[1])
    if sibling is None:
        return None
    return at_l0(sibling, int(match[2]))


def at_l0(artifact: Artifact, l0: int) -> Artifact:
    """``artifact``, whose L0 was open, with the folder that was measured at ``l0``."""
    leaf = f"average_l0_{l0}"
    return replace(
        artifact,
        name=f"{artifact.repo.split('/')[1]}/{artifact.folder}/{leaf}",
        folder=f"{artifact.folder}/{leaf}",
        l0_name=str(l0),
        l0=l0,
        pick=None,
        note="",
        saelens=None,
        neuronpedia=None,
    )


def canonical_l0(artifact: Artifact, measured: Iterable[int]) -> int:
    """Of the L0s that the hub has for ``artifact``, the canonical one: next to 100, the smaller of two as near."""
    found = set(measured)
    tie = _TIES.get((artifact.repo.split("/")[1], artifact.folder))
    return tie if tie in found else min(found, key=lambda l0: (abs(l0 - CANONICAL_L0), l0))


def _one_layer(size: str, variant: str, site: str, width: str, layer: int) -> Artifact:
    shape = _SIZES[size]
    repo = f"gemma-scope-{size}-{variant}-{site}"
    folder = f"layer_{layer}/width_{width}"
    transcoder = site == "transcoders"
    reads, writes = _SITES[site]
    d_in = shape.d_z if site == "att" else shape.d_model
    listed = transcoder or site != "res" or (size, width) not in _NOT_CANONICAL
    model = f"gemma-2-{size}" + "-it" * (variant == "it")
    source = f"{layer}-gemmascope-{site.removesuffix('s') if transcoder else site}-{width}"
    return Artifact(
        name=f"{repo}/{folder}" if transcoder else f"{repo}/{folder}/canonical",
        suite=SUITE,
        repo=f"google/{repo}",
        folder=folder,
        model=f"google/{model}",
        category=site,
        kind="transcoder" if transcoder else "sae",
        reads=(Site(reads, layer),),
        writes=(Site(writes, layer),),
        width_name=width,
        width=WIDTHS[width],
        d_in=d_in,
        d_out=d_in if not transcoder else shape.d_model,
        d_sae=WIDTHS[width],
        l0_name="only" if transcoder else "canonical",
        l0=None,
        standing="registered" if listed else "unregistered",
        pick="only" if transcoder else "canonical",
        saelens=(f"{repo}-canonical", f"{folder}/canonical") if listed and not transcoder else None,
        neuronpedia=f"{model}/{source}" if listed else None,
        note="its L0 is read from the hub's folders",
    )


def _embedding(size: str, l0: int) -> Artifact:
    repo = f"gemma-scope-{size}-pt-res"
    folder = f"embedding/width_4k/average_l0_{l0}"
    return Artifact(
        name=f"{repo}/{folder}",
        suite=SUITE,
        repo=f"google/{repo}",
        folder=folder,
        model=f"google/gemma-2-{size}",
        category="res",
        kind="sae",
        reads=(Site("embed"),),
        writes=(Site("embed"),),
        width_name="4k",
        width=WIDTHS["4k"],
        d_in=_SIZES[size].d_model,
        d_out=_SIZES[size].d_model,
        d_sae=WIDTHS["4k"],
        l0_name=str(l0),
        l0=l0,
        standing="registered",
        saelens=(repo, folder),
    )
