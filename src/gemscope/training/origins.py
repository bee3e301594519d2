"""What dictionaries begin from: found in folders, of any format known, and put together where several make one."""

from collections.abc import Callable, Sequence
from pathlib import Path

from gemscope.artifacts import formats
from gemscope.artifacts.catalogue.released import Query, select
from gemscope.artifacts.config import Loaded
from gemscope.core.errors import ArtifactNotFoundError, InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.single import SingleLayer
from gemscope.training.config import MULTI_LAYER, TrainConfig
from gemscope.training.data import ActivationSource, first_rows
from gemscope.training.recipe import Finished
from gemscope.training.selection import from_single_layers

Origin = Callable[[], Sequence[Loaded]]
"""Reads what one dictionary begins from."""


def begin(config: TrainConfig, loaded: Sequence[Loaded], data: ActivationSource) -> Dictionary:
    """What ``config`` begins from, put together on rows of ``data`` where it is several dictionaries. Raises InputError
    for those that do not make one.
    """
    if config.kind in MULTI_LAYER and any(one.config.kind not in MULTI_LAYER for one in loaded):
        return together(config, loaded, data)
    if len(loaded) != 1:
        raise InputError(f"a {config.kind} begins from one dictionary of its kind, not from {len(loaded)}.")
    return loaded[0].dictionary


def together(config: TrainConfig, loaded: Sequence[Loaded], data: ActivationSource) -> Dictionary:
    """A CLT of transcoders or a crosscoder of SAEs, one of each layer; raises InputError when they are not that."""
    wanted = ("sae",) if config.kind == "crosscoder" else ("transcoder", "skip_transcoder")
    by_site: dict[Site, SingleLayer] = {}
    for one in loaded:
        places = dict(zip(config.reads, config.writes, strict=True))
        if one.config.kind not in wanted or places.get(one.config.site) != one.config.writes[0]:
            raise InputError(
                f"a {config.kind} that reads {config.reads[0]} to {config.reads[-1]} cannot begin from a"
                f" {one.config.kind} that reads {one.config.site}; give one {wanted[0]} of each of its layers."
            )
        assert isinstance(one.dictionary, SingleLayer)
        by_site[one.config.site] = one.dictionary
    if len(by_site) != len(loaded) or len(by_site) != len(config.reads):
        raise InputError(
            f"a {config.kind} of layers {', '.join(map(str, config.layers))} begins from one {wanted[0]} of each, not"
            f" from {len(loaded)} of {', '.join(map(str, by_site))}."
        )
    members = [by_site[site] for site in config.reads]
    skips = sum(one.W_skip is not None for one in members)
    if skips != (len(members) if getattr(config, "skip", False) else 0):
        raise InputError(
            f"{skips} of the {len(members)} dictionaries to begin from have a skip connection; give all of them one and"
            " ask for 'skip', or none."
        )
    rows = first_rows(data, config.reads, config.calibration_rows, config.batch_size, config.seed)
    x = [rows[site] for site in config.reads]
    return from_single_layers(config.kind, members, config.d_sae, x, config.prefixes)[0]


def find(start: str, folders: Sequence[Path]) -> Path:
    """Where what a recipe's entry begins from is: in the folder of a run of that recipe, in what ``gemscope fetch``
    brought, or in a folder that holds it by its name.

    Raises InputError, with how to get it, when it is in none of ``folders``.
    """
    name, _, model = start.partition(":")
    released = _released(name, model)
    for folder in folders:
        places = [folder / name, *(folder / part for part in released)]
        if (finished := Finished(folder).dictionary(name)) is not None:
            places.insert(0, finished)
        if (place := next((one for one in places if one.is_dir()), None)) is not None:
            return place
    where = f"which is not in {' or '.join(map(str, folders))}" if folders else "for which no folder was given"
    how = f"fetch it with gemscope fetch {Path(*released[0].parts[1:])}, or train it" if released else "train it"
    whose = f" of {model}" if model else ""
    raise InputError(f"an entry begins from {name}{whose}, {where}; {how}, and give the folder as --from.")


def _released(name: str, model: str) -> list[Path]:
    """Where ``gemscope fetch`` puts the released dictionary of that name, in its folder and in the repository's."""
    if not model:
        return []
    try:
        found = select(Query(model=model, names=(f"*/{name}",)))
    except (ArtifactNotFoundError, InputError):
        return []
    return [Path(*parts) for one in found for parts in ((one.repo, one.folder), (one.folder,))]


def read(path: Path) -> Loaded:
    """One dictionary of any format known, in fp32; raises FormatError."""
    loaded = formats.load(path)
    loaded.dictionary.float()
    return loaded
