"""Tensors out of files that nobody vouches for: every name, shape, number type and value is checked before it is used,
and what is wrong is one sentence (FormatError).
"""

import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from gemscope.core.arrays import Tensor
from gemscope.core.errors import FormatError
from gemscope.core.tensor_files import TensorFile

Axes = tuple[str | int, ...]
"""The axes of a tensor by name, ``("d_in", "d_sae")``; axes of one name have one size. A number is a fixed size."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BLOCK = 1 << 24
"""Numbers that are looked at together: 64 MB."""

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxstring = 2, 3, 3, 60


def shown(value: object) -> str:
    """An untrusted value in a sentence: short, on one line, whatever it is."""
    return _REPR.repr(value)[:120]


def shapes_of(file: TensorFile) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in an open file."""
    return {name: entry.shape for name, entry in file.entries.items()}


def check_names(found: Collection[str], wanted: Collection[str], optional: Collection[str], where: object) -> None:
    """Raise FormatError when a tensor is missing, or one is there that the format does not have."""
    if missing := [name for name in wanted if name not in found]:
        raise FormatError(f"{where} lacks {', '.join(missing)}; it should hold {', '.join(wanted)}.")
    if unknown := sorted(set(found) - {*wanted, *optional}):
        shown = ", ".join(name if len(name) < 60 else name[:57] + "..." for name in unknown[:5])
        known = ", ".join([*wanted, *optional])
        raise FormatError(
            f"{where} also holds {shown}, which may change what it computes; it should hold only {known}."
        )


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    layout: Mapping[str, Axes],
    where: object,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The size of every named axis; raises FormatError when two tensors disagree, or with ``sizes`` known before.

    Tensors that ``shapes`` lacks are passed over.
    """
    known, owner = dict(sizes or {}), dict.fromkeys(sizes or {}, "the other files")
    for name, axes in layout.items():
        if name not in shapes:
            continue
        shape = shapes[name]
        if len(shape) != len(axes) or 0 in shape:
            wanted = ", ".join(map(str, axes))
            raise FormatError(f"{name} in {where} has shape {shape}, but it should be ({wanted}), none of them 0.")
        for axis, size in zip(axes, shape, strict=True):
            expected = axis if isinstance(axis, int) else known.setdefault(axis, size)
            if size != expected:
                reason = "the format" if isinstance(axis, int) else owner[axis]
                raise FormatError(
                    f"{name} in {where} has shape {shape}, but {reason} asks for {axis} = {expected};"
                    " the tensors do not belong together."
                )
            if isinstance(axis, str):
                owner.setdefault(axis, name)
    return known


def check_dtypes(file: TensorFile) -> tuple[torch.dtype, tuple[str, ...]]:
    """What the tensors are kept in (bf16 if all are, else fp32), and what is odd about it.

    Raises FormatError for integers.
    """
    dtypes = {name: entry.dtype for name, entry in file.entries.items()}
    for name, dtype in dtypes.items():
        if dtype not in _FLOATS:
            raise FormatError(
                f"{shown(name)} in {file.path} is {dtype}, but weights are float32 or bfloat16; fetch it again."
            )
    odd = sorted(name for name, dtype in dtypes.items() if dtype == torch.float64)
    warnings = (f"{', '.join(odd)} in {file.path} is float64 and was rounded to float32.",) if odd else ()
    return (torch.bfloat16 if set(dtypes.values()) == {torch.bfloat16} else torch.float32), warnings


def check_finite(tensor: Tensor, name: str, where: object) -> Tensor:
    """The tensor; raises FormatError when it holds a NaN or an infinity."""
    for part in tensor.reshape(-1).split(_BLOCK):
        if not bool(part.isfinite().all()):
            raise FormatError(f"{name} in {where} has a NaN or an infinity; train or fetch it again.")
    return tensor


def take(
    path: Path | str, layout: Mapping[str, Axes], optional: Mapping[str, Axes] | None = None
) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    """All tensors of a file that should hold ``layout`` and may hold ``optional``: checked, in one number type.

    Also the file's metadata, and what was odd. Raises FormatError.
    """
    optional = optional or {}
    with TensorFile(path) as file:
        shapes = shapes_of(file)
        check_names(shapes, layout, optional, path)
        check_shapes(shapes, {**layout, **optional}, path)
        dtype, odd = check_dtypes(file)
        return {name: read(file, name, dtype) for name in shapes}, dict(file.metadata), odd


def read(file: TensorFile, name: str, dtype: torch.dtype) -> Tensor:
    """A whole tensor; raises FormatError when it holds a NaN or an infinity, also one that ``dtype`` makes of it."""
    found = file.read(name, finite=True)
    return found if found.dtype == dtype else check_finite(found.to(dtype), name, file.path)


def clamp_threshold(threshold: Tensor, where: object) -> tuple[Tensor, tuple[str, ...]]:
    """Thresholds for ``pre_acts where pre_acts > threshold``, from those of ``relu(pre_acts)`` where it is above.

    The two differ below 0, where the ReLU acts as a threshold of 0.
    """
    below = int((threshold < 0).sum())
    if not below:
        return threshold, ()
    return threshold.clamp(min=0), (f"{below} thresholds in {where} are below 0; they act as 0 and were read as 0.",)


def whole(value: object, name: str, where: object) -> int:
    """A JSON value that should be a whole number of 1 or more; raises FormatError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 62:
        raise FormatError(f"{name!r} in {where} is {shown(value)}, but it should be a whole number of 1 or more.")
    return value


def text(value: object, name: str, where: object) -> str:
    """A JSON value that should be a string; raises FormatError."""
    if not isinstance(value, str) or not 0 < len(value) <= 200 or not value.isprintable():
        raise FormatError(f"{name!r} in {where} is {shown(value)}, but it should be a name.")
    return value


def number(value: object, name: str, where: object) -> float | None:
    """A JSON value that should be a number of 0 or more, or null; raises FormatError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
        raise FormatError(f"{name!r} in {where} is {shown(value)}, but it should be a number of 0 or more.")
    return float(value)


def mapping(value: object, where: object) -> dict[str, Any]:
    """A JSON or YAML value that should be an object with names; raises FormatError."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise FormatError(f"{where} does not hold a table of names and values; write or fetch it again.")
    return {str(key): inner for key, inner in value.items()}
