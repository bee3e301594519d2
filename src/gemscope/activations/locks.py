"""Who is writing into a store: a whole harvest alone, or any number of slices, each once."""

import errno
import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from gemscope.core.errors import InputError
from gemscope.core.files import storage_error

FOLDER = ".locks"
_REFUSED = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}


@contextmanager
def writing(folder: Path, index: int, count: int) -> Generator[None]:
    """Hold the store's lock for slice ``index`` of ``count``; (0, 1) is everything.

    The operating system lets go of it when the process ends, however it ends. Raises InputError, naming the
    process that writes there already, and StorageError when the folder cannot be written.
    """
    place = _place(folder)
    whole = count == 1
    with (
        _locked(folder, place / "store", alone=whole),
        _locked(folder, place / f"slice-{index}-of-{count}", alone=True),
    ):
        yield


@contextmanager
def finishing(folder: Path) -> Generator[None]:
    """Wait until nobody is ``writing`` in a folder, and hold it alone."""
    with _locked(folder, _place(folder) / "store", alone=True, wait=True):
        yield


def _place(folder: Path) -> Path:
    place = folder / FOLDER
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    return place


@contextmanager
def _locked(folder: Path, path: Path, *, alone: bool, wait: bool = False) -> Generator[None]:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in _REFUSED:
                who = path.read_text().strip() or "another process"
                raise InputError(
                    f"{who} is writing into {folder} already; wait for it, stop it, or choose another folder."
                ) from error
            # a file system without locks: go on, every write is atomic
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(handle)


def is_locked(folder: Path) -> bool:
    """Whether somebody is writing into the store now."""
    path = folder / FOLDER / "store"
    if not path.is_file():
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _REFUSED
    finally:
        os.close(handle)
    return False
