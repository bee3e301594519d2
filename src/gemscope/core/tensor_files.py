"""Safetensors files read by byte range: nothing before it is asked for, nothing twice in memory.

Notable:
- positioned reads straight into the tensor: no memory map whose pages count as ours, or vanish with the file;
- the header is not trusted: names, types, shapes and offsets are checked against the size of the file;
- ``bytes_read`` says what was really read.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, cast

import torch

from gemscope.core.arrays import Int, Tensor
from gemscope.core.errors import FormatError

CHUNK = 1 << 24
"""Bytes per read of a whole tensor."""

HUGE = 1 << 21
"""Bytes from which memory is asked of the system directly, in pages of this size, and given back when it is freed."""

MAX_HEADER = 100 << 20
"""The limit of the format."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """One safetensors file, open for reading; raises FormatError when it is missing, truncated or damaged."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock = Lock()
        self.bytes_read = 0
        """Bytes read from the file so far."""
        try:
            if not self.path.is_file():
                raise FormatError(f"there is no file {self.path}; check the path.")
            self._file = self.path.open("rb", buffering=0)
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise FormatError(f"cannot read {self.path} ({error.strerror}); check the path.") from error
        self.entries, self.metadata = self._header()

    def _header(self) -> tuple[dict[str, TensorEntry], dict[str, str]]:
        if self.size < 8:
            raise self._damaged("it is shorter than a header")
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > MAX_HEADER or 8 + length > self.size:
            raise self._damaged(f"its header claims {length} bytes of {self.size}")
        try:
            header = json.loads(self._bytes(8, length).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise self._damaged("its header is not JSON") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is not a table of tensors")
        table = cast(dict[str, Any], header)
        metadata = table.pop("__metadata__", {})
        entries = {name: self._entry(name, value, 8 + length) for name, value in table.items()}
        end = 8 + length
        for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
            if entry.start != end:
                raise self._damaged("its tensors overlap or leave gaps")
            end += entry.nbytes
        if end != self.size:
            raise self._damaged(f"its tensors end at byte {end} of {self.size}")
        return entries, {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}

    def _entry(self, name: str, value: Any, origin: int) -> TensorEntry:
        try:
            shape, (start, stop) = [_count(n) for n in value["shape"]], map(_count, value["data_offsets"])
            entry = TensorEntry(_DTYPES[value["dtype"]], tuple(shape), origin + start)
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"the header's entry for {name[:80]!r} cannot be understood") from error
        if entry.nbytes != stop - start:
            raise self._damaged(f"{name[:80]!r} of shape {entry.shape} does not fill its {stop - start} bytes")
        return entry

    def read(self, name: str, *, finite: bool = False) -> Tensor:
        """A whole tensor; with ``finite`` a NaN or an infinity in it is a FormatError.

        Each chunk is checked while it is in the cache and the system reads ahead; nothing else is allocated. One thread
        on purpose: two that take chunks in turns mislead the system's reading ahead.
        """
        entry = self.entry(name)
        buffer = _memory(entry.nbytes)
        check = finite and entry.dtype.is_floating_point
        self._advise(entry.start, entry.nbytes, sequential=True)
        for first in range(0, entry.nbytes, CHUNK):
            chunk = buffer[first : first + CHUNK]
            self._into(chunk, entry.start + first)
            if check and not is_finite(chunk.view(entry.dtype)):
                raise FormatError(f"{name} in {self.path} has a NaN or an infinity; train or fetch it again.")
        return buffer.view(entry.dtype).view(entry.shape)

    def rows(self, name: str, index: Int[Tensor, " rows"]) -> Tensor:
        """Some rows [rows, width] of a tensor seen as a matrix, its last axis the width, in the order of ``index``.

        Only their bytes are read, neighbours in one piece. Raises FormatError when a row is not there.
        """
        entry = self.entry(name)
        width = entry.shape[-1] if entry.shape else 1
        wanted, place = index.unique(return_inverse=True)
        count = math.prod(entry.shape[:-1])
        if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < count:
            raise FormatError(
                f"{name} in {self.path} has rows 0 to {count - 1}, not {int(wanted[-1])}; check the index."
            )
        step = width * entry.dtype.itemsize
        buffer = torch.empty(len(wanted) * step, dtype=torch.uint8)
        self._advise(entry.start, entry.nbytes, sequential=False)
        done = 0
        for first, number in _runs(wanted):
            self._into(buffer[done : done + number * step], entry.start + first * step)
            done += number * step
        found = buffer.view(entry.dtype).view(len(wanted), width)
        return found if torch.equal(place, torch.arange(len(place))) else found[place]

    def block(self, name: str, first: int, stop: int) -> Tensor:
        """Neighbouring rows [stop - first, width] of a tensor seen as a matrix, in one read."""
        entry = self.entry(name)
        width = entry.shape[-1] if entry.shape else 1
        step = width * entry.dtype.itemsize
        buffer = _memory((stop - first) * step)
        self._advise(entry.start + first * step, len(buffer), sequential=True)
        self._into(buffer, entry.start + first * step)
        return buffer.view(entry.dtype).view(stop - first, width)

    def columns(self, name: str, first: int, stop: int) -> Tensor:
        """Neighbouring columns [rows, stop - first] of a matrix: one read per row."""
        entry = self.entry(name)
        rows, width = entry.shape
        size = entry.dtype.itemsize
        step = (stop - first) * size
        buffer = _memory(rows * step)
        self._advise(entry.start, entry.nbytes, sequential=False)
        for row in range(rows):
            self._into(buffer[row * step : (row + 1) * step], entry.start + (row * width + first) * size)
        return buffer.view(entry.dtype).view(rows, stop - first)

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies; raises FormatError when there is none of that name."""
        if name not in self.entries:
            raise FormatError(f"{self.path} lacks {name}; it holds {', '.join(sorted(self.entries)) or 'nothing'}.")
        return self.entries[name]

    def forget(self) -> None:
        """Let the system drop its cached pages of this file; measurements of the disk begin with this."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bytes(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self._fill(memoryview(buffer), offset)
        return bytes(buffer)

    def _into(self, buffer: Tensor, offset: int) -> None:
        self._fill(memoryview(cast(Any, buffer.numpy())), offset)

    def _fill(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            except OSError as error:
                raise FormatError(f"cannot read {self.path} ({error.strerror}); check the disk.") from error
            if got == 0:
                raise self._damaged("it ended while it was read")
            done += got
        with self._lock:
            self.bytes_read += done

    def _advise(self, start: int, length: int, sequential: bool) -> None:
        """Whether to read ahead: scattered rows would drag their neighbourhood along."""
        if hasattr(os, "posix_fadvise"):
            advice = os.POSIX_FADV_SEQUENTIAL if sequential else os.POSIX_FADV_RANDOM
            os.posix_fadvise(self._file.fileno(), start, length, advice)

    def _damaged(self, why: str) -> FormatError:
        return FormatError(f"{self.path} is truncated or damaged ({why[:200]}); write or fetch it again.")


class HeldTensors(TensorFile):
    """Tensors in memory behind the same reading side."""

    def __init__(self, tensors: Mapping[str, Tensor], name: Path | str) -> None:
        """``name`` stands for the file in messages."""
        self.path, self._lock, self.bytes_read, self.metadata = Path(name), Lock(), 0, {}
        self._held: dict[int, Tensor] = {}
        self.entries, self.size = {}, 0
        for key, tensor in tensors.items():
            self.entries[key] = TensorEntry(tensor.dtype, tuple(tensor.shape), self.size)
            self._held[self.size] = tensor.contiguous().reshape(-1).view(torch.uint8)
            self.size += self.entries[key].nbytes

    def _fill(self, view: memoryview, offset: int) -> None:
        start = max(start for start in self._held if start <= offset)
        view[:] = memoryview(cast(Any, self._held[start][offset - start :][: len(view)].numpy()))

    def _advise(self, start: int, length: int, sequential: bool) -> None:
        """Nothing to read ahead."""

    def forget(self) -> None:
        """Nothing is cached."""

    def close(self) -> None:
        """Nothing is open."""


def read_all(path: Path | str, expected: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """Every tensor of a file, or those expected, finite and of the expected shapes; raises FormatError."""
    with TensorFile(path) as file:
        check_shapes(file, expected or {})
        return {name: file.read(name, finite=True) for name in (expected or file.entries)}


def check_shapes(file: TensorFile, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise FormatError at the first expected tensor that is missing or of another shape; reads the header only."""
    for name, shape in expected.items():
        if (found := file.entry(name).shape) != shape:
            raise FormatError(
                f"{name} in {file.path} has shape {found}, but {shape} was expected; the files do not belong together."
            )


def _memory(nbytes: int) -> Tensor:
    """Bytes to be filled; in huge pages where the system has them, for faulting in small ones takes as long as a
    fast disk.
    """
    if nbytes < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def is_finite(chunk: Tensor) -> bool:
    """Whether there is no NaN and no infinity; looks once and allocates nothing."""
    low, high = torch.aminmax(chunk)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _runs(index: Tensor) -> Iterator[tuple[int, int]]:
    """First and number of each run of neighbours in a sorted index."""
    if len(index) == 0:
        return
    breaks = (index.diff() != 1).nonzero()[:, 0] + 1
    edges = [0, *breaks.tolist(), len(index)]
    for first, stop in pairwise(edges):
        yield int(index[first]), stop - first
