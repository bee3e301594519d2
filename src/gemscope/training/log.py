"""What a run reports, line by line: JSONL always exact and resumable, TensorBoard and Weights & Biases beside it.

A line of ``log.jsonl`` is one object: ``step``, and for each dictionary by its name ``loss``, ``fvu``, ``l0``, the
parts of the loss under ``terms`` and, where there are any, ``warnings``, or what the held-out evaluation found under
``evaluation``. After a resume the lines behind the checkpoint are dropped, so that the file is the same as that of a
run never stopped.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gemscope.core.files import storage_error, write_text


@runtime_checkable
class Log(Protocol):
    """Takes what is reported."""

    def write(self, step: int, values: Mapping[str, Mapping[str, Any]]) -> None:
        """``values``: dictionary -> name -> number, after ``step`` updates."""
        ...

    def rewind(self, step: int) -> None:
        """Forget everything after ``step``: a run goes on from there."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class JsonLines:
    """One line per report in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, step: int, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Append a line and hand it to the system; raises StorageError."""
        line = json.dumps({"step": step, **values}, ensure_ascii=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise storage_error(self.path, error) from error

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, and one that a kill cut off."""
        if self.path.is_file():
            kept = [line for line in self.path.read_text("utf-8").splitlines() if _step(line) <= step]
            write_text(self.path, "".join(line + "\n" for line in kept))

    def close(self) -> None:
        """Nothing is open."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; an incomplete last one is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if _step(line) < float("inf")]


def _step(line: str) -> float:
    """The step of a line; infinity for a line that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def numbers(values: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Everything that is a number, flat: ``dictionary/name``."""
    found: dict[str, float] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, part in value.items():
                walk(f"{prefix}/{name}" if prefix else str(name), part)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[prefix] = float(value)

    walk("", values)
    return found
