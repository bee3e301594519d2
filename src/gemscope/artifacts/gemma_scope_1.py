"""The files of Gemma Scope (Lieberum et al. 2024): ``layer_20/width_16k/average_l0_71/params.npz``, and no config.

Notable:
- model, site and measured L0 are read off the path, or given by the caller;
- transcoders read the output of the norm before the MLP *without* its gain (``read_gain`` is False);
- the embedding SAEs take the rows of the embedding table, so their scale sqrt(d_model) is folded in for the site
  ``embed``, where the model has already multiplied by it, and out again when they are written;
- a ``scaling_factor`` of old files must be all ones.
"""

from pathlib import Path
from typing import Any

import torch

from gemscope.artifacts.config import AnyDictionary, DictionaryConfig, Loaded
from gemscope.artifacts.gemma_scope_paths import canonical, place_1
from gemscope.artifacts.making import lost_fields, make, single
from gemscope.artifacts.npz import read_npz, write_npz
from gemscope.artifacts.reading import Axes, check_finite, check_names, check_shapes, clamp_threshold
from gemscope.core.arrays import Tensor
from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import atomic_folder
from gemscope.core.sites import Site
from gemscope.dictionaries.single import SingleLayer

NAME = "gemma-scope-1"
WEIGHTS_FILE = "params.npz"

ARRAYS: dict[str, Axes] = {
    "W_enc": ("d_in", "d_sae"),
    "W_dec": ("d_sae", "d_out"),
    "b_enc": ("d_sae",),
    "b_dec": ("d_out",),
    "threshold": ("d_sae",),
}
"""Arrays of ``params.npz``; ``w_enc`` and ``w_dec`` are other spellings."""

_OLD = "scaling_factor"


def detect(path: Path) -> bool:
    """Whether ``path`` is such a folder or its ``params.npz``; ``.../canonical`` is the L0 closest to 100."""
    return path.suffix == ".npz" if path.is_file() else (canonical(path) / WEIGHTS_FILE).is_file()


def load(path: Path | str, *, site: Site | None = None, model: str | None = None) -> Loaded:
    """Read a folder or a ``.npz`` file; ``site`` (that is read) and ``model`` are needed where the path is not the
    release's, and win over it.

    A site ``mlp_in`` means a transcoder. Raises FormatError when the file is damaged, has other arrays, or nothing says
    where it belongs.
    """
    file = Path(path) if Path(path).is_file() else canonical(Path(path)) / WEIGHTS_FILE
    place = place_1(file.parent)
    reads = place.reads[0] if site is None and place.reads is not None else site
    if reads is None or (name := model or place.model) is None:
        missing = "site" if reads is None else "model"
        raise FormatError(
            f"{file} has no config, and its path does not name the {missing}; name it, as in"
            f" {'--site resid_post.20' if reads is None else '--model google/gemma-2-2b'}."
        )
    writes = Site("mlp_out", reads.layer) if reads.name == "mlp_in" else reads
    found = read_npz(file)
    tensors, names = _renamed(found, file)
    threshold, warnings = clamp_threshold(tensors["threshold"], file)
    weights = (tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], threshold)
    if reads.name == "embed":
        weights = _scaled(weights, weights[0].shape[0] ** 0.5)
        warnings += (
            "an embedding SAE: its scale sqrt(d_model) was folded in, for embeddings as the model reads them.",
        )
    dictionary = make(file, lambda: single(weights, None, is_sae=reads == writes))
    if place.width is not None and place.width != dictionary.d_sae:
        warnings += (f"the path of {file} says {place.width} latents, the arrays have {dictionary.d_sae}.",)
    gain = reads.name != "mlp_in"
    kept = {NAME: {"names": names}}
    config = DictionaryConfig.of(dictionary, reads, writes, model=name, l0=place.l0, read_gain=gain, extra=kept)
    return Loaded(dictionary, config, NAME, warnings)


def _renamed(found: dict[str, Tensor], file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The arrays by their usual names, and the names they had; raises FormatError for others."""
    names = {name: f"W_{name[2:]}" if name in ("w_enc", "w_dec") else name for name in found}
    if len(set(names.values())) != len(names):
        raise FormatError(f"{file} holds one array under two names ({', '.join(sorted(found))}); fetch it again.")
    tensors = {names[name]: check_finite(tensor, name, file) for name, tensor in found.items()}
    check_names(tensors, ARRAYS, (_OLD,), file)
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, ARRAYS | {_OLD: ("d_sae",)}, file)
    factor = tensors.pop(_OLD, torch.ones(()))
    if not bool((factor == 1).all()):
        raise FormatError(
            f"{_OLD} in {file} is not all ones; no Gemma Scope dictionary scales its latents, fetch it again."
        )
    return tensors, [name for name in found if name != _OLD]


def _scaled(
    weights: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From a dictionary for x / scale to the same one for x, with the same activations."""
    W_enc, b_enc, W_dec, b_dec, threshold = weights
    return W_enc / scale, b_enc, W_dec * scale, b_dec * scale, threshold


def save(folder: Path | str, dictionary: AnyDictionary, config: DictionaryConfig) -> tuple[str, ...]:
    """Write ``params.npz``; returns what has no place in it, one sentence each.

    What the format says by its path alone (model, site, L0) is only kept when ``folder`` is named like the release.
    Raises InputError for kinds and inputs that Gemma Scope 1 does not have.
    """
    if not isinstance(dictionary, SingleLayer) or dictionary.W_skip is not None or dictionary.activation.kind == "topk":
        raise InputError(
            f"Gemma Scope 1 has SAEs and transcoders with thresholds, no {config.kind} with"
            f" {dictionary.activation.kind}; convert to 'gemscope'."
        )
    if config.kind == "transcoder" and (config.read_gain or config.site.name != "mlp_in"):
        raise InputError(
            "the transcoders of Gemma Scope 1 read mlp_in without the norm's gain; fold the inverse of the model's gain"
            " in first (fold_input_gain), or convert to 'gemma-scope-2'."
        )
    place = place_1(Path(folder))
    said = {"model": place.model == config.model, "site": place.reads == config.reads, "l0": place.l0 == config.l0}
    absent = [*(name for name, kept in said.items() if not kept), "revision", "prefixes", "k", "provenance", "extra"]
    losses = lost_fields(config, NAME, absent)
    if dictionary.activation.kind == "relu":
        losses += ("the ReLU is written as a JumpReLU with thresholds of 0: the same function.",)
    threshold = torch.zeros_like(dictionary.b_enc) if dictionary.threshold is None else dictionary.threshold
    weights = (dictionary.W_enc, dictionary.b_enc, dictionary.W_dec, dictionary.b_dec, threshold)
    if config.site.name == "embed":
        weights = _scaled(weights, dictionary.d_in**-0.5)
    tensors: dict[str, Tensor] = dict(zip(("W_enc", "b_enc", "W_dec", "b_dec", "threshold"), weights, strict=True))
    with atomic_folder(folder) as temporary:
        write_npz(temporary / WEIGHTS_FILE, {spelt: tensors[usual] for spelt, usual in _order(config)})
    return losses


def _order(config: DictionaryConfig) -> list[tuple[str, str]]:
    """The arrays as they were named and ordered in the file that was read, or as usual."""
    kept: Any = (config.extra.get(NAME) or {}).get("names")
    usual = {name: f"W_{name[2:]}" if name in ("w_enc", "w_dec") else name for name in kept or ARRAYS}
    return list(usual.items()) if set(usual.values()) == set(ARRAYS) else [(name, name) for name in ARRAYS]
