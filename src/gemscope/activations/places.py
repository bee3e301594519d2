"""Where a store's files are: a folder, or a URL whose files are brought into a local cache.

From an object store a file is fetched whole, by parallel range reads with retries, checked against its CRC-32
and renamed; then it is read like any other file.
"""

import logging
import os
import threading
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gemscope.activations.shards import FileRecord
from gemscope.core.errors import FormatError, reason
from gemscope.core.extras import need
from gemscope.core.files import atomic_path

_RANGE = 8 << 20
_TRIES = 6
_WAIT = 0.2
_log = logging.getLogger(__name__)


@runtime_checkable
class Place(Protocol):
    """Gives files of a store by their name, such as ``acts/resid_post.3/000000.safetensors``."""

    @property
    def name(self) -> str:
        """Folder or URL, for messages."""
        ...

    def path(self, name: str, record: FileRecord | None = None) -> Path:
        """A local path with the file's bytes; raises FormatError when it cannot be had, or not whole."""
        ...


@dataclass(frozen=True)
class Folder:
    """A folder of this machine."""

    folder: Path

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.folder)

    def path(self, name: str, record: FileRecord | None = None) -> Path:
        """The file itself."""
        return self.folder / name


@dataclass(frozen=True)
class Remote:
    """Any URL that fsspec reads (extra ``remote``), with its cache."""

    url: str
    cache: Path
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Handed to fsspec: end point, credentials."""
    threads: int = 8
    """Ranges fetched at the same time."""
    limit: int | None = None
    """Bytes that the cache may hold; the files used longest ago make room. None: no limit."""
    _locks: dict[str, threading.Lock] = field(default_factory=dict[str, threading.Lock])
    _guard: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        """The URL."""
        return self.url

    @property
    def folder(self) -> Path:
        """Where this store's files are kept."""
        return self.cache / sha256(self.url.encode()).hexdigest()[:16]

    def path(self, name: str, record: FileRecord | None = None) -> Path:
        """The file in the cache, fetched if it is not there with its recorded checksum and size; without a record,
        always.
        """
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        local = self.folder / (record.crc32 if record is not None else "") / name
        with lock:
            if record is not None and local.is_file() and local.stat().st_size == record.bytes:
                os.utime(local)
                return local
            self._fetch(name, local, record)
        return local

    def _fetch(self, name: str, local: Path, record: FileRecord | None) -> None:
        system, root = need("fsspec", "remote").core.url_to_fs(self.url, **self.options)
        remote = f"{root.rstrip('/')}/{name}"
        size = record.bytes if record is not None else int(_tried(lambda: system.size(remote), f"{self.url}/{name}"))
        self._make_room(size)
        with atomic_path(local) as part:
            handle = os.open(part, os.O_RDWR)
            try:
                with ThreadPoolExecutor(self.threads) as pool:
                    spans = [(start, min(start + _RANGE, size)) for start in range(0, size, _RANGE)]
                    list(pool.map(partial(_fetch_range, system, remote, handle), spans))
                if record is not None and (crc := _crc(handle)) != record.crc32:
                    raise FormatError(
                        f"{self.url}/{name}: the data is damaged (CRC-32 {crc}, recorded {record.crc32}); upload it"
                        " again."
                    )
            finally:
                os.close(handle)

    def _make_room(self, size: int) -> None:
        if self.limit is None or not self.folder.is_dir():
            return
        files = sorted((p for p in self.folder.rglob("*.safetensors")), key=lambda p: p.stat().st_mtime)
        used = sum(p.stat().st_size for p in files)
        for path in files:
            if used + size <= self.limit:
                return
            used -= path.stat().st_size
            path.unlink(missing_ok=True)


def place_of(
    where: Path | str, cache: Path | str | None, options: Mapping[str, Any] | None, limit: int | None
) -> Place:
    """A folder, or a URL such as ``s3://bucket/store`` with its cache (by default in the user's cache folder)."""
    text = str(where)
    if "://" not in text:
        return Folder(Path(where))
    if text.startswith("file://"):
        return Folder(Path(text.removeprefix("file://")))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemscope" / "stores"
    return Remote(text.rstrip("/"), Path(cache) if cache is not None else home, dict(options or {}), limit=limit)


def _fetch_range(system: Any, remote: str, handle: int, span: tuple[int, int]) -> None:
    """Put one range of a remote file where it belongs in the local one."""
    start, stop = span

    def fetch() -> bytes:
        data: bytes = system.cat_file(remote, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(f"{len(data)} bytes came of {stop - start}")
        return data

    os.pwrite(handle, _tried(fetch, remote), start)


def _tried(fetch: Any, what: str) -> Any:
    """Try again, ever later, when a connection breaks; raises FormatError in the end."""
    for attempt in range(_TRIES):
        try:
            return fetch()
        except FileNotFoundError as error:
            raise FormatError(f"{what}: the file is missing; check the URL, or upload it again.") from error
        except Exception as error:  # each protocol has its own kinds
            if attempt == _TRIES - 1:
                raise FormatError(
                    f"{what} cannot be fetched ({reason(error)}); check the connection and try again."
                ) from error
            _log.info("%s: %s; trying again", what, error)
            time.sleep(_WAIT * 2**attempt)
    raise AssertionError


def _crc(handle: int) -> str:
    """CRC-32 of what follows the header."""
    at = 8 + int.from_bytes(os.pread(handle, 8, 0), "little")
    crc = 0
    while block := os.pread(handle, _RANGE, at):
        crc, at = zlib.crc32(block, crc), at + len(block)
    return f"{crc:08x}"
