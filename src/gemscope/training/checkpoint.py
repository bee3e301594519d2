"""Everything that a stopped run needs to go on bit for bit, in one folder that is whole or not there.

    checkpoint/state.json            step, place in the data, scalars, what is being trained
    checkpoint/state.safetensors     weights, moments, counts, random states

A nested state of tensors, numbers, strings, lists and dicts is split into the two; numbers survive JSON exactly.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from gemscope.core.arrays import Tensor
from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import atomic_folder, read_json, read_tensors, write_json, write_tensors

FORMAT = "gemscope.checkpoint"
VERSION = 2
_TENSOR, _TUPLE = "$tensor", "$tuple"


@dataclass(frozen=True)
class Checkpoint:
    """Where a pass stands."""

    step: int
    """Updates made."""
    configs: Sequence[Mapping[str, Any]]
    """What is being trained, as plain JSON values."""
    inputs: Mapping[str, str | None]
    """What it is trained on and from: a hash, or None, of each by its name."""
    position: Mapping[str, int]
    """Place of the next batch."""
    learners: Sequence[Mapping[str, Any]]
    """State of each learner."""
    seconds: float
    """Wall-clock time so far."""
    last: Sequence[Sequence[float]]
    """What was last reported of each dictionary."""


def save(folder: Path, state: Checkpoint) -> None:
    """Write a checkpoint in the place of an older one; raises StorageError."""
    tensors: dict[str, Tensor] = {}
    value = {
        "format": FORMAT,
        "version": VERSION,
        "step": state.step,
        "seconds": state.seconds,
        "configs": list(state.configs),
        "key": key_of(state.configs),
        "inputs": dict(state.inputs),
        "position": dict(state.position),
        "last": [list(one) for one in state.last],
        "learners": [_split(one, f"{i}", tensors) for i, one in enumerate(state.learners)],
        "random": _split(_random_state(), "random", tensors),
    }
    with atomic_folder(folder) as temporary:
        write_tensors(temporary / "state.safetensors", _apart(tensors))
        write_json(temporary / "state.json", value)


def load(
    folder: Path, configs: Sequence[Mapping[str, Any]], inputs: Mapping[str, str | None] | None = None
) -> Checkpoint | None:
    """The checkpoint in ``folder`` with the random states set to its own, or None when there is none.

    Raises FormatError when it is damaged, InputError when it is of other configs or, if they are given, other inputs.
    """
    if not (folder / "state.json").is_file():
        return None
    value = read_json(folder / "state.json")
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
        raise FormatError(f"{folder} holds no {FORMAT} of version {VERSION}; remove it to begin anew.")
    if value.get("key") != key_of(configs):
        raise InputError(
            f"{folder} is the checkpoint of another configuration; give another folder, or the same options as before."
        )
    known = value.get("inputs", {})
    if other := [name for name, one in (inputs or {}).items() if known.get(name, one) != one]:
        raise InputError(
            f"{folder} is the checkpoint of a run with other {' and '.join(other)}; give another folder, or the same as"
            " before."
        )
    tensors = read_tensors(folder / "state.safetensors")
    try:
        learners = [_join(one, tensors) for one in value["learners"]]
        _set_random_state(_join(value["random"], tensors))
        where = value["step"], value["configs"], known, value["position"]
        return Checkpoint(*where, learners, value["seconds"], value["last"])
    except (KeyError, TypeError) as error:
        raise FormatError(f"{folder} lacks a part ({error}); remove it to begin anew.") from error


def key_of(configs: Sequence[Mapping[str, Any]]) -> str:
    """A hash of what is trained."""
    return hashlib.sha256(json.dumps(list(configs), sort_keys=True, default=str).encode()).hexdigest()


def hash_of(tensors: Iterable[Tensor]) -> str:
    """A hash of shapes, number types and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a nested state by its place."""
    tensors: dict[str, Tensor] = {}
    for name, part in state.items():
        _split(part, name, tensors)
    return tensors


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, no two in the same memory, as the file wants them; copied only where they are not."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu()
        storage = here.untyped_storage().data_ptr()
        found[name] = here.clone(memory_format=torch.contiguous_format) if storage in taken else here.contiguous()
        taken.add(storage)
    return found


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON values, with tensors taken out and named after their place."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        pairs = [[_split(key, "", tensors), _split(part, f"{name}.{key}", tensors)] for key, part in items]
        return {"$dict": pairs}
    if isinstance(value, (list, tuple)):
        parts = [_split(part, f"{name}.{i}", tensors) for i, part in enumerate(cast(Sequence[Any], value))]
        return {_TUPLE: parts} if isinstance(value, tuple) else parts
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise AssertionError(f"a state holds a {type(value).__name__} at {name}")


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(part, tensors) for part in cast(list[Any], value)]
    if not isinstance(value, dict):
        return value
    found = cast(dict[str, Any], value)
    if _TENSOR in found:
        return tensors[found[_TENSOR]]
    if _TUPLE in found:
        return tuple(_join(part, tensors) for part in found[_TUPLE])
    return {_join(key, tensors): _join(part, tensors) for key, part in found["$dict"]}


def _random_state() -> dict[str, Any]:
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    found = state["numpy"]
    inner = {"key": found["key"].numpy().astype(np.uint32), "pos": found["pos"]}
    legacy = {name: found[name] for name in ("bit_generator", "has_gauss", "gauss")} | {"state": inner}
    np.random.set_state(legacy)
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
