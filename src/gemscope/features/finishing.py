"""From what was counted to the files of an index."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemscope.activations import locks
from gemscope.artifacts.config import Loaded
from gemscope.core.arrays import Int, Tensor
from gemscope.core.files import read_tensors, write_json
from gemscope.core.provenance import collect
from gemscope.features import database, effects, layout
from gemscope.features.best import Best
from gemscope.features.blocks import POSITION_BITS
from gemscope.features.config import IndexConfig
from gemscope.features.histogram import groups_of_sample
from gemscope.features.passing import Part
from gemscope.features.pieces import save_pieces
from gemscope.features.spelling import readable
from gemscope.features.tally import Tally
from gemscope.models.gemma import Gemma

_WORDS = 6
"""Tokens in the label that is made from a latent's strongest tokens."""


def finish(
    folder: Path,
    part: Part,
    dictionaries: Mapping[str, Loaded],
    config: IndexConfig,
    gemma: Gemma | None,
    rows: Mapping[str, Any],
) -> None:
    """Write all files, ``index.json`` last, and remove what was counted; after a stop all is written again."""
    places, tokens = write_contexts(folder, part.rows + part.special_rows)
    for name in dictionaries:
        _write_dictionary(folder, name, dictionaries, part, config, gemma, places)
    del places
    _write_database(folder, dictionaries, gemma, tokens)
    model = gemma or next(iter(dictionaries.values())).config
    about = {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "model": model.name if isinstance(model, Gemma) else model.model,
        "revision": model.revision,
        "config": config.as_dict(),
        "rows": dict(rows),
        "tokens": part.rows,
        "special_tokens": part.special_rows,
        "steps": part.steps.tolist(),
        "pair_tokens": {name: tally.pair_rows for name, tally in part.tallies.items()},
        "dictionaries": {name: one.dictionary.n_latents for name, one in dictionaries.items()},
        "spelling": "pieces",
        "provenance": collect(seeds={"seed": config.seed}).as_dict(),
    }
    write_json(folder / "index.json", json.loads(json.dumps(about, default=str)))
    for done in ("counted", locks.FOLDER):  # who waits for the lock finds index.json when it has it
        shutil.rmtree(folder / done, ignore_errors=True)


def write_contexts(folder: Path, count: int) -> tuple[Int[Tensor, " tokens"], layout.Array]:
    """The ``count`` tokens of all units; (document and position of each in one number, the tokens).

    Takes 18 bytes of memory a token, and one unit; 48 where units are not in the order of documents.
    """
    places, tokens = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int32)
    special, fresh = torch.empty(count, dtype=torch.uint8), torch.ones(count, dtype=torch.bool)
    start = 0
    for path in sorted((folder / "counted" / "contexts").glob("*.safetensors")):
        unit = read_tensors(path)
        doc, piece = unit["doc"], unit["piece"]
        here = slice(start, start + len(doc))
        places[here] = (doc.long() << POSITION_BITS) | unit["pos"]
        tokens[here], special[here] = unit["token"], unit["special"]
        fresh[here][1:] = (doc[1:] != doc[:-1]) | (piece[1:] != piece[:-1])
        start = here.stop
    assert start == count
    if bool((places[1:] <= places[:-1]).any()):
        places, order = places.sort()
        tokens, special, fresh = tokens[order], special[order], fresh[order]
    starts = fresh.nonzero()[:, 0]
    layout.save(folder / "starts.npy", starts.numpy())
    layout.save(folder / "docs.npy", (places[starts] >> POSITION_BITS).int().numpy())
    layout.save(folder / "tokens.npy", tokens.numpy())
    layout.save(folder / "special.npy", np.packbits(special.numpy()))
    return places, tokens.numpy()


def _write_dictionary(
    folder: Path,
    name: str,
    dictionaries: Mapping[str, Loaded],
    part: Part,
    config: IndexConfig,
    gemma: Gemma | None,
    places: Int[Tensor, " tokens"],
) -> None:
    tally, loaded, into = part.tallies[name], dictionaries[name], folder / "dictionaries" / name
    records = np.zeros(tally.latents, layout.latent_dtype(config))
    records["count"] = tally.count.cpu()
    records["density"] = records["count"] / max(part.rows, 1)
    for field in ("peak", "special_count", "special_peak", "steps"):
        records[field] = getattr(tally, field).cpu()
    layout.save(into / "bins.npy", _bins(tally, records))
    examples, near = _examples(tally, config, places, records)
    layout.save(into / "examples.npy", examples)
    layout.save(into / "near.npy", near)
    _relatives(name, dictionaries, tally, config, records)
    _tokens(into, loaded, config, gemma, records)
    layout.save(into / "latents.npy", records)


def _bins(tally: Tally, records: layout.Array) -> layout.Array:
    """Bins that are not empty, latent by latent."""
    counts = tally.histogram.cpu()
    latent, bins = counts.nonzero(as_tuple=True)
    records["n_bins"] = (counts > 0).sum(1)
    records["bins"] = _starts(records["n_bins"])
    found = np.zeros(len(latent), layout.BIN)
    found["bin"], found["count"] = bins, counts[latent, bins]
    return found


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Examples, in any order."""

    latent: Tensor
    slot: Tensor
    """0 for the strongest, 1 + g for quantile group g."""
    rank: Tensor
    place: Tensor
    value: Tensor
    near: Tensor


def _taken(best: Best, keep: Tensor, slot: Tensor) -> _Chosen:
    latent, rank = keep.nonzero(as_tuple=True)
    at = (latent, rank)
    return _Chosen(latent, slot[at], rank, best.place[at], best.value[at], best.near[at])


def quantile_groups(tally: Tally) -> Int[Tensor, "latents sample"]:
    """The quantile group of every sampled token; -1 where there is none."""
    tally.sample.settle()
    values = tally.sample.value.masked_fill(tally.sample.score < 0, 0)
    return groups_of_sample(tally.histogram.long(), values, tally.config.groups)


def _examples(
    tally: Tally, config: IndexConfig, places: Tensor, records: layout.Array
) -> tuple[layout.Array, layout.Array]:
    tally.top.settle()
    filled = tally.top.score >= 0
    parts = [_taken(tally.top, filled, torch.zeros_like(tally.top.score))]
    group = quantile_groups(tally)
    for number in range(config.groups):
        mine = group == number
        parts.append(_taken(tally.sample, mine & (mine.cumsum(1) <= config.per_group), group + 1))
    columns = (
        torch.cat([getattr(one, name) for one in parts]).cpu() for name in ("latent", "slot", "rank", "place", "value")
    )
    latent, slot, rank, place, value = columns
    near = torch.cat([one.near for one in parts]).cpu()
    order = ((latent.long() * (config.groups + 1) + slot.long()) * (1 << 20) + rank.long()).argsort()
    latent, slot, place, value, near = (x[order] for x in (latent, slot, place, value, near))
    near[:, config.window] = 0
    index, at = near.nonzero(as_tuple=True)
    examples, around = np.zeros(len(order), layout.EXAMPLE), np.zeros(len(index), layout.NEAR)
    examples["token"], examples["value"] = torch.searchsorted(places, place), value
    examples["near"] = torch.bincount(index, minlength=len(order))
    around["at"], around["value"] = at - config.window, near[index, at].view(torch.int16).numpy().view(np.uint16)
    counts = torch.zeros(tally.latents, config.groups + 1, dtype=torch.int64)
    counts.index_put_((latent, slot.long()), torch.ones_like(latent), accumulate=True)
    records["n_top"], records["n_group"] = counts[:, 0], counts[:, 1:]
    records["examples"] = _starts(counts.sum(1).numpy())
    per_latent = torch.bincount(
        latent, weights=torch.from_numpy(examples["near"].astype(np.float64)), minlength=len(counts)
    )
    records["near"] = _starts(per_latent.numpy())
    return examples, around


def _starts(counts: layout.Array) -> layout.Array:
    counts = counts.astype(np.int64)
    return np.cumsum(counts) - counts


def _relatives(
    name: str, dictionaries: Mapping[str, Loaded], tally: Tally, config: IndexConfig, records: layout.Array
) -> None:
    """Nearest latents and partners."""
    number = {other: i for i, other in enumerate(dictionaries)}
    mine = dictionaries[name]
    own, _ = effects.nearest(mine, {number[name]: mine}, config.nearest, same=True)
    records["nearest"], records["cosine"] = own.ids, own.values
    others = {number[other]: loaded for other, loaded in dictionaries.items() if other != name}
    away, which = effects.nearest(mine, others, config.nearest, same=False)
    records["elsewhere"], records["elsewhere_cosine"], records["elsewhere_in"] = away.ids, away.values, which
    together, count = effects.partners(*tally.pairs, tally.latents, config.partners)
    records["partner"], records["partner_jaccard"] = together.ids, together.values
    records["partner_count"] = count


def _tokens(into: Path, loaded: Loaded, config: IndexConfig, gemma: Gemma | None, records: layout.Array) -> None:
    """Promoted and suppressed tokens; of a multi-layer kind also by output layer."""
    for field in ("promoted", "suppressed"):
        records[field] = -1
    if gemma is None or (found := effects.promoted(gemma, loaded, config.promoted)) is None:
        return
    for field, ranked in zip(("promoted", "suppressed"), found, strict=True):
        records[field][:, : ranked.ids.shape[1]] = ranked.ids
        records[f"{field}_by"][:, : ranked.ids.shape[1]] = ranked.values
    n = loaded.dictionary.n_positions
    if n > 1:
        outs = np.zeros((len(records), n, config.promoted), layout.OUTPUT)
        outs["token"] = outs["low_token"] = -1
        layer = np.arange(len(records)) // loaded.dictionary.d_sae
        for out in range(n):
            if (found := effects.promoted(gemma, loaded, config.promoted, out)) is not None:
                written = np.flatnonzero(layer <= out)
                for of, ranked in zip(("", "low_"), found, strict=True):
                    width = ranked.ids.shape[1]
                    outs[f"{of}token"][written, out, :width] = ranked.ids.numpy()[written]
                    outs[f"{of}by"][written, out, :width] = ranked.values.numpy()[written]
        layout.save(into / "outputs.npy", outs)


def _write_database(
    folder: Path, dictionaries: Mapping[str, Loaded], gemma: Gemma | None, tokens: layout.Array
) -> None:
    path = folder / "index.sqlite"
    database.create(
        path, [(name, one.dictionary.n_latents, about_dictionary(one)) for name, one in dictionaries.items()]
    )
    used = set(np.unique(tokens).tolist())
    for name in dictionaries:
        place = folder / "dictionaries" / name
        arrays = [layout.load(path) for path in (place / "latents.npy", place / "outputs.npy") if path.is_file()]
        for array in arrays:
            fields = {"promoted", "suppressed", "token", "low_token"}.intersection(array.dtype.names or ())
            used |= {i for field in fields for i in np.unique(array[field]).tolist()}
    pieces = _pieces(gemma, sorted(used - {-1}))
    save_pieces(folder, pieces)
    first = 0
    for name, loaded in dictionaries.items():
        database.add_labels(path, token_labels(folder / "dictionaries" / name, first, tokens, pieces))
        first += loaded.dictionary.n_latents
    database.tidy(path)


def about_dictionary(loaded: Loaded) -> dict[str, Any]:
    """What an index says of a dictionary."""
    c = loaded.config
    sites = {"reads": [str(s) for s in c.reads], "writes": [str(s) for s in c.writes]}
    return {"kind": c.kind, "d_sae": c.d_sae, "d_out": c.d_out, "l0": c.l0, "model": c.model, **sites}


def _pieces(gemma: Gemma | None, ids: Sequence[int]) -> dict[int, str]:
    if gemma is None:
        return {i: f"#{i}" for i in ids}
    texts = gemma.tokenizer.convert_ids_to_tokens(list(ids))
    return dict(zip(ids, map(str, texts), strict=True))


def token_labels(folder: Path, first: int, tokens: layout.Array, pieces: Mapping[int, str]) -> Iterator[database.Label]:
    """For each latent the words on which it is strongest, the commonest first."""
    words = {i: word for i, text in pieces.items() if (word := "".join(readable([text])).strip())}
    records, examples = layout.load(folder / "latents.npy"), layout.load(folder / "examples.npy")
    start, count = records["examples"].astype(np.int64), records["n_top"].astype(np.int64)
    at = tokens[examples["token"]]
    for latent in np.argsort(-records["density"], kind="stable").tolist():
        mine = at[start[latent] : start[latent] + count[latent]].tolist()
        common = Counter(words[i] for i in mine if i in words).most_common(_WORDS)
        if common:
            yield database.Label(first + latent, " ".join(word for word, _ in common), "tokens")
