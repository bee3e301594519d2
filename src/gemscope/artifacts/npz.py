"""Arrays out of a ``.npz`` that nobody vouches for: nothing is unpickled, and nothing is allocated before the sizes in
the arrays' headers were found to be those of the bytes behind them.
"""

import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemscope.artifacts.reading import shown
from gemscope.core.arrays import Tensor
from gemscope.core.errors import FormatError, reason
from gemscope.core.files import atomic_path

_BROKEN = (zipfile.BadZipFile, OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, OverflowError)
_FLOATS = ("<f4", "<f2", "<f8")
_HEADER = 1 << 16
_CHUNK = 1 << 22


def read_npz(path: Path) -> dict[str, Tensor]:
    """Every array by name, in the file's order, as float32 tensors.

    Raises FormatError when the file is missing, damaged, or holds anything but arrays of little-endian floats.
    """
    if not path.is_file():
        raise FormatError(f"there is no file {path}; check the path.")
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy"): _array(archive, info, path) for info in archive.infolist()}
    except (*_BROKEN, struct.error, zlib.error, SyntaxError) as error:
        raise FormatError(f"{path} is truncated or damaged ({reason(error)}); fetch it again.") from error


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Tensor:
    with archive.open(info) as file:
        shape, dtype = _header(file, info.filename, path)
        start = file.tell()
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if info.file_size - start != size:
            found = info.file_size - start
            raise FormatError(
                f"{shown(info.filename)} in {path} has {found} bytes, but its header asks for {size}; fetch it again."
            )
        data = np.empty(shape, dtype)
        into, done = data.reshape(-1).view(np.uint8), 0
        while chunk := file.read(_CHUNK):
            into[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
            done += len(chunk)
    return torch.from_numpy(data.astype(np.float32, copy=False))


def _header(file: Any, name: str, path: Path) -> tuple[tuple[int, ...], "np.dtype[Any]"]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise FormatError(
            f"{shown(name)} in {path} is of npy version {version}, which no Gemma Scope file is; fetch it again."
        )
    shape, fortran, dtype = readers[version](file, max_header_size=_HEADER)
    if dtype.str not in _FLOATS or fortran:
        kind = f"{dtype.str}, column by column" if fortran else dtype.str
        raise FormatError(
            f"{shown(name)} in {path} is {kind}, but weights are <f4; nothing else is read, pickles least of all."
        )
    return shape, dtype


def write_npz(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write float32 arrays as ``numpy.savez`` does, whole or not at all."""
    arrays: dict[str, Any] = {
        name: tensor.detach().float().cpu().contiguous().numpy() for name, tensor in tensors.items()
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
