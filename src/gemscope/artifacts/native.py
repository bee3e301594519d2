"""The native format of one dictionary: ``dictionary.safetensors`` beside ``dictionary.json``; see
docs/formats.md.

A folder is written whole or not at all. A file that is read is not trusted: every shape, dtype and value is
checked, and what is wrong is said in one sentence (FormatError).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemscope.core.arrays import Tensor
from gemscope.core.errors import FormatError, SiteError
from gemscope.core.files import atomic_folder, read_json, read_tensors, write_json, write_tensors
from gemscope.core.provenance import Provenance
from gemscope.core.sites import Site
from gemscope.dictionaries.sae import SAE

FORMAT = "gemscope.dictionary"
VERSION = 1
WEIGHTS_FILE = "dictionary.safetensors"
CONFIG_FILE = "dictionary.json"

_DTYPE = "float32"
TENSORS: dict[str, tuple[str, ...]] = {
    "W_enc": ("d_in", "d_sae"),
    "b_enc": ("d_sae",),
    "W_dec": ("d_sae", "d_in"),
    "b_dec": ("d_in",),
    "threshold": ("d_sae",),
}
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": str,
    "version": int,
    "kind": str,
    "activation": str,
    "d_in": int,
    "d_sae": int,
    "dtype": str,
    "site": str,
    "model": str,
    "revision": (str, type(None)),
    "provenance": dict,
    "extra": dict,
}


@dataclass(frozen=True)
class DictionaryConfig:
    """What ``dictionary.json`` says beside the format's name and version."""

    kind: str
    """``sae``."""
    activation: str
    """``jumprelu``."""
    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents."""
    dtype: str
    """Of all tensors: ``float32``."""
    site: Site
    """Where in the model the activations are taken."""
    model: str
    """Name of the model: a hub id, or the name of a built-in one."""
    revision: str | None
    """Revision of the model, if it has one."""
    provenance: Mapping[str, Any]
    """How the dictionary was made: versions, command, seeds, hashes of the inputs."""
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Whatever else was kept; ``training`` holds the trainer's summary, ``evaluation`` what was measured."""


@dataclass(frozen=True)
class Loaded:
    """A dictionary read from a folder."""

    dictionary: SAE
    config: DictionaryConfig


def save(
    folder: Path | str,
    dictionary: SAE,
    *,
    site: Site,
    model: str,
    provenance: Provenance,
    revision: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write ``dictionary``, which must apply to raw activations, in fp32; a folder of that name is replaced
    as a whole.

    ``extra`` must be plain JSON values. Raises StorageError when the disk is full or the place cannot be
    written, and FormatError when a value is not finite.
    """
    tensors = {name: getattr(dictionary, name).detach().float().cpu() for name in TENSORS}
    _check_finite(tensors, "the dictionary to be saved")
    config = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "sae",
        "activation": "jumprelu",
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "dtype": _DTYPE,
        "site": str(site),
        "model": model,
        "revision": revision,
        "provenance": provenance.as_dict(),
        "extra": dict(extra or {}),
    }
    with atomic_folder(folder) as temporary:
        write_tensors(temporary / WEIGHTS_FILE, tensors)
        write_json(temporary / CONFIG_FILE, config)


def load(folder: Path | str, device: str = "cpu") -> Loaded:
    """Read a dictionary and check it against its config.

    Raises FormatError when a file is missing, truncated or damaged, of another format or version, or holds a
    tensor of the wrong name, shape or dtype, a NaN or an infinity.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    tensors = read_tensors(path, device)
    sizes = {"d_in": config.d_in, "d_sae": config.d_sae}
    if missing := TENSORS.keys() - tensors.keys():
        raise FormatError(f"{path} lacks {', '.join(sorted(missing))}; it should hold {', '.join(TENSORS)}.")
    if unknown := tensors.keys() - TENSORS.keys():
        raise FormatError(f"{path} holds {', '.join(sorted(unknown))}; it should hold only {', '.join(TENSORS)}.")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != (expected := tuple(sizes[axis] for axis in TENSORS[name])):
            raise FormatError(
                f"{name} in {path} has shape {tuple(tensor.shape)}, but {CONFIG_FILE} asks for {expected};"
                " the two files do not belong together."
            )
        if (found := str(tensor.dtype).removeprefix("torch.")) != config.dtype:
            raise FormatError(f"{name} in {path} is {found}, but {CONFIG_FILE} says {config.dtype}; save it again.")
    _check_finite(tensors, str(path))
    if (tensors["threshold"] < 0).any():
        raise FormatError(f"{path} holds a negative threshold; a JumpReLU needs 0 or more, so save it again.")
    W_enc, b_enc, W_dec, b_dec, threshold = (tensors[name] for name in TENSORS)
    return Loaded(SAE(W_enc, b_enc, W_dec, b_dec, threshold), config)


def read_config(folder: Path | str) -> DictionaryConfig:
    """Read and check ``dictionary.json`` alone; raises FormatError."""
    path = Path(folder) / CONFIG_FILE
    found = read_json(path)
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
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            raise FormatError(f"{name!r} in {path} is {found[name]!r}, which is of the wrong type; fetch it again.")
    for name, known in (("kind", "sae"), ("activation", "jumprelu"), ("dtype", _DTYPE)):
        if found[name] != known:
            raise FormatError(f"{name!r} in {path} is {found[name]!r}, but this gemscope reads only {known!r}.")
    try:
        site = Site.parse(found["site"])
    except SiteError as error:
        raise FormatError(f"'site' in {path} cannot be read: {error}") from error
    values = {name: found[name] for name in _FIELDS if name not in ("format", "version", "site")}
    return DictionaryConfig(site=site, **values)


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FormatError(f"{name} in {where} has a NaN or an infinity; train or fetch it again.")
