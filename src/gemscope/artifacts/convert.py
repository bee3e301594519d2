"""From one format to another, and what gets lost on the way."""

import os
from dataclasses import dataclass
from pathlib import Path

from gemscope.artifacts import formats
from gemscope.core.errors import InputError, StorageError
from gemscope.core.sites import Site


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` did."""

    source: str
    """Format that was read."""
    target: str
    """Format that was written."""
    folder: str
    written: int
    """Number of dictionaries."""
    warnings: tuple[str, ...]
    """What was odd about the source."""
    lost: tuple[str, ...]
    """What the target has no place for."""


def convert(
    source: Path | str,
    folder: Path | str,
    to: str,
    *,
    site: Site | str | None = None,
    model: str | None = None,
) -> Conversion:
    """Read ``source`` (one dictionary, or a set of them) and write it in the format ``to`` as ``folder``, which must be
    new or empty; nothing is written anywhere else.

    Raises FormatError for a source that cannot be read, InputError when the target cannot express it, StorageError when
    ``folder`` is in use.
    """
    chosen = formats.named(to)
    target = free_folder(folder)
    single = () if site is None else (formats.load(source, site=site, model=model),)
    found = single or formats.load_all(source, model=model)
    lost = formats.save_all(target, found, format=chosen.name)
    odd = tuple(dict.fromkeys(note for one in found for note in one.warnings))
    return Conversion(found[0].format, chosen.name, str(target), len(found), odd, lost)


def free_folder(folder: Path | str) -> Path:
    """The path, once it is sure that writing there replaces nothing; raises StorageError, InputError for no name."""
    path = Path(folder)
    if not path.name or path.name == ".." or "\0" in path.name:
        raise InputError(f"{str(folder)!r} names no new folder; give one, as in out/my-dictionary.")
    if ".." in path.parts[sum(part == ".." for part in path.parts) :]:
        raise InputError(f"{str(folder)!r} goes into a folder and out of it again; give the name without '..' in it.")
    try:
        os.fsencode(path)
        if path.is_symlink():
            raise StorageError(f"{path} is a symbolic link; give the name of a new folder.")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise StorageError(f"{path} exists and is not empty; give the name of a new folder.")
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot use {str(folder)!r} ({error}); give the name of a new folder.") from error
    return path
