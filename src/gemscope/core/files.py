"""Files that are either whole or not there: written to a temporary name, synced, then renamed."""

import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemscope.core.errors import FormatError, StorageError, reason

_SPACE = {errno.ENOSPC, errno.EDQUOT}


def storage_error(path: Path, error: OSError) -> StorageError:
    """The one sentence for a failed write."""
    if error.errno in _SPACE:
        return StorageError(
            f"the disk is full: {path} was not written; free some space and run the same command again."
        )
    reason = error.strerror or str(error)
    return StorageError(f"cannot write {path} ({reason}); choose a folder you may write to.")


def _write_failed(path: Path, error: BaseException) -> BaseException:
    """Turn a failed write into a StorageError; anything else (Ctrl-C, a bug) passes through unchanged."""
    if isinstance(error, OSError):
        return storage_error(path, error)
    if isinstance(error, SafetensorError):  # safetensors wraps the operating system's error in its own
        full = "No space left" in str(error) or "os error 28" in str(error)
        return storage_error(path, OSError(errno.ENOSPC if full else errno.EIO, str(error)))
    return error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path | str) -> Generator[Path]:
    """Give a temporary path beside ``path``; on success it is synced and renamed, on any failure removed.

    Raises StorageError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise storage_error(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if (translated := _write_failed(path, error)) is not error:
            raise translated from error
        raise


@contextmanager
def atomic_folder(path: Path | str) -> Generator[Path]:
    """Give a temporary folder beside ``path``; on success it takes the place of ``path``, on any failure it is removed.

    A folder that stood there before is replaced only once the new one is whole; a kill between the two renames leaves
    it beside its place (``recover``).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise storage_error(path, error) from error
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        for inner in temporary.rglob("*"):
            inner.chmod(0o755 if inner.is_dir() else 0o644)
            _sync(inner)
        temporary.chmod(0o755)
        if _is_there(path):
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
        _remove(old)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(old, path)
        if isinstance(error, StorageError):  # of a file in the folder: name the place that was asked for
            raise StorageError(str(error).replace(str(temporary), str(path))) from error.__cause__
        if (translated := _write_failed(path, error)) is not error:
            raise translated from error
        raise


def recover(path: Path | str) -> None:
    """Settle what a kill left of ``path``: what stood there goes back unless something took its place, the rest goes.

    Only for a path that no other process is writing. Raises StorageError.
    """
    path = Path(path)
    left = f".{glob.escape(path.name)}.????????"  # the eight characters are tempfile's
    try:
        for old in path.parent.glob(f"{left}.old"):
            _put_back(old, path)
        for rest in [*path.parent.glob(f"{left}.old"), *path.parent.glob(f"{left}.tmp")]:
            _remove(rest)
    except OSError as error:
        raise storage_error(path, error) from error


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _put_back(old: Path, path: Path) -> None:
    if _is_there(old) and not _is_there(path):
        old.rename(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; raises FormatError when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"cannot read {path} ({error.strerror}); check the path.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON ({reason(error)}); write or fetch it again.") from error


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    with atomic_path(path) as temporary:
        save_file(
            {k: v.detach().contiguous() for k, v in tensors.items()}, temporary, dict(metadata) if metadata else None
        )


def read_tensors(path: Path | str, device: str = "cpu") -> dict[str, Tensor]:
    """Read every tensor of a safetensors file; raises FormatError when it is missing, truncated or damaged."""
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"there is no file {path}; check the path.")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is truncated or damaged ({reason(error)}); write or fetch it again.") from error


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
