"""The folders of circuit-tracer: ``config.yaml`` with a transcoder per layer (``layer_{i}.safetensors``), or with the
encoders and decoders of a CLT (``W_enc_{i}.safetensors``, ``W_dec_{i}.safetensors``).

Notable:
- encoders are stored as rows [d_sae, d_in];
- the ``W_skip`` of a single layer is [d_out, d_in], that of a CLT [d_in, d_out];
- a set holds as many dictionaries as it has layers: ``load_set``, or ``load`` of one of its files;
- what is not in these files is asked for: a config whose ``transcoders`` point into other repositories is refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from gemscope.artifacts.config import AnyDictionary, DictionaryConfig, Loaded
from gemscope.artifacts.hooks import read_tl_hook
from gemscope.artifacts.making import lost_fields, make, single
from gemscope.artifacts.reading import Axes, check_shapes, clamp_threshold, mapping, shown, take, text, whole
from gemscope.core.arrays import Tensor
from gemscope.core.errors import FormatError, InputError, reason
from gemscope.core.files import atomic_folder, write_tensors, write_text
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import JUMPRELU, Activation
from gemscope.dictionaries.multilayer import CrossLayerTranscoder
from gemscope.dictionaries.single import SingleLayer

NAME = "circuit-tracer"
CONFIG_FILE = "config.yaml"
LAYER_FILE = "layer_{}.safetensors"
ENCODER_FILE = "W_enc_{}.safetensors"
DECODER_FILE = "W_dec_{}.safetensors"
SET, CLT = "transcoder_set", "cross_layer_transcoder"

LAYER: dict[str, Axes] = {
    "W_enc": ("d_sae", "d_in"),
    "b_enc": ("d_sae",),
    "W_dec": ("d_sae", "d_out"),
    "b_dec": ("d_out",),
}
"""Tensors of ``layer_{i}.safetensors``."""

LAYER_MORE: dict[str, Axes] = {
    "activation_function.threshold": ("d_sae",),
    "threshold": ("d_sae",),
    "W_skip": ("d_out", "d_in"),
}
"""Those that it may hold: one of the two thresholds, which are one thing, and a skip connection."""

ENCODER: dict[str, Axes] = {"W_enc_{}": ("d_sae", "d_in"), "b_enc_{}": ("d_sae",), "b_dec_{}": ("d_out",)}
ENCODER_MORE: dict[str, Axes] = {"threshold_{}": ("d_sae",), "W_skip_{}": ("d_in", "d_out")}
DECODER: dict[str, Axes] = {"W_dec_{}": ("d_sae", "layers", "d_out")}

_MOST = 1000
_CONFIG_BYTES = 1 << 20
_BRACKETS = 200
_HOOKS = {
    "mlp_in": "mlp.hook_in",
    "resid_mid": "hook_resid_mid",
    "mlp_out": "hook_mlp_out",
    "mlp_out_raw": "mlp.hook_out",
}
_NO_GAIN = "ln2.hook_normalized"


def detect(path: Path) -> bool:
    """Whether ``path`` is such a folder, or a file of one."""
    return (path.parent if path.is_file() else path).joinpath(CONFIG_FILE).is_file()


def is_set(path: Path) -> bool:
    """Whether ``path`` is the folder of a set of transcoders, rather than of a CLT; raises FormatError."""
    return path.is_dir() and _read_config(path)["model_kind"] == SET


def load(path: Path | str, *, site: Site | None = None, model: str | None = None) -> Loaded:
    """Read a CLT's folder, or one file ``layer_{i}.safetensors`` of a set.

    ``site`` is what a transcoder reads. Raises FormatError when a file is missing or damaged, and for the folder of a
    set with more than one layer, which ``load_set`` reads.
    """
    path = Path(path)
    if path.is_file() and path.name not in (CONFIG_FILE, ENCODER_FILE.format(0)):
        return _load_layer(path.parent, _read_config(path.parent), path, site, model)
    folder = path.parent if path.is_file() else path
    config = _read_config(folder)
    if config["model_kind"] == CLT:
        return _load_clt(folder, config, model)
    files = _layer_files(folder)
    if len(files) != 1:
        raise FormatError(f"{folder} is a set of {len(files)} transcoders; name one of them, as in {files[0]}.")
    return _load_layer(folder, config, files[0], site, model)


def load_set(folder: Path | str, *, model: str | None = None) -> tuple[Loaded, ...]:
    """Every transcoder of a set, by layer; raises FormatError as ``load`` does."""
    folder = Path(folder)
    config = _read_config(folder)
    if config["model_kind"] != SET:
        raise FormatError(f"{folder} is a cross-layer transcoder, which is one dictionary; load it as that.")
    return tuple(_load_layer(folder, config, file, None, model) for file in _layer_files(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        with path.open("rb") as file:
            written = file.read(_CONFIG_BYTES)
        if written.count(b"[") + written.count(b"{") > _BRACKETS:
            raise FormatError(f"{path} is nested or cut up far more than any config is; write it again.")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(written, yaml.SafeLoader)):
            raise FormatError(f"{path} repeats parts of itself by aliases, which no such config needs; write it again.")
        found = yaml.safe_load(written)
    except OSError as error:
        raise FormatError(f"cannot read {path} ({error.strerror}); check the path.") from error
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, AttributeError) as error:
        raise FormatError(f"{path} is not valid YAML ({reason(error)}); write or fetch it again.") from error
    config = mapping(found, path)
    if config.get("model_kind") not in (SET, CLT):
        raise FormatError(
            f"'model_kind' in {path} is {shown(config.get('model_kind'))}; it should be {SET!r} or {CLT!r}."
        )
    if config.get("transcoders"):
        raise FormatError(
            f"{path} only lists files that lie elsewhere ('transcoders'); fetch those, which are in another format."
        )
    return config


def _layer_files(folder: Path) -> list[Path]:
    found = sorted((layer, path) for path in folder.glob("layer_*.safetensors") if (layer := _layer(path)) is not None)
    if not found:
        raise FormatError(f"{folder} has no {LAYER_FILE.format(0)}; fetch the weights too.")
    return [path for _, path in found]


def _layer(path: Path) -> int | None:
    digits = path.name.removeprefix("layer_").removesuffix(".safetensors")
    return int(digits) if digits.isdecimal() and digits.isascii() and len(digits) <= 4 else None


def _load_layer(folder: Path, config: Mapping[str, Any], file: Path, site: Site | None, model: str | None) -> Loaded:
    if (layer := _layer(file)) is None:
        raise FormatError(f"{file} is no file of a transcoder set; they are named like {LAYER_FILE.format(3)}.")
    tensors, metadata, odd = take(file, LAYER, LAYER_MORE)
    names = [name for name in ("activation_function.threshold", "threshold") if name in tensors]
    if len(names) == 2:
        raise FormatError(f"{file} has two thresholds ({' and '.join(names)}); fetch it again.")
    threshold, clamped = clamp_threshold(tensors[names[0]], file) if names else (None, ())
    activation = _activation(config, folder, has_threshold=threshold is not None)
    reads, gain, doubts = _hook(config, "feature_input_hook", layer, folder)
    writes = _hook(config, "feature_output_hook", layer, folder)[0]
    skip = tensors["W_skip"].T.contiguous() if "W_skip" in tensors else None
    weights = (tensors["W_enc"].T, tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], threshold)
    dictionary = make(file, lambda: single(weights, skip, is_sae=False, activation=activation))
    kept = {NAME: {"config": dict(config), "metadata": metadata, "threshold": names[0] if names else None}}
    about: dict[str, Any] = {
        "model": model or _model(config, folder),
        "read_gain": gain or site is not None,
        "extra": kept,
    }
    described = DictionaryConfig.of(dictionary, site or reads, writes, **about)
    return Loaded(dictionary, described, NAME, (*odd, *clamped, *doubts))


def _load_clt(folder: Path, config: Mapping[str, Any], model: str | None) -> Loaded:
    count = len(list(folder.glob("W_enc_*.safetensors")))
    if not 0 < count <= _MOST:
        raise FormatError(f"{folder} has {count} files {ENCODER_FILE.format('*')}; a CLT has one per layer.")
    layers = [_clt_layer(folder, i, count) for i in range(count)]
    first = layers[0][0]
    if any(tensors.keys() != first.keys() for tensors, _, _ in layers):
        raise FormatError(f"not all layers in {folder} have the same tensors (W_skip, threshold); fetch it again.")
    sizes: dict[str, int] = {}
    axes: dict[str, Axes] = {name.format(""): a for name, a in (ENCODER | ENCODER_MORE | DECODER).items()}
    for at, (tensors, _, _) in enumerate(layers):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        sizes |= check_shapes(
            shapes, axes | {"W_dec_": (count - at, "d_sae", "d_out")}, f"layer {at} of {folder}", sizes
        )
    dtypes = {tensor.dtype for tensors, _, _ in layers for tensor in tensors.values()}
    dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
    lists = {name: [tensors[name].to(dtype) for tensors, _, _ in layers] for name in first}
    threshold, clamped = None, ()
    if "threshold_" in lists:
        pairs = [clamp_threshold(tensor, f"{folder}, layer {i}") for i, tensor in enumerate(lists["threshold_"])]
        threshold, clamped = [tensor for tensor, _ in pairs], tuple(note for _, notes in pairs for note in notes)
    activation = _activation(config, folder, has_threshold=threshold is not None)
    W_enc = [tensor.T for tensor in lists["W_enc_"]]
    weights = (W_enc, lists["b_enc_"], lists["W_dec_"], lists["b_dec_"], threshold, lists.get("W_skip_"))
    dictionary = make(folder, lambda: CrossLayerTranscoder(*weights, activation=activation))
    into = [_hook(config, "feature_input_hook", i, folder) for i in range(count)]
    out = [_hook(config, "feature_output_hook", i, folder)[0] for i in range(count)]
    kept = {NAME: {"config": dict(config), "metadata": layers[0][1]}}
    about: dict[str, Any] = {"model": model or _model(config, folder), "read_gain": into[0][1], "extra": kept}
    described = DictionaryConfig.of(dictionary, [site for site, _, _ in into], out, **about)
    notes = tuple(note for _, _, odd in layers for note in odd)
    return Loaded(dictionary, described, NAME, (*notes, *clamped, *into[0][2]))


def _clt_layer(folder: Path, at: int, count: int) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    """The tensors of one layer by their names without the number, the decoder as [layers, d_sae, d_out]."""
    files = [folder / name.format(at) for name in (ENCODER_FILE, DECODER_FILE)]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FormatError(f"{' and '.join(missing)} of {count} layers is missing; fetch it again.")
    named = [{name.format(at): axes for name, axes in part.items()} for part in (ENCODER, ENCODER_MORE, DECODER)]
    tensors, metadata, odd = take(files[0], named[0], named[1])
    decoder, _, more = take(files[1], named[2])
    decoder = {name: tensor.transpose(0, 1).contiguous() for name, tensor in decoder.items()}
    found = {name.removesuffix(str(at)): tensor for name, tensor in (tensors | decoder).items()}
    return found, metadata, (*odd, *more)


def _activation(config: Mapping[str, Any], folder: Path, *, has_threshold: bool) -> Activation:
    """By the config's ``activation``, which may be absent, and by the presence of a threshold."""
    name = config.get("activation") or config.get("activation_fn")
    if name in (None, "relu", "jump_relu", "jumprelu"):
        if name is not None and (name != "relu") != has_threshold:
            raise FormatError(
                f"{folder / CONFIG_FILE} says {shown(name)}, a threshold is {'there' if has_threshold else 'missing'}."
            )
        return JUMPRELU if has_threshold else Activation("relu")
    if name == "topk" and not has_threshold:
        return Activation("topk", float(whole(config.get("k"), "k", folder / CONFIG_FILE)))
    raise FormatError(f"'activation' in {folder / CONFIG_FILE} is {shown(name)}; relu, jump_relu and topk are read.")


def _hook(config: Mapping[str, Any], key: str, layer: int, folder: Path) -> tuple[Site, bool, tuple[str, ...]]:
    name = config.get(key)
    return read_tl_hook(f"blocks.{layer}.{name}" if isinstance(name, str) else name, f"{folder / CONFIG_FILE} ({key})")


def _model(config: Mapping[str, Any], folder: Path) -> str:
    return text(config.get("model_name"), "model_name", folder / CONFIG_FILE)


def save(folder: Path | str, dictionary: AnyDictionary, config: DictionaryConfig) -> tuple[str, ...]:
    """Write a CLT, or a set of one transcoder; returns what the format cannot hold, one sentence each.

    Raises InputError for other kinds, and for what circuit-tracer has no hook for.
    """
    if isinstance(dictionary, CrossLayerTranscoder):
        return _save_clt(Path(folder), dictionary, config)
    losses = save_set(folder, [(dictionary, config)])
    return (*losses, "a set of one layer: circuit-tracer itself wants every layer from 0, so write the whole set.")


def save_set(folder: Path | str, members: Sequence[tuple[AnyDictionary, DictionaryConfig]]) -> tuple[str, ...]:
    """Write transcoders of different layers of one model as a set; returns what is lost.

    Raises InputError when they are no such set.
    """
    configs = [config for _, config in members]
    first = configs[0]
    layers = [config.site.layer for config in configs]
    described = [_describe(config, SET) for config in configs]
    if len(set(layers)) != len(layers) or None in layers or any(one != described[0] for one in described):
        raise InputError(
            "these dictionaries are no set: it has one transcoder per layer, of one model and the same sites."
        )
    with atomic_folder(folder) as temporary:
        write_text(temporary / CONFIG_FILE, _yaml(first, described[0]))
        for dictionary, config in members:
            kept = config.extra.get(NAME) or {}
            tensors = _layer_tensors(dictionary, kept.get("threshold") or "activation_function.threshold")
            write_tensors(temporary / LAYER_FILE.format(config.site.layer), tensors, kept.get("metadata"))
    return tuple(dict.fromkeys(loss for config in configs for loss in lost_fields(config, NAME, _ABSENT)))


_ABSENT = ("revision", "l0", "prefixes", "k", "provenance", "extra")


def _layer_tensors(dictionary: AnyDictionary, threshold: str) -> dict[str, Tensor]:
    assert isinstance(dictionary, SingleLayer)
    tensors = {
        "W_enc": dictionary.W_enc.T,
        "b_enc": dictionary.b_enc,
        "W_dec": dictionary.W_dec,
        "b_dec": dictionary.b_dec,
    }
    if dictionary.threshold is not None:
        tensors[threshold] = dictionary.threshold
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip.T
    return tensors


def _save_clt(folder: Path, dictionary: CrossLayerTranscoder, config: DictionaryConfig) -> tuple[str, ...]:
    if [site.layer for site in config.reads] != list(range(len(config.reads))):
        raise InputError("circuit-tracer's CLTs read every layer from 0; convert this one to 'gemscope'.")
    metadata = (config.extra.get(NAME) or {}).get("metadata")
    derived = _describe(config, CLT)
    with atomic_folder(folder) as temporary:
        write_text(temporary / CONFIG_FILE, _yaml(config, derived))
        for i in range(dictionary.n_positions):
            tensors = {
                f"W_enc_{i}": dictionary.W_enc[i].T,
                f"b_enc_{i}": dictionary.b_enc[i],
                f"b_dec_{i}": dictionary.b_dec[i],
            }
            if dictionary.threshold is not None:
                tensors[f"threshold_{i}"] = dictionary.threshold[i]
            if dictionary.W_skip is not None:
                tensors[f"W_skip_{i}"] = dictionary.W_skip[i]
            write_tensors(temporary / ENCODER_FILE.format(i), tensors, metadata)
            decoder = {f"W_dec_{i}": dictionary.W_dec[i].transpose(0, 1)}
            write_tensors(temporary / DECODER_FILE.format(i), decoder, metadata)
    return lost_fields(config, NAME, _ABSENT)


def _describe(config: DictionaryConfig, kind: str) -> dict[str, Any]:
    """``config.yaml``; raises InputError for what circuit-tracer has no words for."""
    if config.kind not in ("transcoder", "skip_transcoder", "clt"):
        raise InputError(
            f"circuit-tracer replaces MLPs, and a {config.kind} does not; convert to 'saelens' or 'gemscope'."
        )
    into, out = config.site.name, config.writes[0].name
    if into not in _HOOKS or out not in _HOOKS or (not config.read_gain and into != "mlp_in"):
        raise InputError(f"circuit-tracer has no hook for a transcoder from {into} to {out}; convert to 'gemscope'.")
    if any(a.layer != b.layer for a, b in zip(config.reads, config.writes, strict=True)):
        raise InputError("circuit-tracer's transcoders read and write the same layer; convert this one to 'gemscope'.")
    described: dict[str, Any] = {
        "model_name": config.model,
        "model_kind": kind,
        "feature_input_hook": _HOOKS[into] if config.read_gain else _NO_GAIN,
        "feature_output_hook": _HOOKS[out],
    }
    if config.activation.kind == "topk":
        described |= {"activation": "topk", "k": int(config.activation.k or 0)}
    return described


def _yaml(config: DictionaryConfig, derived: Mapping[str, Any]) -> str:
    """The config that was read before if it still says the same, with whatever else it said; else ``derived``."""
    raw = cast("Mapping[str, Any] | None", (config.extra.get(NAME) or {}).get("config"))
    same = raw is not None and all(raw.get(name) == value for name, value in derived.items())
    return yaml.safe_dump(dict(raw if same and raw is not None else derived), sort_keys=False, allow_unicode=True)
