"""The whole catalogue: all entries, one by its name, many by what they are.

``find`` reads the catalogue's own names, hub paths (``google/...``), SAELens' ``release/id`` and Neuronpedia's
``model/source``. ``select`` takes a ``Query``, whose fields narrow the choice together.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from gemscope.artifacts.catalogue import scope1, scope2
from gemscope.artifacts.catalogue.artifact import KINDS, WIDTHS, Artifact
from gemscope.core.errors import ArtifactNotFoundError, InputError
from gemscope.core.sites import SITE_KINDS

_WILD = re.compile(r"[*?\[]")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Query:
    """What to choose; a field that is None or empty chooses everything."""

    model: str | None = None
    """``1b-it``, ``gemma-3-1b-it``, ``google/gemma-3-1b-it``, or the repository's name."""
    site: str | None = None
    """Where it reads: ``resid_post``, ``z``, ``mlp_in``, ``mlp_out``, ``embed``."""
    category: str | None = None
    """A folder of the release: ``resid_post_all``; of Gemma Scope 1: ``res``, ``mlp``, ``att``, ``transcoders``."""
    layers: tuple[int, ...] = ()
    """Any of these; a dictionary of several layers must read one of them."""
    width: str | None = None
    """``65k`` or ``65536``."""
    l0: str | None = None
    """A name (``small``, ``medium``, ``big``, ``canonical``) or a target (``60``)."""
    kind: str | None = None
    affine: bool | None = None
    names: tuple[str, ...] = ()
    """Names, or patterns such as ``gemma-scope-2-1b-pt/resid_post/layer_*_width_16k_l0_medium``."""


@cache
def catalogue() -> tuple[Artifact, ...]:
    """Every released dictionary; Gemma Scope 2 first, each repository in one piece."""
    return (*scope2.artifacts(), *scope1.artifacts())


@cache
def _by_name() -> dict[str, Artifact]:
    return {artifact.name: artifact for artifact in catalogue()}


@cache
def _by_repo() -> dict[str, list[str]]:
    repos: dict[str, list[str]] = {}
    for name in _by_name():
        repos.setdefault(name.split("/")[0], []).append(name)
    return repos


@cache
def _by_alias() -> dict[str, Artifact]:
    aliases: dict[str, Artifact] = {}
    for artifact in catalogue():
        if artifact.saelens is not None:
            aliases["/".join(artifact.saelens)] = artifact
        if artifact.neuronpedia is not None:
            aliases[artifact.neuronpedia] = artifact
    return aliases


def find(name: str) -> Artifact:
    """The artefact of that name.

    Raises ArtifactNotFoundError, with the names that look most like it.
    """
    text = name.strip().strip("/").removeprefix("google/")
    found = _by_name().get(text) or _by_alias().get(text) or scope1.by_full_name(text, _by_name())
    if found is not None:
        return found
    siblings = _by_repo().get(text.split("/")[0]) or list(_by_repo())
    like = difflib.get_close_matches(text[:200], siblings, 3, 0.5)
    hint = f"the nearest are {', '.join(like)}" if like else "gemscope list shows what there is"
    raise ArtifactNotFoundError(f"no released dictionary is called {name!r}; {hint}.")


def select(query: Query) -> tuple[Artifact, ...]:
    """Everything that fits all fields of ``query``, in the order of the catalogue; each once.

    Raises ArtifactNotFoundError for a name that is not there or a pattern that fits nothing, InputError for a value
    that no artefact can have. The result may be empty when the fields exclude one another.
    """
    pool = _named(query.names) if query.names else catalogue()
    model = None if query.model is None else _model(query.model)
    site = None if query.site is None else _site(query.site)
    category = None if query.category is None else _category(query.category)
    width = None if query.width is None else _width(query.width)
    kind = None if query.kind is None else _kind(query.kind)
    l0 = None if query.l0 is None else _l0(query.l0)
    layers = set(query.layers)
    return tuple(
        artifact
        for artifact in pool
        if (model is None or _model_key(artifact) == model)
        and (site is None or artifact.reads[0].name == site)
        and (category is None or artifact.category == category)
        and (not layers or not layers.isdisjoint(artifact.layers))
        and (width is None or artifact.width == width)
        and (kind is None or artifact.kind == kind)
        and (l0 is None or l0 in (artifact.l0_name, artifact.l0))
        and (query.affine is None or artifact.affine == query.affine)
    )


def parse_layers(words: Iterable[str]) -> tuple[int, ...]:
    """``["3", "7-9,12"]`` -> (3, 7, 8, 9, 12). Raises InputError."""
    layers: set[int] = set()
    for part in (part.strip() for word in words for part in word.split(",")):
        match = _RANGE.fullmatch(part)
        if match is None or len(part) > 9:
            raise InputError(f"cannot read the layers {part!r}; write a number or a range, as in 9 or 0-5.")
        layers.update(range(int(match[1]), min(int(match[2] or match[1]), 999) + 1))
    return tuple(sorted(layers))


def _named(names: Iterable[str]) -> tuple[Artifact, ...]:
    chosen: dict[str, Artifact] = {}
    for name in names:
        if not _WILD.search(name):
            found = find(name)
            chosen[found.name] = found
            continue
        pattern = name.removeprefix("google/")
        fitting = {artifact.name: artifact for artifact in catalogue() if fnmatchcase(artifact.name, pattern)}
        if not fitting:
            raise ArtifactNotFoundError(
                f"no released dictionary fits the pattern {name!r}; a pattern covers the whole name, as in"
                " 'gemma-scope-2-1b-pt/resid_post/*'."
            )
        chosen |= fitting
    order = {artifact.name: i for i, artifact in enumerate(catalogue())}
    return tuple(sorted(chosen.values(), key=lambda artifact: (order.get(artifact.name, len(order)), artifact.name)))


def _model_key(artifact: Artifact) -> str:
    """``3-1b-pt``, ``2-9b-it``: generation, size, variant."""
    parts = artifact.repo.split("/")[1].removeprefix("gemma-scope-").split("-")
    return "-".join(("3", *parts[1:3]) if artifact.suite == scope2.SUITE else ("2", *parts[:2]))


@cache
def _models() -> dict[str, str]:
    """Every spelling of a model -> its key; the first of two models of a size (27b) is the one of Gemma 3."""
    spellings: dict[str, str] = {}
    for artifact in catalogue():
        key = _model_key(artifact)
        generation, size, variant = key.split("-")
        gemma = f"gemma-{generation}-{size}"
        names = [f"{size}-{variant}", f"{gemma}-{variant}", artifact.repo.split("/")[1]]
        for name in names + ([size, gemma] if variant == "pt" else []):
            spellings.setdefault(name, key)
    return spellings


def _model(text: str) -> str:
    found = _models().get(text.strip().lower().split("/")[-1])
    if found is not None:
        return found
    sizes = ", ".join(f"{size}-{variant}" for size in scope2.SIZES for variant in ("pt", "it"))
    raise InputError(
        f"there are no released dictionaries for a model {text!r}; of Gemma 3 there are {sizes}, of Gemma 2"
        " gemma-2-2b, gemma-2-9b, gemma-2-9b-it and gemma-2-27b."
    )


def _site(text: str) -> str:
    known = sorted({artifact.reads[0].name for artifact in catalogue()}, key=list(SITE_KINDS).index)
    if text in known:
        return text
    if text in ("attn_out", "attn_out_all"):
        raise InputError(
            f"the folder {text!r} of Gemma Scope holds dictionaries of the site z (the heads' outputs, before the"
            f" output projection); use --site z, or --category {text}."
        )
    raise InputError(f"no released dictionary reads the site {text!r}; there are {', '.join(known)}.")


def _category(text: str) -> str:
    return _one_of(text, list(dict.fromkeys(artifact.category for artifact in catalogue())), "category")


def _kind(text: str) -> str:
    return _one_of(text.replace("-", "_"), KINDS, "kind")


def _width(text: str) -> int:
    plain = text.strip().lower().replace(",", "").replace("_", "")
    if plain in WIDTHS:
        return WIDTHS[plain]
    if plain.isdecimal() and len(plain) < 12 and int(plain) in WIDTHS.values():
        return int(plain)
    raise InputError(f"no released dictionary has the width {text!r}; there are {', '.join(WIDTHS)}.")


def _l0(text: str) -> str | int:
    plain = text.strip().lower()
    if plain.isdecimal() and len(plain) < 6:
        return int(plain)
    return _one_of(plain, (*scope2.L0_NAMES, "canonical"), "L0")


def _one_of(text: str, known: Iterable[str], what: str) -> str:
    if text not in (known := list(known)):
        raise InputError(f"no released dictionary has the {what} {text!r}; there are {', '.join(known)}.")
    return text
