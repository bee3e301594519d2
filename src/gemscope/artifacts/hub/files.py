"""What a source says of a file, and what was found in it."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemscope.core.errors import FormatError

CHUNK = 1 << 20

Check = Literal["sha256", "git-sha1", "length"]
"""What a file was checked against: the best that the source announced."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RemoteFile:
    """A file as its source describes it."""

    repo: str
    path: str
    size: int
    revision: str | None
    """The commit; None when the source knows none."""
    etag: str | None = None
    """The source's own mark of the content: of a hub, a sha256 or, for small files, git's sha1 of the blob."""

    @property
    def sha256(self) -> str | None:
        """If the source announces it."""
        return self.etag if self.etag and _SHA256.fullmatch(self.etag) else None

    @property
    def git_sha1(self) -> str | None:
        """If the source announces it: sha1 of ``blob {size}\\0`` and the content."""
        return self.etag if self.etag and _GIT_SHA1.fullmatch(self.etag) else None

    @property
    def check(self) -> Check:
        """What a download of it is checked against."""
        return "sha256" if self.sha256 else "git-sha1" if self.git_sha1 else "length"


@dataclass(frozen=True)
class Digest:
    """Of a whole file."""

    size: int
    sha256: str
    git_sha1: str

    def fits(self, file: RemoteFile) -> bool:
        """Whether it is the file that the source announced, as far as it announced it."""
        if file.sha256 is not None and self.sha256 != file.sha256:
            return False
        return self.size == file.size and (file.git_sha1 is None or self.git_sha1 == file.git_sha1)


class Hashes:
    """sha256, and git's sha1 of a blob of ``total`` bytes, of what has been read so far."""

    def __init__(self, total: int) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(f"blob {total}\0".encode(), usedforsecurity=False)

    def update(self, chunk: bytes) -> None:
        """Read on."""
        self.size += len(chunk)
        self._sha256.update(chunk)
        self._git.update(chunk)

    def digest(self) -> Digest:
        """Of all that was read."""
        return Digest(self.size, self._sha256.hexdigest(), self._git.hexdigest())


def digest(path: Path) -> Digest:
    """Read a file and hash it. Raises FormatError when it cannot be read."""
    try:
        hashes = Hashes(path.stat().st_size)
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                hashes.update(chunk)
    except OSError as error:
        raise FormatError(f"cannot read {path} ({error.strerror}); check the file and the disk.") from error
    return hashes.digest()
