"""The models there are: the built-in ones, and the Gemma 2 and 3 sizes on the Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gemscope.core.errors import ModelError
from gemscope.core.files import read_json
from gemscope.models.loading import BUILT_IN, locate

_YES = Text("yes", style="green")
_TEXT, _WRAPPED, _OLD = "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma2ForCausalLM"


@dataclass(frozen=True)
class Known:
    """A published model."""

    name: str
    layers: int
    d_model: int
    kind: str
    """Its class in transformers."""


def _sizes(pattern: tuple[str, ...], size: str, layers: int, d_model: int, kind: str) -> tuple[Known, ...]:
    return tuple(Known(name.format(size), layers, d_model, kind) for name in pattern)


_THREE = ("google/gemma-3-{}-pt", "google/gemma-3-{}-it")
_TWO = ("google/gemma-2-{}", "google/gemma-2-{}-it")
KNOWN: tuple[Known, ...] = (
    *_sizes(("google/gemma-3-{}", "google/gemma-3-{}-it"), "270m", 18, 640, _TEXT),
    *_sizes(_THREE, "1b", 26, 1152, _TEXT),
    *_sizes(_THREE, "4b", 34, 2560, _WRAPPED),
    *_sizes(_THREE, "12b", 48, 3840, _WRAPPED),
    *_sizes(_THREE, "27b", 62, 5376, _WRAPPED),
    *_sizes(_TWO, "2b", 26, 2304, _OLD),
    *_sizes(_TWO, "9b", 42, 3584, _OLD),
    *_sizes(_TWO, "27b", 46, 4608, _OLD),
)
"""From the published config.json files."""


def built_in() -> list[Known]:
    """The built-in models that this installation has."""
    found: list[Known] = []
    for name in BUILT_IN:
        try:
            config = read_json(locate(name, None).folder / "config.json")
        except ModelError:
            continue
        found.append(Known(name, config["num_hidden_layers"], config["hidden_size"], config["architectures"][0]))
    return found


def in_cache(name: str) -> bool:
    """Whether a hub model's weights are on this machine."""
    files = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(path := try_to_load_from_cache(name, file), str) and Path(path).is_file() for file in files)


def table() -> RenderableType:
    """All models, with what is on this machine."""
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    rows.add_column("model", no_wrap=True)
    rows.add_column("layers", justify="right")
    rows.add_column("d_model", justify="right")
    rows.add_column("class", style="dim", no_wrap=True)
    rows.add_column("here", no_wrap=True)
    for model in built_in():
        rows.add_row(model.name, str(model.layers), f"{model.d_model:,}", model.kind, _YES)
    for model in KNOWN:
        here = _YES if in_cache(model.name) else Text("–", style="dim")
        rows.add_row(model.name, str(model.layers), f"{model.d_model:,}", model.kind, here)
    note = "Any other Gemma 2 or 3 works by its hub id or its folder: --model FOLDER"
    return Group(rows, Text(), Text(note, style="dim"))
