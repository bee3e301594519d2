"""``gemscope.json``: what was fetched into a folder, from where, in which revision, with which hash."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gemscope.artifacts.catalogue.artifact import Artifact
from gemscope.artifacts.hub.files import Digest, RemoteFile
from gemscope.core.errors import FormatError
from gemscope.core.files import read_json, write_json

NAME = "gemscope.json"
FORMAT = "gemscope.fetched"
VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """One fetched file."""

    size: int
    sha256: str
    checked: str
    """Against what: ``sha256``, ``git-sha1`` or ``length``."""
    etag: str | None
    """The source's mark of the content."""
    revision: str | None
    """Commit; None from a folder."""
    source: str
    """Address of the hub, or the folder."""
    fetched: str
    """UTC time, ISO 8601."""


def read(folder: Path) -> Mapping[str, FileRecord]:
    """The files recorded in ``folder``; empty when there is no record or it cannot be understood."""
    try:
        value = read_json(folder / NAME)
        if value["format"] != FORMAT or value["version"] != VERSION:
            return {}
        return {str(name): FileRecord(**entry) for name, entry in value["files"].items()}
    except (FormatError, KeyError, TypeError, AttributeError):
        return {}


def add(folder: Path, artifact: Artifact, source: str, requested: str, file: RemoteFile, found: Digest) -> FileRecord:
    """Record one more file in ``folder``. Raises StorageError."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = FileRecord(found.size, found.sha256, file.check, file.etag, file.revision, source, now)
    files = {**read(folder), file.path.rsplit("/", 1)[-1]: entry}
    value: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "name": artifact.name,
        "repo": artifact.repo,
        "folder": artifact.folder,
        "requested": requested,
        "revision": file.revision,
        "files": {name: asdict(one) for name, one in sorted(files.items())},
    }
    write_json(folder / NAME, value)
    return entry
