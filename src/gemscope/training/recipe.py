"""Recipes: Python files whose function ``entries(model)`` returns what to train for a model, entry by entry.

``recipes/gemma_scope_2.py`` is one. A file is the user's own program and is run as such; nothing is fetched. What is
finished of a recipe stands in ``entries.json`` of the run's folder (``Finished``).
"""

import json
import runpy
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import gemscope
from gemscope.core.errors import GemscopeError, InputError
from gemscope.core.files import read_json, write_json
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
    start: str | tuple[str, ...] | None = None
    """Name of the entry, and model after a colon if it is another one's, that this one begins from; a CLT or crosscoder
    also from several, one of each of its layers."""
    width: int = 0
    """Of the activations that are read."""
    width_out: int = 0
    """Of those that are written."""

    @property
    def starts(self) -> tuple[str, ...]:
        """``start``, however many there are."""
        return (self.start,) if isinstance(self.start, str) else self.start or ()

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
    with _blamed(path):
        entries = runpy.run_path(str(path)).get("entries")
        if not callable(entries):
            raise InputError(f"{path} has no function entries(model); see recipes/gemma_scope_2.py.")
        found = entries(model)
    if not isinstance(found, list) or not found or not all(isinstance(entry, Entry) for entry in found):  # pyright: ignore[reportUnknownVariableType]
        raise InputError(f"entries({model!r}) of {path} gave no list of Entry; it has to give one or more.")
    return found  # pyright: ignore[reportUnknownVariableType]


@contextmanager
def _blamed(path: Path) -> Generator[None]:
    """What the user's program raises, as an InputError that says where."""
    try:
        yield
    except GemscopeError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = path if line is None else f"line {line} of {path}"
        raise InputError(f"{where} raised {type(error).__name__} ({error}); mend the recipe.") from error


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
    """Entries that can share one pass over the data: the same steps, batch and calibration rows, and what one begins
    from is of an earlier pass. Raises InputError for entries that begin from one another.
    """
    by_name = {entry.name: entry for entry in entries}
    levels: dict[str, int] = {}

    def level(entry: Entry, above: tuple[str, ...] = ()) -> int:
        if entry.name in above:
            raise InputError(f"{entry.name!r} begins from itself; let it begin from another entry.")
        if entry.name not in levels:
            before = [by_name[start] for start in entry.starts if start in by_name]
            levels[entry.name] = max((1 + level(one, (*above, entry.name)) for one in before), default=0)
        return levels[entry.name]

    found: dict[tuple[int, int, int, int], list[Entry]] = {}
    for entry in sorted(entries, key=level):
        config = entry.config
        key = (level(entry), config.steps, config.batch_size, config.calibration_rows)
        found.setdefault(key, []).append(entry)
    return list(found.values())


class Finished:
    """The entries of a recipe whose dictionaries are finished in a folder, by their names."""

    def __init__(self, folder: Path, rows: str = "") -> None:
        """Of ``folder``, whose ``entries.json`` may be missing; raises FormatError when it is damaged. ``rows`` says
        what is trained on: what is finished on other rows is not finished on these.
        """
        self.folder, self._file, self._rows = folder, folder / "entries.json", rows
        self._known: dict[str, Any] = read_json(self._file) if self._file.is_file() else {}

    def dictionary(self, name: str) -> Path | None:
        """The folder of an entry's dictionary, None when it is not finished."""
        known = self._known.get(name)
        return None if known is None else self.folder / known["dictionary"]

    def __contains__(self, entry: Entry) -> bool:
        """Whether it is finished, as it is asked for."""
        folder = self.dictionary(entry.name)
        return folder is not None and folder.is_dir() and self._known[entry.name]["asked"] == self._asked(entry)

    def add(self, entries: Sequence[Entry], folders: Sequence[Path]) -> None:
        """Write down that ``entries`` are finished in ``folders``; raises StorageError."""
        for entry, folder in zip(entries, folders, strict=True):
            where = folder.relative_to(self.folder).as_posix()
            self._known[entry.name] = {"dictionary": where, "asked": self._asked(entry)}
        write_json(self._file, self._known)

    def _asked(self, entry: Entry) -> Any:
        """What is trained, and on what, as it comes back from JSON."""
        config = {"class": type(entry.config).__name__, **entry.config.as_dict()}
        return json.loads(json.dumps({"config": config, "start": entry.starts, "rows": self._rows}))
