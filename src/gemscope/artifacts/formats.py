"""Every format a dictionary can be in: which one a folder is of, reading it, writing it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemscope.artifacts import circuit_tracer, gemma_scope_1, gemma_scope_2, native, saelens
from gemscope.artifacts.config import AnyDictionary, DictionaryConfig, Loaded
from gemscope.artifacts.lazy import LazyDictionary, held
from gemscope.core.errors import FormatError, InputError
from gemscope.core.sites import Site

Reader = Callable[[Path, Site | None, str | None], Loaded]
Writer = Callable[[Path, AnyDictionary, DictionaryConfig], tuple[str, ...]]


@dataclass(frozen=True)
class Format:
    """One format."""

    name: str
    title: str
    """In a few words."""
    detect: Callable[[Path], bool]
    """Whether a path is in it; looks at names only."""
    load: Reader
    """Path, site and model (None: what the files say)."""
    save: Writer
    """Returns what is lost, one sentence each."""
    open_lazy: Callable[[Path, Site | None, str | None], LazyDictionary] | None = None
    """As ``load``, with the weights left on disk; None where that cannot be."""


def _detect_native(path: Path) -> bool:
    return native.detect(path.parent if path.is_file() else path)


def _load_native(path: Path, site: Site | None, model: str | None) -> Loaded:
    loaded = native.load(path.parent if path.is_file() else path)
    return replace(loaded, config=_replaced(loaded.config, site, model))


def _open_native(path: Path, site: Site | None, model: str | None) -> LazyDictionary:
    lazy = native.open_lazy(path.parent if path.is_file() else path)
    lazy.config = _replaced(lazy.config, site, model)
    return lazy


def _replaced(config: DictionaryConfig, site: Site | None, model: str | None) -> DictionaryConfig:
    about = {} if site is None else {"reads": (site,), "writes": (site,)}
    return replace(config, **about, model=model or config.model)


def _save_native(folder: Path, dictionary: AnyDictionary, config: DictionaryConfig) -> tuple[str, ...]:
    return native.save(folder, dictionary, config)


NATIVE = Format("gemscope", "gemscope's own", _detect_native, _load_native, _save_native, _open_native)
FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        NATIVE,
        Format(
            gemma_scope_2.NAME,
            "Gemma Scope 2",
            gemma_scope_2.detect,
            lambda path, site, model: gemma_scope_2.load(path, site=site, model=model),
            gemma_scope_2.save,
            lambda path, site, model: gemma_scope_2.open_lazy(path, site=site, model=model),
        ),
        Format(
            gemma_scope_1.NAME,
            "Gemma Scope",
            gemma_scope_1.detect,
            lambda path, site, model: gemma_scope_1.load(path, site=site, model=model),
            gemma_scope_1.save,
        ),
        Format(
            saelens.NAME,
            "SAELens",
            saelens.detect,
            lambda path, site, model: saelens.load(path, site=site, model=model),
            saelens.save,
        ),
        Format(
            circuit_tracer.NAME,
            "circuit-tracer",
            circuit_tracer.detect,
            lambda path, site, model: circuit_tracer.load(path, site=site, model=model),
            circuit_tracer.save,
        ),
    )
}
"""By name, in the order in which they are tried."""


def named(name: str) -> Format:
    """The format of that name; raises InputError when there is none."""
    if name not in FORMATS:
        raise InputError(f"there is no format {name!r}; the formats are {', '.join(FORMATS)}.")
    return FORMATS[name]


def detect(path: Path | str) -> Format:
    """The format of a folder, or of a file in one; raises FormatError when it is none that is known."""
    path = Path(path)
    try:
        found = next((one for one in FORMATS.values() if one.detect(path)), None)
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot look into {str(path)!r} ({error}); check the path.") from error
    if found is None:
        if not exists:
            raise FormatError(f"{path} does not exist; check the path.")
        raise FormatError(
            f"{path} holds no dictionary in a known format: no dictionary.json, params.safetensors, params.npz,"
            " cfg.json or config.yaml; check the path."
        )
    return found


def load(
    path: Path | str, *, format: str | None = None, site: Site | str | None = None, model: str | None = None
) -> Loaded:
    """Read one dictionary in any format, or in the one named; ``site`` (that is read) and ``model`` replace what its
    files say.

    Raises FormatError when it is damaged, of no known format, or does not say where it belongs; InputError for an
    unknown format.
    """
    chosen = named(format) if format is not None else detect(path)
    place = None if site is None else Site.parse(site)
    try:
        return chosen.load(Path(path), place, model)
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read {str(path)!r} ({error}); check the path.") from error


def open_lazy(path: Path | str, *, site: Site | str | None = None, model: str | None = None) -> LazyDictionary:
    """One dictionary in any format with its weights left on disk; of formats that cannot be read by range, and of those
    whose weights must be folded, all is read. ``site`` and ``model`` as in ``load``, and so are the errors.
    """
    chosen = detect(path)
    if chosen.open_lazy is None:
        return held(load(path, site=site, model=model), path)
    place = None if site is None else Site.parse(site)
    try:
        return chosen.open_lazy(Path(path), place, model)
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read {str(path)!r} ({error}); check the path.") from error


def load_all(path: Path | str, *, model: str | None = None) -> tuple[Loaded, ...]:
    """Read every dictionary of a folder: a circuit-tracer set, a folder of dictionary folders, or just one."""
    path = Path(path)
    inner = _inner(path)
    if inner:
        found = [loaded for child in inner for loaded in load_all(child, model=model)]
        return tuple(sorted(found, key=lambda loaded: loaded.config.site.order))
    if detect(path).name == circuit_tracer.NAME and circuit_tracer.is_set(path):
        return circuit_tracer.load_set(path, model=model)
    return (load(path, model=model),)


def _inner(path: Path) -> list[Path]:
    """The dictionary folders in a folder that is none itself."""

    def known(one: Path) -> bool:
        return any(format.detect(one) for format in FORMATS.values())

    try:
        if not path.is_dir() or known(path):
            return []
        return sorted(child for child in path.iterdir() if child.is_dir() and known(child))
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot look into {str(path)!r} ({error}); check the path.") from error


def save(
    folder: Path | str, dictionary: AnyDictionary, config: DictionaryConfig, *, format: str = NATIVE.name
) -> tuple[str, ...]:
    """Write one dictionary; returns what the format cannot hold, one sentence each.

    Raises InputError when the format cannot express the dictionary, or there is no such format; StorageError.
    """
    return named(format).save(Path(folder), dictionary, config)


def save_all(folder: Path | str, members: Sequence[Loaded], *, format: str = NATIVE.name) -> tuple[str, ...]:
    """Write several dictionaries: as one set where the format has sets, else in a folder each, named by their site."""
    if len(members) == 1:
        return save(folder, members[0].dictionary, members[0].config, format=format)
    if format == circuit_tracer.NAME:
        return circuit_tracer.save_set(folder, [(one.dictionary, one.config) for one in members])
    names = [str(one.config.site) for one in members]
    if len(set(names)) != len(names):
        raise InputError("two of these dictionaries read the same site; convert them one by one.")
    losses = [
        save(Path(folder) / name, one.dictionary, one.config, format=format)
        for name, one in zip(names, members, strict=True)
    ]
    return tuple(dict.fromkeys(loss for lost in losses for loss in lost))
