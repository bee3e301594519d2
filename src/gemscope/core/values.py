"""Frozen dataclasses from the plain JSON values that ``dataclasses.asdict`` makes of them."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from gemscope.core.sites import Site

_T = TypeVar("_T")


def revived(kind: type[_T], value: Mapping[str, Any]) -> _T:
    """A ``kind`` with its fields from ``value``, nested dataclasses and tuples included; other keys are ignored.

    Raises KeyError for a field that is missing and has no default, TypeError or ValueError for a value that cannot be.
    """
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for field in fields(kind):  # pyright: ignore[reportArgumentType]
        if field.name in value:
            given[field.name] = _as(hints[field.name], value[field.name])
        elif field.default is MISSING and field.default_factory is MISSING:
            raise KeyError(field.name)
    return kind(**given)


def _as(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _as(next(part for part in inner if part is not type(None)), value)
    if origin is tuple:
        parts = [inner[0]] * len(value) if inner[1:] == (...,) else inner
        return tuple(_as(part, one) for part, one in zip(parts, value, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        return {key: _as(inner[1], one) for key, one in value.items()}
    if hint is Site:
        return Site.parse(value)
    if isinstance(hint, type) and is_dataclass(hint):
        return revived(hint, value)
    return value
