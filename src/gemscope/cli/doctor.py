"""The state of this installation: versions, devices, dtypes, caches, disk, models, what is missing."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from rich.console import Group, RenderableType
from rich.text import Text

from gemscope.cli.models import KNOWN, built_in, in_cache
from gemscope.models.loading import BUILT_IN

_PACKAGES = ("gemscope", "torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy")
_LOW_DISK = 2e9
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}

Line = tuple[str, str]


def report() -> RenderableType:
    """Everything as aligned lines, what is missing last."""
    sections = {
        "versions": list(_versions()),
        "devices": list(_devices()),
        "storage": list(_storage()),
        "models": list(_models()),
    }
    lines: list[Text] = []
    for title, found in sections.items():
        lines.append(Text(title, style="bold"))
        lines += [Text(f"  {name:<18}", style="dim") + Text(value, style="not dim") for name, value in found]
        lines.append(Text())
    missing = list(_missing())
    if not missing:
        return Group(*lines, Text("Nothing is missing.", style="green"))
    lines.append(Text("missing", style="bold"))
    for what, command in missing:
        lines += [Text(f"  {what}"), Text(f"    {command}", style="cyan")]
    return Group(*lines)


def _versions() -> Iterator[Line]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in _PACKAGES:
        yield name, importlib.metadata.version(name)


def _devices() -> Iterator[Line]:
    yield (
        "cpu",
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used, {_dtypes(torch.device('cpu'))}",
    )
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9
        yield f"cuda:{number}", f"{torch.cuda.get_device_name(device)}, {memory:.0f} GB, {_dtypes(device)}"
    if torch.cuda.device_count() == 0:
        yield "cuda", "none"
    if torch.backends.mps.is_available():
        yield "mps", _dtypes(torch.device("mps"))


def _dtypes(device: torch.device) -> str:
    """The number types in which a matrix product works there."""
    works: list[str] = []
    for name, dtype in _DTYPES.items():
        try:
            x = torch.ones(4, 4, device=device, dtype=dtype)
            works += [name] if float((x @ x)[0, 0]) == 4 else []
        except (RuntimeError, TypeError):
            continue
    return " ".join(works)


def _storage() -> Iterator[Line]:
    for name, folder in (("here", Path.cwd()), ("hub cache", Path(HF_HUB_CACHE))):
        there = folder
        while not there.exists():
            there = there.parent
        yield name, f"{folder} ({shutil.disk_usage(there).free / 1e9:,.0f} GB free)"


def _models() -> Iterator[Line]:
    yield "built in", ", ".join(model.name for model in built_in()) or "none"
    yield "in the hub cache", ", ".join(model.name for model in KNOWN if in_cache(model.name)) or "none"
    yield "hub token", "found" if huggingface_hub.get_token() else "none"


def _missing() -> Iterator[Line]:
    """What is not there, and the command that brings it."""
    there = {model.name for model in built_in()}
    for name in BUILT_IN:
        if name not in there:
            yield f"the built-in model {name}", "pip install --force-reinstall --no-deps gemscope"
    if huggingface_hub.get_token() is None:
        yield "a hub token, for Google's gated Gemma weights (the built-in models need none)", "hf auth login"
    if any(importlib.util.find_spec(name) is None for name in ("sentencepiece", "google.protobuf")):
        yield "sentencepiece, for checkpoints that only have a tokenizer.model", "pip install 'gemscope[hub]'"
    if shutil.disk_usage(Path.cwd()).free < _LOW_DISK:
        yield "disk space: a suite takes about 1 GB", "gemscope quickstart --out FOLDER_ON_ANOTHER_DISK"
