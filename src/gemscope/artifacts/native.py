"""The native format of one dictionary of any kind: ``dictionary.safetensors`` beside ``dictionary.json``; see
docs/formats.md.

A folder is written whole or not at all. A file that is read is not trusted: every shape, dtype and value is
checked, and what is wrong is said in one sentence (FormatError).
"""

from dataclasses import fields
from pathlib import Path
from typing import Any, cast, get_args

import torch

from gemscope.artifacts.config import DTYPES, KINDS, MULTI, AnyDictionary, DictionaryConfig, Loaded
from gemscope.artifacts.lazy import LazyDictionary, Table
from gemscope.core.arrays import Tensor
from gemscope.core.errors import FormatError, InputError, SiteError
from gemscope.core.files import atomic_folder, read_json, write_json, write_tensors
from gemscope.core.sites import Site
from gemscope.core.tensor_files import TensorFile, check_shapes, is_finite
from gemscope.dictionaries.activation import Activation, Kind
from gemscope.dictionaries.multilayer import MultiLayer
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.single import SingleLayer

FORMAT = "gemscope.dictionary"
VERSION = 1
WEIGHTS_FILE = "dictionary.safetensors"
CONFIG_FILE = "dictionary.json"

_NUMBER = (int, float)
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": str,
    "version": int,
    "kind": str,
    "activation": dict,
    "d_in": int,
    "d_out": int,
    "d_sae": int,
    "dtype": str,
    "reads": list,
    "writes": list,
    "model": str,
    "revision": (str, type(None)),
    "l0": (*_NUMBER, type(None)),
    "prefixes": list,
    "read_gain": bool,
    "provenance": dict,
    "extra": dict,
}


def detect(path: Path | str) -> bool:
    """Whether there is a folder of this format."""
    return (Path(path) / CONFIG_FILE).is_file()


def save(folder: Path | str, dictionary: AnyDictionary, config: DictionaryConfig) -> tuple[str, ...]:
    """Write ``dictionary``, which must apply to raw activations, in ``config.dtype``; a folder of that name is
    replaced as a whole. Nothing is lost but precision beyond that dtype; what is lost is returned, as sentences.
    Meanwhile the encoder is in memory twice (it is stored transposed), and everything if the dtype changes.

    Raises InputError when ``config`` describes another dictionary, FormatError when a value is not finite or no
    plain JSON, StorageError when the disk is full or the place cannot be written.
    """
    _check_belongs(dictionary, config)
    tensors = _to_file(dictionary, DTYPES[config.dtype])
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise FormatError(f"{name} in the dictionary to be saved has a NaN or an infinity; train it again.")
    value = as_json(config)
    with atomic_folder(folder) as temporary:
        write_tensors(temporary / WEIGHTS_FILE, tensors)
        write_json(temporary / CONFIG_FILE, value)
    exact = DTYPES[config.dtype].itemsize >= dictionary.dtype.itemsize
    return () if exact else (f"the weights were {dictionary.dtype} and are now {config.dtype}.".replace("torch.", ""),)


def load(folder: Path | str, device: str = "cpu") -> Loaded:
    """Read a dictionary and check it against its config; holds little more than the tensors at any moment.

    Raises FormatError when a file is missing, truncated or damaged, of another format or version, or holds a
    tensor of the wrong name, shape or dtype, a NaN or an infinity.
    """
    config = read_config(folder)
    with _open_weights(Path(folder), config) as file:
        tensors = {name: file.read(name, finite=True).to(device) for name in file.entries}
    for name, tensor in tensors.items():
        if name.startswith("threshold") and bool((tensor < 0).any()):
            raise FormatError(f"{file.path} holds a negative {name}, but thresholds are 0 or more; save it again.")
    return Loaded(_from_file(tensors, config), config)


def load_sae(folder: Path | str) -> SAE:
    """Read a dictionary that has to be an SAE; raises FormatError when it is of another kind."""
    dictionary = load(folder).dictionary
    if not isinstance(dictionary, SAE):
        raise FormatError(f"{folder} holds a dictionary of kind {dictionary.kind!r}, but an SAE is needed here.")
    return dictionary


def open_lazy(folder: Path | str) -> LazyDictionary:
    """A dictionary that reads only what is asked for, when it is; raises FormatError as far as headers tell."""
    config = read_config(folder)
    file = _open_weights(Path(folder), config)
    multi = config.kind in MULTI
    tables: dict[str, Table] = {}
    for at in range(len(config.reads)):
        end = f".{at}" if multi else ""
        for name in ("b_enc", "b_dec", "threshold", "W_skip"):
            if name + end in file.entries:
                tables[f"{name}.{at}"] = Table(file, name + end)
        tables[f"W_enc.{at}"] = Table(file, f"W_enc_T{end}")
        for out in range(at, len(config.reads)):
            tables[f"W_dec.{at}.{out}"] = Table(file, f"W_dec{end}", first=(out - at) * config.d_sae)
    return LazyDictionary(config, tables, lambda: load(folder).dictionary)


def read_config(folder: Path | str) -> DictionaryConfig:
    """Read and check ``dictionary.json`` alone; raises FormatError."""
    path = Path(folder) / CONFIG_FILE
    found: Any = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FormatError(f"{path} is not the config of a gemscope dictionary; its 'format' should be {FORMAT!r}.")
    if found.get("version") != VERSION:
        raise FormatError(
            f"{path} has format version {found.get('version')!r}, but this gemscope reads version {VERSION};"
            " use the gemscope that wrote it."
        )
    for name, kind in _FIELDS.items():
        if name not in found:
            raise FormatError(f"{path} lacks the field {name!r}; write or fetch it again.")
        if not isinstance(found[name], kind) or (isinstance(found[name], bool) and kind is not bool):
            raise FormatError(f"{name!r} in {path} is {found[name]!r}, which is of the wrong type; fetch it again.")
    try:
        values = {name: found[name] for name in _FIELDS if name not in ("format", "version")}
        values["activation"] = _activation(found["activation"])
        values["reads"] = tuple(Site.parse(_text(name)) for name in found["reads"])
        values["writes"] = tuple(Site.parse(_text(name)) for name in found["writes"])
        values["prefixes"] = tuple(_whole(n) for n in found["prefixes"])
        return DictionaryConfig(**values)
    except SiteError as error:
        raise FormatError(f"a site in {path} cannot be read: {error}") from error
    except (InputError, FormatError, TypeError, ValueError) as error:
        raise FormatError(f"{path} cannot be right: {error}") from error


def as_json(config: DictionaryConfig) -> dict[str, Any]:
    own = {f.name: getattr(config, f.name) for f in fields(config)}
    own["activation"] = {"kind": config.activation.kind, "k": config.activation.k}
    own["reads"], own["writes"] = [str(s) for s in config.reads], [str(s) for s in config.writes]
    own |= {"prefixes": list(config.prefixes), "provenance": dict(config.provenance), "extra": dict(config.extra)}
    return {"format": FORMAT, "version": VERSION} | {name: own[name] for name in _FIELDS if name in own}


def _check_belongs(dictionary: AnyDictionary, config: DictionaryConfig) -> None:
    """Raise InputError when ``config`` contradicts the dictionary."""
    own = DictionaryConfig.of(dictionary, config.reads, config.writes, model=config.model, dtype=config.dtype)
    for name in ("kind", "activation", "d_in", "d_out", "d_sae", "prefixes"):
        if (mine := getattr(own, name)) != (given := getattr(config, name)):
            raise InputError(f"the config says {name} {given}, but the dictionary has {mine}; describe it anew.")
    if len(config.reads) != dictionary.n_positions:
        raise InputError(f"{len(config.reads)} sites are named for {dictionary.n_positions} positions; name each.")


def _to_file(dictionary: AnyDictionary, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors by their names in the file; each has memory of its own, as the format wants it."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in dictionary.named_parameters():
        base, dot, position = name.partition(".")
        tensor = parameter.detach().cpu().to(dtype)
        if base == "W_enc":
            tensor = tensor.T
        tensor = tensor.contiguous()
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        found[("W_enc_T" if base == "W_enc" else base) + dot + position] = tensor
    return found


def _from_file(tensors: dict[str, Tensor], config: DictionaryConfig) -> AnyDictionary:
    about: dict[str, Any] = {"activation": config.activation, "prefixes": config.prefixes}
    if config.kind not in MULTI:
        single = cast(type[SingleLayer], KINDS[config.kind])
        given: dict[str, Any] = {name: t for name, t in tensors.items() if name != "W_enc_T"}
        return cast(AnyDictionary, single(tensors["W_enc_T"].T, **given, **about))
    multi = cast(type[MultiLayer], KINDS[config.kind])
    names = {name.partition(".")[0] for name in tensors} - {"W_enc_T"}
    lists: dict[str, Any] = {name: [tensors[f"{name}.{i}"] for i in range(len(config.reads))] for name in names}
    W_enc = [tensors[f"W_enc_T.{i}"].T for i in range(len(config.reads))]
    return cast(AnyDictionary, multi(W_enc, **lists, **about))


def _open_weights(folder: Path, config: DictionaryConfig) -> TensorFile:
    """The weights file, its header checked against the config."""
    file = TensorFile(folder / WEIGHTS_FILE)
    expected = tensor_shapes(config, skip=any(name.startswith("W_skip") for name in file.entries))
    if missing := expected.keys() - file.entries.keys():
        raise FormatError(f"{file.path} lacks {', '.join(sorted(missing))}; it should hold {', '.join(expected)}.")
    if unknown := file.entries.keys() - expected.keys():
        raise FormatError(f"{file.path} holds {', '.join(sorted(unknown))}; it should hold only {', '.join(expected)}.")
    check_shapes(file, expected)
    for name, entry in file.entries.items():
        if (found := str(entry.dtype).removeprefix("torch.")) != config.dtype:
            raise FormatError(f"{name} in {file.path} is {found}, but the config says {config.dtype}; save it again.")
    return file


def tensor_shapes(config: DictionaryConfig, skip: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the file; ``skip`` for a CLT with a skip connection."""
    n, d_in, d_out, d_sae = len(config.reads), config.d_in, config.d_out, config.d_sae
    shapes: dict[str, tuple[int, ...]] = {"W_enc_T": (d_sae, d_in), "b_enc": (d_sae,)}
    if config.activation.has_threshold:
        shapes["threshold"] = (d_sae,)
    shapes |= {"W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if config.kind == "skip_transcoder" or (config.kind == "clt" and skip):
        shapes["W_skip"] = (d_in, d_out)
    if config.kind not in MULTI:
        return shapes
    return {
        f"{name}.{i}": (n - i, *shape) if name == "W_dec" else shape for i in range(n) for name, shape in shapes.items()
    }


def _activation(value: dict[str, Any]) -> Activation:
    kind, k = value.get("kind"), value.get("k")
    if kind not in get_args(Kind):
        raise ValueError(f"'activation' is of kind {kind!r}; this gemscope knows {', '.join(get_args(Kind))}.")
    if isinstance(k, bool) or not isinstance(k, int | float | None):
        raise TypeError(f"the 'k' of 'activation' is {k!r}, which is no number.")
    return Activation(cast(Kind, kind), k)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not the name of a site.")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TypeError(f"{value!r} is not a number of latents.")
    return value
