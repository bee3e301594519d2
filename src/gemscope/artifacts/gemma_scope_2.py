"""The files of Gemma Scope 2 (McDougall et al. 2025): ``config.json`` beside ``params.safetensors``, or for crosscoders
and CLTs beside one ``params_layer_{i}.safetensors`` per position.

Notable:
- ``affine_skip_connection`` is [d_in, d_out] and is not transposed: recon += x @ affine_skip_connection;
- the decoder of position l is stored for all n positions [d_sae, n, d_out]; what it has below l is not used by the
  formula: ignored with a warning when it is not zero, written as zeros;
- a config that is missing or odd is completed from the path (``gemma_scope_paths``), the L0 target too;
- ``width`` in the config counts the latents of all positions together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemscope.artifacts.config import DTYPES, AnyDictionary, DictionaryConfig, Loaded
from gemscope.artifacts.config import MULTI as MULTI_KINDS
from gemscope.artifacts.gemma_scope_paths import Place, model_name, place_2
from gemscope.artifacts.hooks import hook_point, read_hook_point
from gemscope.artifacts.lazy import LazyDictionary, Table
from gemscope.artifacts.making import lost_fields, make, single
from gemscope.artifacts.reading import (
    Axes,
    check_dtypes,
    check_finite,
    check_names,
    check_shapes,
    clamp_threshold,
    mapping,
    number,
    read,
    shapes_of,
    shown,
    text,
    whole,
)
from gemscope.core.arrays import Tensor
from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import atomic_folder, read_json, write_json, write_tensors
from gemscope.core.sites import Site
from gemscope.core.tensor_files import TensorFile
from gemscope.dictionaries.activation import JUMPRELU
from gemscope.dictionaries.multilayer import Crosscoder, CrossLayerTranscoder, MultiLayer
from gemscope.dictionaries.single import SingleLayer

NAME = "gemma-scope-2"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "params.safetensors"
LAYER_FILE = "params_layer_{}.safetensors"

SINGLE: dict[str, Axes] = {
    "w_enc": ("d_in", "d_sae"),
    "b_enc": ("d_sae",),
    "threshold": ("d_sae",),
    "w_dec": ("d_sae", "d_out"),
    "b_dec": ("d_out",),
}
"""Tensors of ``params.safetensors``."""

MULTI: dict[str, Axes] = SINGLE | {"w_dec": ("d_sae", "n", "d_out")}
"""Tensors of ``params_layer_{i}.safetensors``."""

SKIP: dict[str, Axes] = {"affine_skip_connection": ("d_in", "d_out")}
"""The tensor that only affine dictionaries have."""

_TYPES = ("sae", "transcoder", "crosscoder", "clt")
_ROWS = 1 << 10


def detect(path: Path) -> bool:
    """Whether ``path`` is such a folder, or a weights file in one."""
    names = (WEIGHTS_FILE, LAYER_FILE.format(0))
    return path.name in names if path.is_file() else any((path / name).is_file() for name in names)


def load(path: Path | str, *, site: Site | None = None, model: str | None = None) -> Loaded:
    """Read a folder; ``site`` (that is read, for single-layer kinds) and ``model`` replace what its config says.

    Raises FormatError when a file is missing, damaged or contradicts another, and when neither config nor path nor the
    caller says where the dictionary belongs.
    """
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    found = _open(folder, site, model)
    dtype = DTYPES[found.config.dtype]
    layers = [_layer(file, at, found.sizes, dtype) for at, file in enumerate(found.files)]
    lists = {name: [tensors[name] for tensors, _ in layers] for name in layers[0][0]}
    weights = (lists["w_enc"], lists["b_enc"], lists["w_dec"], lists["b_dec"], lists["threshold"])
    skips = lists.get("affine_skip_connection")
    kind = found.config.kind

    def build() -> AnyDictionary:
        if kind not in MULTI_KINDS:
            W_enc, b_enc, W_dec, b_dec, threshold = (tensors[0] for tensors in weights)
            skip = None if skips is None else skips[0]
            return single((W_enc, b_enc, W_dec, b_dec, threshold), skip, is_sae=kind == "sae")
        return Crosscoder(*weights) if kind == "crosscoder" else CrossLayerTranscoder(*weights, W_skip=skips)

    odd = tuple(note for _, notes in layers for note in notes)
    return Loaded(make(folder, build), found.config, NAME, (*found.warnings, *odd))


def open_lazy(path: Path | str, *, site: Site | None = None, model: str | None = None) -> LazyDictionary:
    """The same folder with its weights left on disk: only the headers are read.

    Raises FormatError as ``load`` does, as far as headers and config tell.
    """
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    found = _open(folder, site, model)
    n = len(found.files)
    tables: dict[str, Table] = {}
    for at, file in enumerate(found.files):
        tables |= {f"{name}.{at}": Table(file, name) for name in ("b_enc", "b_dec", "threshold")}
        tables[f"W_enc.{at}"] = Table(file, "w_enc", transposed=True)
        tables |= {f"W_dec.{at}.{out}": Table(file, "w_dec", out, n) for out in range(at, n)}
        if "affine_skip_connection" in file.entries:
            tables[f"W_skip.{at}"] = Table(file, "affine_skip_connection")
    return LazyDictionary(
        found.config,
        tables,
        lambda: load(folder, site=site, model=model).dictionary,
        format=NAME,
        warnings=found.warnings,
    )


@dataclass(frozen=True)
class _Opened:
    """A folder of which only config and headers were read."""

    files: tuple[TensorFile, ...]
    sizes: Mapping[str, int]
    config: DictionaryConfig
    warnings: tuple[str, ...]


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / CONFIG_FILE
    if not path.exists():
        return None
    raw = mapping(read_json(path), path)
    if raw.get("architecture", "jump_relu") != "jump_relu":
        raise FormatError(
            f"'architecture' in {path} is {shown(raw['architecture'])}; Gemma Scope 2 has only 'jump_relu'."
        )
    if raw.get("type", "sae") not in _TYPES:
        raise FormatError(f"'type' in {path} is {shown(raw['type'])}; it should be one of {', '.join(_TYPES)}.")
    if not isinstance(raw.get("affine_connection", False), bool):
        raise FormatError(
            f"'affine_connection' in {path} is {shown(raw['affine_connection'])}; it should be true or false."
        )
    return raw


def _open(folder: Path, site: Site | None, model: str | None) -> _Opened:
    """Everything that config, path and headers say; see ``load``."""
    raw = _config(folder)
    is_single = (folder / WEIGHTS_FILE).is_file()
    files, sizes = _headers(folder, is_single)
    checked = [check_dtypes(file) for file in files]
    odd = tuple(note for _, notes in checked for note in notes)
    dtype = "bfloat16" if {kept for kept, _ in checked} == {torch.bfloat16} else "float32"
    place = place_2(folder)
    reads, writes, notes = _sites(folder, raw, place, len(files))
    if site is not None and is_single:
        reads, writes = (site,), (site,) if reads == writes else (Site(writes[0].name, site.layer),)
    has_skip = "affine_skip_connection" in files[0].entries
    notes += _affine(folder, raw, place, has_skip)
    kind = _kind(folder, raw, is_single, reads == writes, has_skip)
    if reads == writes and sizes["d_in"] != sizes["d_out"]:
        widths = f"{sizes['d_in']} numbers and writes {sizes['d_out']}"
        raise FormatError(f"{folder} should reconstruct {reads[0]}, but reads {widths}; the files do not belong there.")
    about, doubts = _about(folder, raw, place, len(files) * sizes["d_sae"], model)
    kept = {NAME: {"config": raw, "metadata": dict(files[0].metadata)}}
    shape = {name: sizes[name] for name in ("d_in", "d_out", "d_sae")}
    config = DictionaryConfig(kind, JUMPRELU, **shape, dtype=dtype, reads=reads, writes=writes, **about, extra=kept)
    return _Opened(files, sizes, config, (*odd, *notes, *doubts))


def _headers(folder: Path, is_single: bool) -> tuple[tuple[TensorFile, ...], dict[str, int]]:
    """The files, open, and the sizes on which all their tensors agree."""
    name = WEIGHTS_FILE if is_single else LAYER_FILE.format(0)
    if not (folder / name).is_file():
        raise FormatError(f"{folder} has neither {WEIGHTS_FILE} nor {LAYER_FILE.format(0)}; fetch the weights too.")
    layout = SINGLE if is_single else MULTI
    first = TensorFile(folder / name)
    check_names(first.entries, layout, SKIP, first.path)
    sizes = check_shapes(shapes_of(first), {**layout, **SKIP}, first.path)
    if is_single:
        return (first,), sizes
    names = [LAYER_FILE.format(i) for i in range(sizes["n"])]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FormatError(
            f"{folder} lacks {', '.join(missing[:4])}: its decoders write to {len(names)} layers, so it needs"
            f" {len(names)} files."
        )
    files = (first, *(TensorFile(folder / name) for name in names[1:]))
    wanted = layout | SKIP if "affine_skip_connection" in first.entries else layout
    for file in files:
        check_names(file.entries, wanted, (), file.path)
        check_shapes(shapes_of(file), wanted, file.path, sizes)
    return files, sizes


def _kind(folder: Path, raw: dict[str, Any] | None, is_single: bool, is_same: bool, has_skip: bool) -> str:
    """By files and sites; raises FormatError when the config says another."""
    if is_same and has_skip:
        what = "an SAE" if is_single else "a crosscoder"
        raise FormatError(f"{folder} is {what} with an affine_skip_connection, which none has; fetch it again.")
    known = ("sae", "transcoder") if is_single else ("crosscoder", "clt")
    kind = known[not is_same]
    said = (raw or {}).get("type", kind)
    if said in known and said != kind:
        raise FormatError(
            f"{folder / CONFIG_FILE} says {said!r}, but what it reads and writes makes it a {kind}; fetch it again."
        )
    return "skip_transcoder" if is_single and has_skip else kind


def _layer(
    file: TensorFile, at: int, sizes: Mapping[str, int], dtype: torch.dtype
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of position ``at``, the decoder of several as [n - at, d_sae, d_out]: only what the formula uses."""
    with file:
        tensors = {name: read(file, name, dtype) for name in file.entries if name != "w_dec" or "n" not in sizes}
        tensors["threshold"], clamped = clamp_threshold(tensors["threshold"], file.path)
        if "n" not in sizes:
            return tensors, clamped
        n, d_sae, d_out = sizes["n"], sizes["d_sae"], sizes["d_out"]
        used, unused = torch.empty(n - at, d_sae, d_out, dtype=dtype), 0
        for start in range(0, d_sae, _ROWS):
            stop = min(start + _ROWS, d_sae)
            rows = file.block("w_dec", start * n, stop * n).view(-1, n, d_out)
            used[:, start:stop] = check_finite(rows[:, at:].to(dtype), "w_dec", file.path).transpose(0, 1)
            unused += int(rows[:, :at].count_nonzero())
        tensors["w_dec"] = used
        note = f"w_dec in {file.path} has {unused} numbers for layers before its own; the formula does not use them."
        return tensors, (*clamped, *((note,) if unused else ()))


def _sites(
    folder: Path, raw: dict[str, Any] | None, place: Place, n: int
) -> tuple[tuple[Site, ...], tuple[Site, ...], tuple[str, ...]]:
    """What is read and written, by the config or else by the path; and where the two differ."""
    wanted = None if n == 1 and (folder / WEIGHTS_FILE).is_file() else n
    by_path = _sites_of_path(place, n)
    if raw is not None and raw.get("hf_hook_point_in") is not None:
        where = folder / CONFIG_FILE
        reads = read_hook_point(raw["hf_hook_point_in"], wanted, where)
        out = raw.get("hf_hook_point_out")
        writes = reads if out is None else read_hook_point(out, wanted, where)
        if by_path is None or (reads, writes) == by_path:
            return reads, writes, ()
        named = ", ".join(map(str, by_path[0]))
        note = f"{where} says {', '.join(map(str, reads))}, the folder's name {named}; the config was believed."
        return reads, writes, (note,)
    if by_path is None:
        raise FormatError(
            f"{folder} has no {CONFIG_FILE} with hook points, and its path does not say where it belongs; keep the"
            " names of the release, as in resid_post/layer_12_width_16k_l0_small."
        )
    found = "the site was" if place.l0 is None or "l0" in (raw or {}) else "the site and the L0 target were"
    return *by_path, (f"{folder} has no config with hook points; {found} read off its path.",)


def _sites_of_path(place: Place, n: int) -> tuple[tuple[Site, ...], tuple[Site, ...]] | None:
    if place.kind == "clt":
        return tuple(Site("mlp_in", i) for i in range(n)), tuple(Site("mlp_out", i) for i in range(n))
    if place.reads is None or place.writes is None or len(place.reads) != n:
        return None
    return place.reads, place.writes


def _affine(folder: Path, raw: dict[str, Any] | None, place: Place, present: bool) -> tuple[str, ...]:
    """Whether config and tensors agree about the skip connection; raises FormatError when it was lost."""
    said = place.affine if raw is None or "affine_connection" not in raw else bool(raw["affine_connection"])
    if said and not present:
        raise FormatError(f"{folder} is said to be affine but has no affine_skip_connection; fetch its weights again.")
    if present and not said:
        return (f"{folder} is said not to be affine, but has an affine_skip_connection; it was used.",)
    return ()


def _about(
    folder: Path, raw: dict[str, Any] | None, place: Place, width: int, model: str | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Model and L0 target, by the config or else by the path; and whether the number of latents is the one named."""
    where, given = folder / CONFIG_FILE, raw or {}
    named = (
        place.model if given.get("model_name") is None else model_name(text(given["model_name"], "model_name", where))
    )
    if (name := model or named) is None:
        raise FormatError(f"neither the config nor the path of {folder} names a model; name it, as in --model NAME.")
    said = place.width if given.get("width") is None else whole(given["width"], "width", where)
    doubts: tuple[str, ...] = ()
    if raw is not None and said is not None and said != width:
        doubts = (f"{where} says {said} latents, the tensors have {width}; the tensors were believed.",)
    return {"model": name, "l0": number(given.get("l0", place.l0), "l0", where)}, doubts


def save(folder: Path | str, dictionary: AnyDictionary, config: DictionaryConfig) -> tuple[str, ...]:
    """Write a folder in fp32; returns what the format cannot hold, one sentence each.

    Raises InputError for what it cannot express: a TopK, an input without the norm's gain, a site without a hook point.
    """
    kept = config.extra.get(NAME) or {}
    derived = _describe(dictionary, config)
    raw = kept.get("config")
    metadata: Mapping[str, str] = kept.get("metadata") or {}
    losses = lost_fields(config, NAME, ("revision", "prefixes", "provenance", "extra", "k"))
    if dictionary.activation.kind == "relu":
        losses += ("the ReLU is written as a JumpReLU with thresholds of 0: the same function.",)
    with atomic_folder(folder) as temporary:
        write_json(temporary / CONFIG_FILE, raw if raw is not None and _agree(raw, derived) else derived)
        if isinstance(dictionary, MultiLayer):
            for i in range(dictionary.n_positions):
                write_tensors(temporary / LAYER_FILE.format(i), _multi(dictionary, i), metadata)
        else:
            write_tensors(temporary / WEIGHTS_FILE, _single(dictionary), metadata)
    return losses


def _describe(dictionary: AnyDictionary, config: DictionaryConfig) -> dict[str, Any]:
    if dictionary.activation.kind == "topk":
        raise InputError("Gemma Scope 2 holds thresholds, and a TopK has none; convert to 'saelens' or 'gemscope'.")
    if not config.read_gain:
        raise InputError(
            f"this dictionary reads {config.site} without the norm's gain, Gemma Scope 2 with it; fold the model's gain"
            " in first (fold_input_gain), or convert to 'gemma-scope-1'."
        )
    name = "google/gemma-3-270m-pt" if config.model == "google/gemma-3-270m" else config.model
    kind = "transcoder" if config.kind == "skip_transcoder" else config.kind
    return {
        "hf_hook_point_in": hook_point(config.reads),
        "hf_hook_point_out": hook_point(config.writes),
        "width": len(config.reads) * dictionary.d_sae,
        "model_name": name,
        "architecture": "jump_relu",
        "l0": None if config.l0 is None else int(config.l0) if config.l0 == int(config.l0) else config.l0,
        "affine_connection": dictionary.W_skip is not None,
        "type": kind,
    }


def _agree(raw: Mapping[str, Any], derived: Mapping[str, Any]) -> bool:
    """Whether a config that was read before still says the same, however it spells it."""
    return all(
        _plain(name, raw[name], derived) == _plain(name, derived[name], derived) for name in derived if name in raw
    )


def _plain(name: str, value: Any, derived: Mapping[str, Any]) -> Any:
    if name == "model_name":
        return model_name(str(value))
    if name.startswith("hf_hook_point"):
        point = str(derived[name])
        n = point.count(",") + 1 if "{" in point else None
        try:
            return read_hook_point(value, n, "the config")
        except FormatError:
            return None
    return value


def _single(dictionary: SingleLayer) -> dict[str, Tensor]:
    threshold = torch.zeros_like(dictionary.b_enc) if dictionary.threshold is None else dictionary.threshold
    tensors = {
        "w_enc": dictionary.W_enc,
        "b_enc": dictionary.b_enc,
        "threshold": threshold,
        "w_dec": dictionary.W_dec,
        "b_dec": dictionary.b_dec,
    }
    if dictionary.W_skip is not None:
        tensors["affine_skip_connection"] = dictionary.W_skip
    return {name: tensor.detach().float() for name, tensor in tensors.items()}


def _multi(dictionary: MultiLayer, at: int) -> dict[str, Tensor]:
    n, b_enc = dictionary.n_positions, dictionary.b_enc[at]
    w_dec = torch.zeros(dictionary.d_sae, n, dictionary.d_out)
    w_dec[:, at:] = dictionary.W_dec[at].detach().float().transpose(0, 1)
    tensors = {
        "w_enc": dictionary.W_enc[at],
        "b_enc": b_enc,
        "threshold": torch.zeros_like(b_enc) if dictionary.threshold is None else dictionary.threshold[at],
        "w_dec": w_dec,
        "b_dec": dictionary.b_dec[at],
    }
    if dictionary.W_skip is not None:
        tensors["affine_skip_connection"] = dictionary.W_skip[at]
    return {name: tensor.detach().float() for name, tensor in tensors.items()}
