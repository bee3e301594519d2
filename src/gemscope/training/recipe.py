"""Recipes: Python files whose function ``entries(model)`` returns what to train for a model, entry by entry.

``recipes/gemma_scope_2.py`` is one. A file is the user's own program and is run as such; nothing is fetched.
"""

import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import gemscope
from gemscope.core.errors import InputError
from gemscope.training.config import TrainConfig

PLACES = (Path(gemscope.__file__).parent / "data" / "recipes", Path(gemscope.__file__).parents[2] / "recipes")
"""Where recipes are found by name: in the installed package, in a checkout."""


@dataclass(frozen=True)
class Entry:
    """One dictionary of a recipe."""

    name: str
    """As the artefact is called, such as ``resid_post/layer_12_width_16k_l0_small``."""
    config: TrainConfig
    tokens: int
    """Rows to train on; ``config.steps`` times ``config.batch_size``, rounded."""
    start: str | None = None
    """Name of the entry, and model after a colon if it is another one's, that this one begins from."""
    width: int = 0
    """Of the activations that are read."""
    width_out: int = 0
    """Of those that are written."""

    @property
    def activation_bytes(self) -> float:
        """Stored rows in bf16, once, of all sites of this entry."""
        config = self.config
        both = self.width * len(config.reads) + (self.width_out * len(config.writes) if config.target_site else 0)
        return 2.0 * self.tokens * both

    @property
    def flops(self) -> float:
        """Of the encoder products forward, and twice as much for the share that the sparse parts take."""
        return 2.0 * self.tokens * self.width * self.config.d_sae * len(self.config.reads)


def load(name: str, model: str) -> list[Entry]:
    """The entries of a recipe, given by path or name; raises InputError when there is none."""
    paths = [Path(name), *(place / f"{name.removesuffix('.py')}.py" for place in PLACES)]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        known = sorted({p.stem for place in PLACES if place.is_dir() for p in place.glob("*.py")})
        raise InputError(f"there is no recipe {name!r}; give a path, or one of {', '.join(known)}.")
    entries = runpy.run_path(str(path)).get("entries")
    if not callable(entries):
        raise InputError(f"{path} has no function entries(model); see recipes/gemma_scope_2.py.")
    found = entries(model)
    if not isinstance(found, list) or not all(isinstance(entry, Entry) for entry in found):  # pyright: ignore[reportUnknownVariableType]
        raise InputError(f"entries({model!r}) of {path} gave no list of Entry.")
    return found  # pyright: ignore[reportUnknownVariableType]


def select(entries: Sequence[Entry], patterns: Sequence[str]) -> list[Entry]:
    """Those whose names match one of the patterns (``resid_post/*_16k_*``), all without patterns.

    Raises InputError when a pattern matches nothing.
    """
    if not patterns:
        return list(entries)
    for pattern in patterns:
        if not any(fnmatchcase(entry.name, pattern) for entry in entries):
            raise InputError(f"no entry matches {pattern!r}; the first is called {entries[0].name!r}.")
    return [entry for entry in entries if any(fnmatchcase(entry.name, pattern) for pattern in patterns)]


def passes(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries that can share one pass over the data: the same steps, batch and calibration rows."""
    found: dict[tuple[int, int, int], list[Entry]] = {}
    for entry in entries:
        config = entry.config
        found.setdefault((config.steps, config.batch_size, config.calibration_rows), []).append(entry)
    return list(found.values())
