"""One pass over rows for any number of dictionaries: stopped, resumed and shared out at will.

Notable:
- a unit is whole once a state that contains it is there; whoever comes next does what is missing;
- in memory are one block of rows, the tallies (14 KB a latent, merging included) and a chunk of codes: nothing grows
  with the text.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemscope import __version__
from gemscope.activations import locks
from gemscope.activations.harvesting import Slice
from gemscope.artifacts.config import Loaded
from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import FormatError, InputError, OccupiedError
from gemscope.core.files import read_json, read_tensors, write_json, write_tensors
from gemscope.core.sites import Site
from gemscope.core.tensor_files import TensorFile
from gemscope.dictionaries.sparse import Support
from gemscope.features import layout
from gemscope.features.blocks import Block, Rows, Where
from gemscope.features.config import IndexConfig
from gemscope.features.tally import STEPS, Tally, step_range
from gemscope.models.gemma import Gemma

CHUNK_ROWS = 8192
"""Rows that are encoded at a time, about."""

Progress = Callable[[int, int], None]
"""Called with (done, total) rows."""


@dataclass(frozen=True, eq=False)
class Part:
    """What was counted in some units."""

    units: frozenset[int]
    tallies: Mapping[str, Tally]
    rows: int
    """Content tokens."""
    special_rows: int
    steps: Tensor
    """Content tokens in each range of positions."""


def plan_of(rows: Rows, dictionaries: Mapping[str, Loaded], config: IndexConfig) -> dict[str, Any]:
    """What a pass is made of, as plain JSON values; another pass in the same folder has to have the same."""
    described = {name: _described(loaded) for name, loaded in dictionaries.items()}
    plan = {
        "gemscope": __version__,
        "version": layout.VERSION,
        "rows": rows.describe(),
        "units": rows.units,
        "config": config.as_dict(),
    }
    return json.loads(json.dumps({**plan, "dictionaries": described}, default=str))


def _described(loaded: Loaded) -> dict[str, Any]:
    """A dictionary's config without what says only how it was made, and a hash of some of its weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(loaded.dictionary.named_parameters()):
        flat = weight.detach().reshape(-1)
        few = flat[:: max(1, len(flat) // 4096)].float().cpu()
        digest.update(name.encode() + few.numpy().tobytes())
    c = loaded.config
    about = {"kind": c.kind, "model": c.model, "revision": c.revision, "d_sae": c.d_sae, "l0": c.l0}
    sites = {"reads": [str(s) for s in c.reads], "writes": [str(s) for s in c.writes]}
    return {**about, **sites, "weights": digest.hexdigest()}


def count_units(
    folder: Path,
    rows: Rows,
    dictionaries: Mapping[str, Loaded],
    config: IndexConfig,
    *,
    share: Slice | None = None,
    progress: Progress | None = None,
) -> bool:
    """Count the units of a slice that nobody has counted; whether all units of all slices are there now.

    Raises OccupiedError for another index in that folder, in progress or not.
    """
    share = share or Slice()
    with locks.writing(folder, share.index, share.count):
        check_plan(folder, plan_of(rows, dictionaries, config))
        missing = missing_units(folder, share.of(rows.units))
        if missing:
            _count(Counter(folder, rows, dictionaries, config, share), missing, rows, progress)
        return not missing_units(folder, range(rows.units))


def check_dictionaries(rows: Rows, dictionaries: Mapping[str, Loaded]) -> None:
    """Raises InputError where there is nothing to index, or rows that a dictionary does not read."""
    if not dictionaries or not rows.units:
        raise InputError(f"nothing to index: {len(dictionaries)} dictionaries, {rows.units} units of rows.")
    for name, loaded in dictionaries.items():
        for site in loaded.config.reads:
            width, wanted = rows.width(site), loaded.dictionary.d_in
            if width != wanted:
                raise InputError(
                    f"dictionary {name} reads {wanted} numbers of {site}, but the rows have {width}; give another one."
                )


def is_finished(folder: Path) -> bool:
    """Whether an index is there as a whole."""
    return (folder / "index.json").is_file()


def check_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Note the plan of a pass in its folder; raises OccupiedError where another one is noted or something else lies."""
    path = folder / "plan.json"
    if path.is_file():
        there = read_json(path)
        if there != plan:
            parts = [name for name in plan if there.get(name) != plan[name]]
            raise OccupiedError(
                f"{folder} holds an index of other {' and '.join(parts) or 'things'}; choose another folder with --out."
            )
    else:
        there = [one.name for one in folder.iterdir() if not one.name.startswith(".")]
        if there and "plan.json" not in there:  # another slice may have written it just now
            held = "holds an index that was imported" if is_finished(folder) else "is not empty and holds no index"
            raise OccupiedError(f"{folder} {held}; choose another folder with --out.")
        write_json(path, plan)


def _count(counter: "Counter", missing: Sequence[int], rows: Rows, progress: Progress | None) -> None:
    total = rows.rows * len(missing) // rows.units
    done = 0

    def seen(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None and done < total:
            progress(done, total)

    for unit in missing:
        counter.count(unit, seen)
    if progress is not None:
        progress(done, done)


def states_of(folder: Path) -> list[Path]:
    """What was counted so far, one file for each slice that ran."""
    return sorted((folder / "counted").glob("*.safetensors"))


def counted_units(folder: Path) -> set[int]:
    """Units that are whole."""
    found: set[int] = set()
    for path in states_of(folder):
        with TensorFile(path) as file:
            found |= set(file.read("units").tolist())
    return found


def missing_units(folder: Path, wanted: Iterable[int]) -> list[int]:
    """Those of some units that are not counted yet; none of an index that is finished."""
    done = counted_units(folder)
    return [] if is_finished(folder) else [unit for unit in wanted if unit not in done]


class Counter:
    """Counts units of one slice one by one, and keeps the sum after each of them."""

    def __init__(
        self, folder: Path, rows: Rows, dictionaries: Mapping[str, Loaded], config: IndexConfig, share: Slice
    ) -> None:
        self._folder, self._rows, self._dictionaries = folder, rows, dictionaries
        self._path = folder / "counted" / f"{share.index}-of-{share.count}.safetensors"
        of = (dictionaries, config, rows)
        self._part = read_part(self._path, *of) if self._path.is_file() else empty_part(*of)
        self._sites = sites_of(dictionaries)

    def count(self, unit: int, seen: Callable[[int], None] | None = None) -> None:
        """Count one; ``seen`` is told the content tokens of each chunk."""
        wheres: list[Where] = []
        for block in self._rows.blocks(unit, self._sites):
            for start, stop in block.chunks(CHUNK_ROWS):
                for name, loaded in self._dictionaries.items():
                    support, values = encode(loaded, block, start, stop)
                    self._part.tallies[name].update(support, values, block.where[start:stop])
                if seen is not None:
                    seen(int((~block.where.special[start:stop]).sum()))
            wheres.append(block.where)
        self._part = _counted(self._part, unit, wheres)
        _write_context(self._folder, unit, wheres)
        _write_part(self._path, self._part)


@torch.no_grad()
def encode(loaded: Loaded, block: Block, start: int, stop: int) -> tuple[Support, Float[Tensor, " entries"]]:
    """The codes of some rows of a block."""
    dictionary, reads = loaded.dictionary, loaded.config.reads
    device = next(dictionary.parameters()).device
    parts = [block.rows(site, start, stop).to(device) for site in reads]
    x = parts[0] if dictionary.n_positions == 1 else torch.stack(parts, dim=1)
    return dictionary.encode_sparse(x)


def empty_part(dictionaries: Mapping[str, Loaded], config: IndexConfig, rows: Rows) -> Part:
    """Nothing counted yet."""
    share = min(1.0, config.partner_rows / max(rows.rows, 1))
    tallies = {
        name: Tally(one.dictionary.n_latents, config, share, next(one.dictionary.parameters()).device)
        for name, one in dictionaries.items()
    }
    return Part(frozenset(), tallies, 0, 0, torch.zeros(STEPS, dtype=torch.int64))


def _counted(part: Part, unit: int, wheres: Sequence[Where]) -> Part:
    special = sum(int(one.special.sum()) for one in wheres)
    rows = sum(map(len, wheres)) - special
    steps = part.steps.clone()
    for one in wheres:
        steps += torch.bincount(step_range(one.step[~one.special]), minlength=STEPS)
    return Part(part.units | {unit}, part.tallies, part.rows + rows, part.special_rows + special, steps)


def _write_context(folder: Path, unit: int, wheres: Sequence[Where]) -> None:
    """The tokens of a unit, by document and position."""
    names = ("doc", "pos", "piece", "token", "special")
    columns = {name: torch.cat([getattr(one, name) for one in wheres]) for name in names}
    order = torch.cat([one.place for one in wheres]).argsort(stable=True)
    types = {name: torch.uint8 if name == "special" else torch.int32 for name in names}
    kept = {name: column[order].to(types[name]) for name, column in columns.items()}
    write_tensors(folder / "counted" / "contexts" / f"{unit:06d}.safetensors", kept)


def _write_part(path: Path, part: Part) -> None:
    tensors = {f"{name}/{key}": x for name, tally in part.tallies.items() for key, x in tally.state().items()}
    numbers = torch.tensor([part.rows, part.special_rows])
    units = torch.tensor(sorted(part.units), dtype=torch.int64)
    write_tensors(path, {**tensors, "rows": numbers, "steps": part.steps, "units": units})


def read_part(path: Path, dictionaries: Mapping[str, Loaded], config: IndexConfig, rows: Rows) -> Part:
    """What one slice counted; raises FormatError when the file is damaged."""
    state, empty = read_tensors(path), empty_part(dictionaries, config, rows)
    try:
        for name, tally in empty.tallies.items():
            prefix = f"{name}/"
            tally.load({key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)})
        units = frozenset(state["units"].tolist())
        content, special = state["rows"].tolist()
        return Part(units, empty.tallies, content, special, state["steps"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise FormatError(f"{path} is damaged ({error}); remove it and index again.") from error


def whole(folder: Path, dictionaries: Mapping[str, Loaded], config: IndexConfig, rows: Rows) -> Part:
    """The sum over all slices."""
    total = empty_part(dictionaries, config, rows)
    for path in states_of(folder):
        part = read_part(path, dictionaries, config, rows)
        if part.units & total.units:
            raise FormatError(f"{path} counts units that another slice counted; remove one and index again.")
        for name, tally in total.tallies.items():
            tally.merge(part.tallies[name])
        units, steps = total.units | part.units, total.steps + part.steps
        total = Part(units, total.tallies, total.rows + part.rows, total.special_rows + part.special_rows, steps)
    return total


def sites_of(dictionaries: Mapping[str, Loaded]) -> list[Site]:
    """Every site that is read."""
    return list(dict.fromkeys(site for loaded in dictionaries.values() for site in loaded.config.reads))


def check_widths(gemma: Gemma, dictionaries: Mapping[str, Loaded]) -> None:
    """Raises InputError for a dictionary of other widths than a model has at its sites, SiteError for other sites."""
    for name, loaded in dictionaries.items():
        sites = [(site, loaded.dictionary.d_in) for site in loaded.config.reads]
        for site, width in [*sites, *((site, loaded.dictionary.d_out) for site in loaded.config.writes)]:
            if width != gemma.width(site):
                raise InputError(
                    f"{name} is of width {width} at {site}, but {gemma.name} has {gemma.width(site)} there; give the"
                    f" model it was made for, {loaded.config.model}, with --model."
                )
