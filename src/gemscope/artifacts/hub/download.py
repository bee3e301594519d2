"""One file, from its source to its place: resumed, checked, and then named.

What arrives is written beside the target as ``.NAME.MARK.part``, where MARK stands for the content that the hub
announced, so a part is never continued with another revision's bytes. It gets its name only when it has the announced
length and hash. A stop, a full disk or a hub that gives up leaves the part, and the next run goes on from there.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from filelock import FileLock, Timeout

from gemscope.artifacts.hub.files import CHUNK, Digest, Hashes, RemoteFile
from gemscope.artifacts.hub.retry import BrokenOff, worth_a_retry
from gemscope.artifacts.hub.sources import Source
from gemscope.core.errors import FormatError, InputError, StorageError
from gemscope.core.files import storage_error

Tell = Callable[[int], None]
"""Called with the number of bytes that are there now."""


def part_of(target: Path, file: RemoteFile) -> Path:
    """Where an unfinished download of ``file`` to ``target`` lies."""
    mark = hashlib.sha256(f"{file.etag}\0{file.revision if file.etag is None else ''}\0{file.size}".encode())
    return target.with_name(f".{target.name}.{mark.hexdigest()[:12]}.part")


def download(source: Source, file: RemoteFile, target: Path, tell: Tell) -> Digest:
    """Fetch ``file`` to ``target``, whose folder exists; whatever stood there is replaced when the new one is whole.

    Raises StorageError (disk full, not writable), ArtifactError (refused, gone, unreachable), FormatError when the
    content is not what the source announced, InputError when another process is fetching the same file.
    """
    part = part_of(target, file)
    try:
        with _locked(part):
            found = _fill(source, file, part, tell)
            if not found.fits(file):  # a part left by a crash of the machine may be damaged: once more, from the start
                part.unlink()
                tell(0)
                found = _fill(source, file, part, tell)
            if not found.fits(file):
                part.unlink()
                raise FormatError(
                    f"{file.path} arrived with sha256 {found.sha256} and {found.size:,} bytes, which is not what"
                    f" {source.name} announced ({file.etag or f'{file.size:,} bytes'}); nothing was kept, fetch it"
                    " again or from another hub."
                )
            part.chmod(0o644)
            part.replace(target)
            _sync_folder(target.parent)
    except OSError as error:
        raise storage_error(target, error) from error
    return found


def _fill(source: Source, file: RemoteFile, place: Path, tell: Tell) -> Digest:
    """Bring the part at ``place`` to its full length, over as many connections as it takes; then its hash."""
    with _opened(place) as stream:
        part = _Part(stream, file.size)
        failures = 0
        tell(part.size)
        while part.size < file.size:
            before = part.size
            try:
                _receive(source, file, part, tell)
            except Exception as error:
                if not worth_a_retry(error):
                    raise
                failures = failures + 1 if part.size <= before else 1
                source.patience.wait(failures, error, f"{file.repo}/{file.path}")
        os.fsync(stream.fileno())
        return part.digest()


def _receive(source: Source, file: RemoteFile, part: "_Part", tell: Tell) -> None:
    """One connection's worth, written behind what is there. Raises BrokenOff when it ends too early."""
    with source.read(file, part.size) as (start, chunks):
        if start == 0:  # the server cannot begin in the middle: take all of it anew
            part.restart()
        if start != part.size:
            raise BrokenOff("the hub sends other bytes than were asked for")
        for chunk in chunks:
            if part.size + len(chunk) > file.size:
                raise FormatError(
                    f"{file.path} is longer than the {file.size:,} bytes that {source.name} announced; fetch it again."
                )
            part.append(chunk)
            tell(part.size)
    if part.size < file.size:
        raise BrokenOff(f"it ended after {part.size:,} of {file.size:,} bytes")


class _Part:
    """A growing file and the hashes of all that is in it; begins with what an earlier run left."""

    def __init__(self, stream: FileIO, total: int) -> None:
        self._stream, self._total = stream, total
        self._hashes = Hashes(total)
        while chunk := stream.read(CHUNK):
            self._hashes.update(chunk)
        if self.size > total:
            self.restart()

    @property
    def size(self) -> int:
        return self._hashes.size

    def restart(self) -> None:
        self._stream.seek(0)
        self._stream.truncate()
        self._hashes = Hashes(self._total)

    def append(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest:
            rest = rest[self._stream.write(rest) :]
        self._hashes.update(chunk)

    def digest(self) -> Digest:
        return self._hashes.digest()


@contextmanager
def _opened(part: Path) -> Generator[FileIO]:
    """``part`` for reading and writing, without a buffer; never through a link that leads elsewhere."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(part, flags, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise StorageError(f"{part} is a link, which is not written through; remove it and run this again.") from error
    with FileIO(handle, "r+b") as stream:
        yield stream


@contextmanager
def _locked(part: Path) -> Generator[None]:
    """Hold the lock of ``part``, so that two processes never write the same one."""
    place = part.with_suffix(".lock")
    lock = FileLock(place, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another process is fetching {part.parent} right now; wait until it is done.") from error
    except NotImplementedError:  # a file system without locks: the hash tells if two writers met
        yield
        return
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            place.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
