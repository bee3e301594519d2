"""The folders of SAELens 6: ``cfg.json`` beside ``sae_weights.safetensors``; see docs/formats.md for what is read.

Notable:
- what SAELens does when it runs is folded into the weights, so that the dictionary applies to raw activations:
  ``apply_b_dec_to_input`` and ``rescale_acts_by_decoder_norm``; what cannot be folded (a norm of each row) is refused;
- ``W_skip`` is [d_out, d_in] there and [d_in, d_out] here;
- the Hugging Face hook in its metadata is believed over the TransformerLens one, which for the transcoders of Gemma
  Scope 2 names another tensor.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gemscope.artifacts.config import AnyDictionary, DictionaryConfig, Loaded
from gemscope.artifacts.hooks import hook_point, read_hook_point, read_tl_hook
from gemscope.artifacts.making import lost_fields, make, single
from gemscope.artifacts.reading import Axes, clamp_threshold, mapping, number, shown, take, text, whole
from gemscope.artifacts.saelens_config import current
from gemscope.core.arrays import Tensor
from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import atomic_folder, read_json, write_tensors, write_text
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation, Kind
from gemscope.dictionaries.single import SingleLayer

NAME = "saelens"
CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"

TENSORS: dict[str, Axes] = {
    "W_enc": ("d_in", "d_sae"),
    "b_enc": ("d_sae",),
    "W_dec": ("d_sae", "d_out"),
    "b_dec": ("d_out",),
}
"""Tensors of every architecture that is read."""

THRESHOLD: dict[str, Axes] = {"threshold": ("d_sae",)}
SKIP: dict[str, Axes] = {"W_skip": ("d_out", "d_in")}

ARCHITECTURES: dict[str, tuple[Kind, dict[str, Axes]]] = {
    "standard": ("relu", TENSORS),
    "jumprelu": ("jumprelu", TENSORS | THRESHOLD),
    "topk": ("topk", TENSORS),
    "batchtopk": ("batchtopk", TENSORS | {"topk_threshold": ()}),
    "matryoshka_batchtopk": ("batchtopk", TENSORS | {"topk_threshold": ()}),
    "transcoder": ("relu", TENSORS),
    "skip_transcoder": ("relu", TENSORS | SKIP),
    "jumprelu_transcoder": ("jumprelu", TENSORS | THRESHOLD),
    "jumprelu_skip_transcoder": ("jumprelu", TENSORS | THRESHOLD | SKIP),
}
"""Activation and tensors of each architecture; the BatchTopK ones are training checkpoints."""

_WRITTEN = {
    ("sae", "relu"): "standard",
    ("sae", "jumprelu"): "jumprelu",
    ("sae", "batchtopk"): "jumprelu",
    ("sae", "topk"): "topk",
    ("transcoder", "relu"): "transcoder",
    ("transcoder", "jumprelu"): "jumprelu_transcoder",
    ("transcoder", "batchtopk"): "jumprelu_transcoder",
    ("skip_transcoder", "relu"): "skip_transcoder",
    ("skip_transcoder", "jumprelu"): "jumprelu_skip_transcoder",
    ("skip_transcoder", "batchtopk"): "jumprelu_skip_transcoder",
}
_REFUSED = {
    "gated": "a gated SAE has two encoders, one that chooses and one that weighs, which no threshold expresses",
    "temporal": "a temporal SAE looks at several tokens at once",
    "matching_pursuit": "matching pursuit has no encoder of its own",
    "abstopk": "AbsTopK activations may be negative",
}
_BY_ROW = ("layer_norm", "constant_norm_rescale")


def detect(path: Path) -> bool:
    """Whether ``path`` is such a folder, or a file of one."""
    return (path.parent if path.is_file() else path).joinpath(CONFIG_FILE).is_file()


def load(path: Path | str, *, site: Site | None = None, model: str | None = None) -> Loaded:
    """Read a folder; ``site`` (that is read) and ``model`` replace what its metadata say.

    Raises FormatError when a file is missing or damaged, for an architecture or a normalisation that cannot be
    expressed, and when nothing says where the dictionary belongs.
    """
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    where = folder / CONFIG_FILE
    raw = mapping(read_json(where), where)
    cfg = current(raw, where)
    architecture = text(cfg["architecture"], "architecture", where)
    if architecture in _REFUSED:
        raise FormatError(f"{where} is of architecture {architecture!r}, which is not read: {_REFUSED[architecture]}.")
    if architecture not in ARCHITECTURES:
        raise FormatError(f"{where} is of architecture {architecture!r}; gemscope reads {', '.join(ARCHITECTURES)}.")
    notes = _normalisation(cfg, where)
    kind, layout = ARCHITECTURES[architecture]
    optional: dict[str, Axes] = {name: ("d_sae",) for name in ("scaling_factor", "finetuning_scaling_factor")}
    tensors, metadata, odd = take(folder / WEIGHTS_FILE, layout, optional)
    for name in optional:
        if not bool((tensors.pop(name, torch.ones(())) == 1).all()):
            raise FormatError(
                f"{name} in {folder / WEIGHTS_FILE} is not all ones; fold it into W_dec with SAELens first."
            )
    _check_sizes(cfg, tensors, where)
    folded = _fold(cfg, tensors, is_sae="transcoder" not in architecture)
    activation = _activation(kind, cfg, where)
    threshold, clamped = _threshold(kind, tensors, folder / WEIGHTS_FILE)
    weights = (tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], threshold)
    skip = tensors["W_skip"].T.contiguous() if "W_skip" in tensors else None
    is_sae, prefixes = "transcoder" not in architecture, _prefixes(cfg, where)
    dictionary = make(folder, lambda: single(weights, skip, is_sae=is_sae, activation=activation, prefixes=prefixes))
    about, doubts = _about(cfg, where, is_sae=is_sae, site=site, model=model)
    kept = {NAME: {"config": raw, "metadata": metadata}} if not folded else {NAME: {"metadata": metadata}}
    extra = {**about.pop("extra", {}), **kept}
    config = DictionaryConfig.of(dictionary, **about, extra=extra)
    return Loaded(dictionary, config, NAME, (*notes, *odd, *folded, *clamped, *doubts))


def _normalisation(cfg: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    """What is odd about the normalisation; raises FormatError for one that depends on the row."""
    name = cfg.get("normalize_activations") or "none"
    if name in _BY_ROW:
        raise FormatError(f"{where} normalises each row ({name}), which weights cannot express; train without it.")
    if name == "none":
        return ()
    if name not in ("expected_average_only_in", "covariance_whitening"):
        raise FormatError(f"'normalize_activations' in {where} is {shown(name)}, which is not known; use 'none'.")
    return (f"{where} says {name}, which SAELens does not apply when it runs a dictionary: it was read as folded in.",)


def _check_sizes(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path) -> None:
    sizes = {"d_in": tensors["W_enc"].shape[0], "d_sae": tensors["W_enc"].shape[1]}
    if "d_out" in cfg:
        sizes["d_out"] = tensors["W_dec"].shape[1]
    for name, size in sizes.items():
        if whole(cfg.get(name), name, where) != size:
            raise FormatError(
                f"{name!r} in {where} is {cfg[name]}, but the tensors have {size}; the files do not belong."
            )


def _fold(cfg: Mapping[str, Any], tensors: dict[str, Tensor], *, is_sae: bool) -> tuple[str, ...]:
    """Fold what SAELens does around the weights into them, in float64; says what was folded."""
    done: list[str] = []
    dtype = tensors["W_enc"].dtype
    if is_sae and cfg.get("apply_b_dec_to_input", True):
        shift = tensors["b_dec"].double() @ tensors["W_enc"].double()
        tensors["b_enc"] = (tensors["b_enc"].double() - shift).to(dtype)
        done.append("b_dec is subtracted from the input there (apply_b_dec_to_input); it was folded into b_enc.")
    if cfg.get("rescale_acts_by_decoder_norm", False):
        norms = tensors["W_dec"].double().norm(dim=1)
        if not bool((norms > 0).all()):
            raise FormatError(
                "a decoder row is zero, and activations are divided by its norm; remove that latent first."
            )
        tensors["W_enc"] = (tensors["W_enc"].double() * norms).to(dtype)
        tensors["b_enc"] = (tensors["b_enc"].double() * norms).to(dtype)
        tensors["W_dec"] = (tensors["W_dec"].double() / norms[:, None]).to(dtype)
        done.append("activations count in units of the decoder row there; its norm was folded into the encoder.")
    return tuple(done)


def _activation(kind: Kind, cfg: Mapping[str, Any], where: Path) -> Activation:
    if kind == "relu" or kind == "jumprelu":
        return Activation(kind)
    k = number(cfg.get("k"), "k", where)
    return make(where, lambda: Activation(kind, k))


def _threshold(kind: str, tensors: Mapping[str, Tensor], where: Path) -> tuple[Tensor | None, tuple[str, ...]]:
    if kind == "jumprelu":
        return clamp_threshold(tensors["threshold"], where)
    if kind == "batchtopk":
        return clamp_threshold(tensors["topk_threshold"].expand(tensors["b_enc"].shape).clone(), where)
    return None, ()


def _prefixes(cfg: Mapping[str, Any], where: Path) -> tuple[int, ...]:
    """Matryoshka widths: those of a training checkpoint, or those that gemscope wrote down."""
    ours = _ours(cfg)
    given = cfg.get("matryoshka_widths") or ours.get("prefixes") or ()
    if not isinstance(given, list | tuple):
        raise FormatError(f"the Matryoshka widths in {where} are {shown(given)}; they should be a list.")
    widths = [whole(width, "matryoshka_widths", where) for width in given]
    return tuple(width for width in widths if width < whole(cfg["d_sae"], "d_sae", where))


def _ours(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """What gemscope itself wrote into the metadata."""
    found = cfg["metadata"].get("gemscope")
    return found if isinstance(found, dict) else {}


def _about(
    cfg: Mapping[str, Any], where: Path, *, is_sae: bool, site: Site | None, model: str | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of a DictionaryConfig that the metadata give, and what is doubtful about them."""
    meta, ours, gain, doubts = cfg["metadata"], _ours(cfg), True, ()
    if (reads := site) is None:
        reads, gain, doubts = _site(meta.get("hf_hook_name"), meta.get("hook_name"), where)
    writes = reads
    if not is_sae:
        out, hf_out = meta.get("hook_name_out"), meta.get("hf_hook_name_out")
        if out is None and hf_out is None:
            writes = Site("mlp_out", reads.layer)
            doubts = (*doubts, f"{where} does not say what is written; {writes} was taken.")
        else:
            writes = _site(hf_out, out, where)[0]
    if meta.get("prepend_bos") is False:
        doubts = (*doubts, f"{where} was trained on texts without <bos>; gemscope always puts one in front.")
    name = model or text(meta.get("model_name"), "model_name", where)
    about: dict[str, Any] = {"reads": reads, "writes": writes, "model": name, "read_gain": gain}
    about["l0"] = number(ours.get("l0"), "l0", where)
    if isinstance(revision := ours.get("revision"), str):
        about["revision"] = revision
    if isinstance(provenance := ours.get("provenance"), dict):
        about["provenance"] = provenance
    if isinstance(extra := ours.get("extra"), dict):
        about["extra"] = extra
    return about, doubts


def _site(hf: object, tl: object, where: Path) -> tuple[Site, bool, tuple[str, ...]]:
    """The site of the two hook names; the Hugging Face one wins."""
    if hf is None:
        return read_tl_hook(tl, where)
    (site,) = read_hook_point(hf, None, where)
    try:
        other, gain, _ = read_tl_hook(tl, where)
    except FormatError:
        return site, True, ()
    if (other, gain) == (site, True):
        return site, True, ()
    return site, True, (f"{where} names {tl}, which is not {hf}; the latter was believed.",)


def save(folder: Path | str, dictionary: AnyDictionary, config: DictionaryConfig) -> tuple[str, ...]:
    """Write a folder; returns what the format cannot hold, one sentence each.

    Raises InputError for a kind that SAELens does not have.
    """
    architecture = _WRITTEN.get((config.kind, config.activation.kind))
    if not isinstance(dictionary, SingleLayer) or architecture is None:
        raise InputError(f"SAELens has no {config.kind} with {config.activation.kind}; convert to 'gemscope'.")
    kept: Mapping[str, Any] = config.extra.get(NAME) or {}
    derived = _describe(dictionary, config, architecture)
    raw: Mapping[str, Any] | None = kept.get("config")
    tensors: dict[str, Tensor] = {
        "W_enc": dictionary.W_enc,
        "b_enc": dictionary.b_enc,
        "W_dec": dictionary.W_dec,
        "b_dec": dictionary.b_dec,
    }
    if dictionary.threshold is not None:
        tensors["threshold"] = dictionary.threshold
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip.T
    with atomic_folder(folder) as temporary:
        chosen = raw if raw is not None and _agree(raw, derived) else derived
        write_text(temporary / CONFIG_FILE, json.dumps(chosen, allow_nan=False))
        write_tensors(temporary / WEIGHTS_FILE, tensors, kept.get("metadata"))
    return lost_fields(config, NAME, ("k",))


def _describe(dictionary: SingleLayer, config: DictionaryConfig, architecture: str) -> dict[str, Any]:
    """``cfg.json`` as SAELens 6 writes it."""
    found: dict[str, Any] = {
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "dtype": "bfloat16" if dictionary.dtype == torch.bfloat16 else "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if architecture == "topk":
        found |= {"k": dictionary.activation.top, "rescale_acts_by_decoder_norm": False}
    if config.kind != "sae":
        found["d_out"] = dictionary.d_out
    extra = {name: value for name, value in config.extra.items() if name != NAME}
    ours = {
        "revision": config.revision,
        "l0": config.l0,
        "prefixes": list(config.prefixes),
        "provenance": dict(config.provenance),
        "extra": extra,
    }
    metadata: dict[str, Any] = {"sae_lens_version": "6.54.12", "model_name": config.model, "prepend_bos": True}
    reads, writes = config.reads[0], config.writes[0]
    if config.read_gain:
        metadata |= {"hook_name": reads.tl_name, "hf_hook_name": hook_point(config.reads)}
    else:
        metadata["hook_name"] = f"blocks.{reads.layer}.{'ln2' if reads.name == 'mlp_in' else 'ln1'}.hook_normalized"
    if config.kind != "sae":
        metadata |= {"hook_name_out": writes.tl_name, "hf_hook_name_out": hook_point(config.writes)}
    metadata["gemscope"] = {name: value for name, value in ours.items() if value}
    return found | {"metadata": metadata, "architecture": architecture}


def _agree(raw: Mapping[str, Any], derived: Mapping[str, Any]) -> bool:
    """Whether a config that was read before still describes the same weights at the same place."""
    raw_meta, meta = raw.get("metadata"), derived["metadata"]
    if not isinstance(raw_meta, dict) or any(raw.get(name) != derived[name] for name in derived if name != "metadata"):
        return False
    names = ("model_name", "hook_name", "hf_hook_name", "hook_name_out", "hf_hook_name_out", "gemscope")
    ours = {name: meta.get(name) for name in names if name in raw_meta}
    return all(raw_meta[name] == ours[name] or (name == "hook_name" and "hf_hook_name" in raw_meta) for name in ours)
