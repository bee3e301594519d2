"""An index from evidence that others counted: what it says of each latent, piece by piece."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemscope.core.errors import InputError
from gemscope.core.files import write_json
from gemscope.core.provenance import collect
from gemscope.features import database, layout
from gemscope.features.config import IndexConfig
from gemscope.features.pieces import save_pieces

Shifts = Sequence[tuple[int, float]]
"""(token, change of its logit)."""


@dataclass
class FoundContexts:
    """Token ids of all contexts, each stored once."""

    tokens: list[int] = field(default_factory=list[int])
    starts: list[int] = field(default_factory=list[int])
    _known: dict[tuple[int, ...], int] = field(default_factory=dict[tuple[int, ...], int])

    def add(self, ids: Sequence[int]) -> int:
        """Where the context starts."""
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = len(self.tokens)
            self.starts.append(len(self.tokens))
            self.tokens.extend(key)
        return self._known[key]


@dataclass(frozen=True)
class FoundExample:
    """One example."""

    token: int
    """Its place in the tokens of all contexts."""
    value: float
    near: Sequence[tuple[int, float]] = ()
    """(distance in tokens, activation) around it."""


@dataclass(frozen=True)
class FoundLatent:
    """What is known of one latent."""

    density: float = 0.0
    count: int = 0
    peak: float = 0.0
    bars: Sequence[tuple[float, int]] = ()
    """(middle, activations) of the histogram's bars."""
    promoted: Shifts = ()
    suppressed: Shifts = ()
    nearest: Sequence[tuple[int, float]] = ()
    """(latent, decoder cosine)."""
    top: Sequence[FoundExample] = ()
    groups: Sequence[Sequence[FoundExample]] = ()
    bounds: Sequence[tuple[float, float, float]] = ()
    """Of each group: lowest and highest activation, share of the activations."""
    labels: Sequence[database.Label] = ()
    """Their ``feature`` is filled in."""


def write_index(
    folder: Path,
    model: str,
    dictionaries: Mapping[str, Mapping[int, FoundLatent]],
    contexts: FoundContexts,
    pieces: Mapping[int, str],
    *,
    about: Mapping[str, Any],
    kinds: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, int],
    spelling: str = "text",
) -> None:
    """Write an index in ``folder``; raises InputError when something is there already."""
    if folder.is_dir() and any(not one.name.startswith(".") for one in folder.iterdir()):
        raise InputError(f"{folder} is not empty; choose another folder with --out.")
    config = _fitting([one for found in dictionaries.values() for one in found.values()])
    layout.save(folder / "tokens.npy", np.array(contexts.tokens, np.int32))
    layout.save(folder / "starts.npy", np.array(contexts.starts, np.int64))
    layout.save(folder / "docs.npy", np.arange(len(contexts.starts), dtype=np.int32))
    layout.save(folder / "special.npy", np.zeros(len(contexts.tokens) // 8 + 1, np.uint8))
    save_pieces(folder, pieces)
    for name, found in dictionaries.items():
        _write(folder / "dictionaries" / name, found, sizes[name], config)
    path = folder / "index.sqlite"
    database.create(path, [(name, sizes[name], kinds[name]) for name in dictionaries])
    first = 0
    for name, found in dictionaries.items():
        labels = (replace(one, feature=first + i) for i, latent in sorted(found.items()) for one in latent.labels)
        database.add_labels(path, labels)
        first += sizes[name]
    database.tidy(path)
    value = {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "model": model,
        "revision": None,
        "config": config.as_dict(),
        "tokens": 0,
        "special_tokens": 0,
        "steps": [],
        "pair_tokens": {},
        "spelling": spelling,
        "dictionaries": dict(sizes),
        "provenance": collect().as_dict(),
        **about,
    }
    write_json(folder / "index.json", value)


def _fitting(latents: Iterable[FoundLatent]) -> IndexConfig:
    """As much room as the latent with the most takes."""
    every = list(latents) or [FoundLatent()]

    def most(counts: Iterable[int]) -> int:
        return max(1, *counts, 1)

    return IndexConfig(
        top=min(255, most(len(one.top) for one in every)),
        groups=most(len(one.groups) for one in every),
        per_group=most(len(group) for one in every for group in one.groups),
        promoted=most(max(len(one.promoted), len(one.suppressed)) for one in every),
        nearest=most(len(one.nearest) for one in every),
    )


def _write(into: Path, found: Mapping[int, FoundLatent], size: int, config: IndexConfig) -> None:
    records = np.zeros(size, layout.latent_dtype(config))
    for name in ("promoted", "suppressed", "nearest", "elsewhere", "partner"):
        records[name] = -1
    bounds = np.zeros((size, config.groups, 3))
    bars: list[tuple[float, int]] = []
    examples: list[tuple[int, float, int]] = []
    near: list[tuple[int, float]] = []
    for latent in range(size):
        one, record = found.get(latent, FoundLatent()), records[latent]
        record["count"], record["density"], record["peak"] = one.count, one.density, one.peak
        record["bins"], record["n_bins"] = len(bars), len(one.bars)
        record["examples"], record["near"] = len(examples), len(near)
        bars += one.bars
        record["n_top"] = len(one.top[: config.top])
        for number, group in enumerate(one.groups):
            record["n_group"][number] = len(group)
            bounds[latent, number] = one.bounds[number]
        for example in [*one.top[: config.top], *(e for group in one.groups for e in group)]:
            examples.append((example.token, example.value, len(example.near)))
            near += example.near
        for name, pairs in (("promoted", one.promoted), ("suppressed", one.suppressed)):
            for rank, (token, by) in enumerate(pairs):
                record[name][rank], record[f"{name}_by"][rank] = token, by
        for rank, (other, cosine) in enumerate(one.nearest):
            record["nearest"][rank], record["cosine"][rank] = other, cosine
    layout.save(into / "bins.npy", np.array(bars, layout.BIN_EXACT))
    layout.save(into / "examples.npy", np.array(examples, layout.EXAMPLE))
    layout.save(into / "near.npy", np.array(near, layout.NEAR_EXACT))
    layout.save(into / "groups.npy", bounds)
    layout.save(into / "latents.npy", records)
