"""Where a result came from: versions, git revision, command, seeds, hashes of its inputs, machine."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gemscope.core.files import sha256_file

_PACKAGES = ("gemscope", "torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Provenance:
    """Everything needed to say how a result was made; serialises with ``as_dict``."""

    versions: Mapping[str, str]
    """Installed package versions; the transformers version is part of a numerical result."""
    git: str | None
    """Revision of the source tree the package runs from, with ``+dirty`` when it has changes; None if installed."""
    command: str
    """The command line, its program given by name only."""
    created: str
    """UTC time, ISO 8601, to the second."""
    machine: Mapping[str, str]
    """System, processor, number of cores, Python version."""
    seeds: Mapping[str, int] = field(default_factory=dict[str, int])
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name -> sha256 of each input file."""
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Whatever else the caller wants kept: a model's name and revision, a site."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def collect(
    seeds: Mapping[str, int] | None = None,
    inputs: Mapping[str, Path] | None = None,
    **notes: Any,
) -> Provenance:
    """Describe this process: its packages, command, machine, and the files it read (hashed here)."""
    return Provenance(
        versions={name: _version(name) for name in _PACKAGES},
        git=_git_revision(),
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine={
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": str(os.cpu_count() or 1),
            "python": platform.python_version(),
        },
        seeds=dict(seeds or {}),
        inputs={name: sha256_file(path) for name, path in (inputs or {}).items()},
        notes=notes,
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git_revision() -> str | None:
    """Revision of the checkout this file lies in; None when it is in no checkout that tracks it."""
    here = Path(__file__)

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=here.parent, capture_output=True, text=True, timeout=5, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    revision = git("rev-parse", "HEAD")
    return revision + "+dirty" if revision and git("status", "--porcelain", "-uno") else revision
