"""The files of a store: safetensors, written as a stream with constant memory, read by row range.

Notable: a header's length depends on the names of the tensors only, not on the number of rows, so rows may be
written before it is known how many there will be; and a header is a function of what the file should hold, so
that any flipped bit in it is found by comparing.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gemscope.core.errors import FormatError

Dtype = Literal["bfloat16", "float32"]
SAFETENSORS_NAME: dict[str, str] = {"bfloat16": "BF16", "float32": "F32", "int32": "I32", "float64": "F64"}
ITEM_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4, "int32": 4, "float64": 8}
_ALIGN = 256
_CHUNK = 1 << 24

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (number type, shape), in the order in which they lie in the file."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    """Its size."""
    crc32: str
    """CRC-32 of what follows the header, 8 hex digits."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"bytes": self.bytes, "crc32": self.crc32}


def header(tensors: Tensors) -> bytes:
    """The first bytes of a safetensors file: the length, the JSON, and spaces up to a multiple of 256."""
    at, value = 0, dict[str, Any]()
    for name, (dtype, shape) in tensors.items():
        end = at + ITEM_BYTES[dtype] * math.prod(shape)
        value[name] = {"dtype": SAFETENSORS_NAME[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(value, separators=(",", ":")).encode()
    room = 112 * len(tensors)  # for the longest numbers, whatever they are now
    size = _ALIGN * -(-(8 + room + sum(map(len, tensors))) // _ALIGN)
    assert 8 + len(text) <= size, text
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)


def acts_header(rows: int, width: int, dtype: Dtype) -> bytes:
    """Header of a shard of activations."""
    return header({"acts": (dtype, (rows, width))})


def rows_header(rows: int) -> bytes:
    """Header of the file that says where a shard's rows come from."""
    return header({name: ("int32", (rows,)) for name in ("doc", "pos", "token")})


def tensor_bytes(array: npt.NDArray[Any]) -> memoryview:
    """An array's bytes, not copied."""
    return np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")


class ShardWriter:
    """One file, from its temporary path: data first, in any number of parts, header last."""

    def __init__(self, path: Path, reserved: int) -> None:
        self._handle = os.open(path, os.O_WRONLY)
        self._at = self._reserved = reserved
        self._crc = 0

    def append(self, data: memoryview) -> None:
        """Write the next bytes, and sum them in another thread meanwhile; raises OSError."""
        with ThreadPoolExecutor(1) as summing:
            crc = summing.submit(zlib.crc32, data, self._crc)
            while data:
                written = os.pwrite(self._handle, data[:_CHUNK], self._at)
                self._at += written
                data = data[written:]
        self._crc = crc.result()

    def finish(self, head: bytes) -> FileRecord:
        """Write the header and close; raises OSError."""
        assert len(head) == self._reserved
        os.pwrite(self._handle, head, 0)
        self.close()
        return FileRecord(self._at, f"{self._crc:08x}")

    def close(self) -> None:
        """Close the file; it stays as it is."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """(where the data begins, tensors by name) of a safetensors file; raises FormatError when it is none."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(size) if size < 1 << 26 else b""
        value = json.loads(text)
        if len(text) == size and isinstance(value, dict):
            value.pop("__metadata__", None)
            return 8 + size, value
    except OSError as error:
        raise FormatError(f"cannot read {path} ({error.strerror}); check the path.") from error
    except ValueError:
        pass
    raise FormatError(f"{path} is truncated or damaged: its header cannot be read; harvest it again.")


def check_file(path: Path, wanted: FileRecord, head: bytes) -> str | None:
    """What is wrong with a file, in one sentence; None when it is whole, bit for bit."""
    if (problem := check_size(path, wanted)) is not None:
        return problem
    crc = 0
    try:
        with path.open("rb") as file:
            if file.read(len(head)) != head:
                return f"{path}: the header is damaged"
            while block := file.read(_CHUNK):
                crc = zlib.crc32(block, crc)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if f"{crc:08x}" != wanted.crc32:
        return f"{path}: the data is damaged (CRC-32 {crc:08x}, recorded {wanted.crc32})"
    return None


def check_size(path: Path, wanted: FileRecord) -> str | None:
    """Whether the file is there with its recorded size: what can be known without reading it."""
    try:
        size = path.stat().st_size
    except OSError:
        return f"{path}: the file is missing"
    if size != wanted.bytes:
        kind = "truncated" if size < wanted.bytes else "too long"
        return f"{path}: the file is {kind} ({size} bytes, recorded {wanted.bytes})"
    return None
