"""Where text comes from: an ordered row of documents of which any range can be read again.

A document is running text (str) or a chat (a tuple of turns). Its number, from 0, is its identity: it does not
depend on who reads it, so workers that share a harvest agree without talking to one another.
"""

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gemscope.core.errors import InputError, reason
from gemscope.core.extras import need
from gemscope.models.chat import Turn

Text = str | tuple[Turn, ...]
"""One document."""

_EVERY = 256
_HEAD = 1 << 16
_ROLES = {"user": "user", "human": "user", "assistant": "model", "model": "model", "gpt": "model", "system": "system"}


@runtime_checkable
class Source(Protocol):
    """Documents in a fixed order."""

    def describe(self) -> dict[str, Any]:
        """What is read, as plain JSON values: two sources with the same description hold the same documents."""
        ...

    def count(self) -> int | None:
        """How many documents there are; None when they never end."""
        ...

    def read(self, start: int, stop: int) -> Iterator[Text]:
        """Documents ``start`` to ``stop`` (exclusive), fewer where the source ends."""
        ...


@dataclass(frozen=True)
class Documents:
    """Texts in memory."""

    items: Sequence[Text]

    def describe(self) -> dict[str, Any]:
        """Their number and the sha256 of all of them."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(repr(item).encode("utf-8", "surrogatepass") + b"\n")
        return {"kind": "documents", "documents": len(self.items), "sha256": digest.hexdigest()}

    def count(self) -> int:
        """How many there are."""
        return len(self.items)

    def read(self, start: int, stop: int) -> Iterator[Text]:
        """A slice of them."""
        return iter(self.items[start:stop])


@dataclass(frozen=True)
class TextFiles:
    """Plain text: each file one document, or each line."""

    paths: tuple[Path, ...]
    lines: bool = False
    """Every line that is not empty is a document of its own."""

    def __post_init__(self) -> None:
        _check_paths(self.paths)

    def describe(self) -> dict[str, Any]:
        """Names, sizes and beginnings of the files."""
        return {"kind": "lines" if self.lines else "text", "files": _fingerprints(self.paths)}

    @cached_property
    def _lines(self) -> "_Lines":
        return _Lines(self.paths)

    def count(self) -> int:
        """Number of files, or of lines; the latter are counted by reading them once."""
        return self._lines.count if self.lines else len(self.paths)

    def read(self, start: int, stop: int) -> Iterator[Text]:
        """The texts; raises InputError, with the file, where one is not UTF-8."""
        if self.lines:
            for where, line in self._lines.read(start, stop):
                yield _utf8(line, where).rstrip("\r\n")
            return
        for path in self.paths[start:stop]:
            yield _utf8(path.read_bytes(), str(path))


@dataclass(frozen=True)
class JsonLines:
    """One JSON value a line: an object with the text under ``column``, or a chat under ``messages``, or a string."""

    paths: tuple[Path, ...]
    column: str = "text"

    def __post_init__(self) -> None:
        _check_paths(self.paths)

    def describe(self) -> dict[str, Any]:
        """Names, sizes and beginnings of the files, and the column."""
        return {"kind": "jsonl", "column": self.column, "files": _fingerprints(self.paths)}

    @cached_property
    def _lines(self) -> "_Lines":
        return _Lines(self.paths)

    def count(self) -> int:
        """Number of lines that are not empty."""
        return self._lines.count

    def read(self, start: int, stop: int) -> Iterator[Text]:
        """The documents; raises InputError, with file and line, for what cannot be read."""
        for where, line in self._lines.read(start, stop):
            try:
                value = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where} is not valid JSON ({error}); mend or remove the line.") from error
            yield document_of(value, self.column, where)


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files (extra ``data``): one document a row, under ``column``, or a chat under ``messages``."""

    paths: tuple[Path, ...]
    column: str = "text"

    def __post_init__(self) -> None:
        _check_paths(self.paths)

    def describe(self) -> dict[str, Any]:
        """Names, sizes and beginnings of the files, and the column."""
        return {"kind": "parquet", "column": self.column, "files": _fingerprints(self.paths)}

    @cached_property
    def _tables(self) -> list[Any]:
        parquet = need("pyarrow.parquet", "data")
        arrow = need("pyarrow", "data")
        opened: list[Any] = []
        for path in self.paths:
            try:
                opened.append(parquet.ParquetFile(path))
            except (arrow.ArrowException, OSError) as error:
                raise InputError(f"{path} is no readable Parquet file ({reason(error)}); check it.") from error
        return opened

    def count(self) -> int:
        """Number of rows, from the files' footers."""
        return sum(table.metadata.num_rows for table in self._tables)

    def read(self, start: int, stop: int) -> Iterator[Text]:
        """Reads only the row groups that hold the range."""
        at = 0
        for path, table in zip(self.paths, self._tables, strict=True):
            names = table.schema_arrow.names
            if self.column not in names and "messages" not in names:
                raise InputError(
                    f"{path} has no column {self.column!r}; name one of its columns ({', '.join(names)}) with --column."
                )
            column = self.column if self.column in names else "messages"
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if at < stop and at + rows > start:
                    values = table.read_row_group(group, columns=[column]).column(0).to_pylist()
                    for number in range(max(start, at), min(stop, at + rows)):
                        yield document_of({column: values[number - at]}, self.column, f"{path}, row {number}")
                at += rows


@dataclass(frozen=True)
class HubDataset:
    """A Hugging Face data set (extra ``data``): one document a row, under ``column``, or a chat under ``messages``."""

    name: str
    """Hub id, or a folder."""
    split: str = "train"
    column: str = "text"
    config: str | None = None
    revision: str | None = None

    def describe(self) -> dict[str, Any]:
        """Name, split and the fingerprint that the ``datasets`` library gives the data."""
        fingerprint = str(self._rows._fingerprint)  # pyright: ignore[reportPrivateUsage]
        return {
            "kind": "dataset",
            "name": self.name,
            "config": self.config,
            "split": self.split,
            "column": self.column,
            "revision": self.revision,
            "fingerprint": fingerprint,
        }

    @cached_property
    def _rows(self) -> Any:
        datasets = need("datasets", "data")
        try:
            return datasets.load_dataset(self.name, self.config, split=self.split, revision=self.revision)
        except Exception as error:  # the library raises many kinds
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"cannot load the data set {self.name!r}, split {self.split!r} ({first}).") from error

    def count(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[Text]:
        """The rows' documents."""
        for number in range(start, min(stop, len(self._rows))):
            yield document_of(self._rows[number], self.column, f"{self.name}, row {number}")


def document_of(value: Any, column: str, where: str) -> Text:
    """The document in one JSON value: a string, ``value[column]``, or the chat ``value["messages"]``.

    A message has ``role`` and ``content`` (or ``text``). Raises InputError, saying ``where``.
    """
    if isinstance(value, Mapping):
        if column in value:
            value = value[column]
        elif "messages" in value:
            value = value["messages"]
        else:
            names = ", ".join(map(str, value)) or "nothing"
            raise InputError(
                f"{where} has no {column!r} and no 'messages', only {names}; name the field with --column."
            )
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InputError(f"{where} holds {type(value).__name__} where a text or a list of messages belongs.")
    turns: list[Turn] = []
    for message in value:
        role = _ROLES.get(str(message.get("role"))) if isinstance(message, Mapping) else None
        content = message.get("content", message.get("text")) if isinstance(message, Mapping) else None
        if role is None or not isinstance(content, str):
            raise InputError(
                f"{where} holds a message that is not {{'role': 'user' | 'assistant' | 'system', 'content': text}}."
            )
        turns.append(Turn(role, content))  # pyright: ignore[reportArgumentType]
    return tuple(turns)


@runtime_checkable
class Readable(Protocol):
    """Bytes that can be read once."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` of them; none at the end."""
        ...


def spooled(stream: Readable, folder: Path) -> "TextFiles | JsonLines":
    """A stream that can be read once, kept in a file: JSON lines when its first line is an object, else one document
    a line.

    The file is named by its content, so that the same input is the same source again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".stdin.", suffix=".tmp")
    digest = hashlib.sha256()
    with os.fdopen(handle, "wb") as file:
        while block := stream.read(1 << 20):
            digest.update(block)
            file.write(block)
    path = folder / f"stdin-{digest.hexdigest()[:16]}"
    Path(name).replace(path)
    with path.open("rb") as file:
        is_json = file.read(_HEAD).lstrip()[:1] == b"{"
    return JsonLines((path,)) if is_json else TextFiles((path,), lines=True)


@dataclass(frozen=True)
class _Lines:
    """Lines that are not empty, over several files, with every 256th one's place."""

    paths: tuple[Path, ...]

    @cached_property
    def _files(self) -> list[tuple[Path, "array[int]", int]]:
        """For each file: offset of every 256th line, and the number of lines."""
        found: list[tuple[Path, array[int], int]] = []
        for path in self.paths:
            marks, lines, at = array("q"), 0, 0
            with path.open("rb") as file:
                for line in file:
                    if line.strip():
                        if lines % _EVERY == 0:
                            marks.append(at)
                        lines += 1
                    at += len(line)
            found.append((path, marks, lines))
        return found

    @property
    def count(self) -> int:
        return sum(lines for _, _, lines in self._files)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        """(where, line) of lines ``start`` to ``stop``."""
        first = 0
        for path, marks, lines in self._files:
            low, high = max(start - first, 0), min(stop - first, lines)
            if low < high:
                with path.open("rb") as file:
                    file.seek(marks[low // _EVERY])
                    filled = (line for line in file if line.strip())
                    for number, line in enumerate(islice(filled, low % _EVERY, low % _EVERY + high - low), low):
                        yield f"{path}, document {number}", line
            first += lines


def _check_paths(paths: Sequence[Path]) -> None:
    if not paths:
        raise InputError("no text file was named; give at least one.")
    for path in paths:
        if not path.is_file():
            raise InputError(f"there is no file {path}; check the path.")


def _fingerprints(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Name, size and the sha256 of the first 64 kB of each file."""
    found: list[dict[str, Any]] = []
    for path in paths:
        with path.open("rb") as file:
            head = hashlib.sha256(file.read(_HEAD)).hexdigest()
        found.append({"name": path.name, "bytes": path.stat().st_size, "head_sha256": head})
    return found


def _utf8(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 (byte {error.start}); convert it, for example with iconv.") from error
