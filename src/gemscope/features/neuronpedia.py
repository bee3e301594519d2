"""Neuronpedia's bulk layout: an index written as its files, and its files read as an index.

``v1/MODEL/SOURCE/`` with ``release``, ``model``, ``sourceset`` and ``source.jsonl``, and ``features/``,
``activations/``, ``explanations/`` in batches of 1,024 features, one JSON object a line, gzip. Fields are those of the
published export; docs/formats.md says which are filled, and which are read back.
"""

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gemscope.artifacts.config import Loaded
from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import atomic_path
from gemscope.core.sites import Site
from gemscope.features import histogram, layout
from gemscope.features.database import Label
from gemscope.features.effects import directions
from gemscope.features.feature import Example
from gemscope.features.importing import FoundContexts, FoundExample, FoundLatent, write_index
from gemscope.features.index import FeatureIndex
from gemscope.features.spelling import readable

BATCH = 1024
_LEVEL = 5
_CREATOR = "gemscope"
_TOP = -1.0
"""What binMin, binMax and binContains are in the group of the strongest activations."""

FEATURE_FIELDS = tuple(
    """modelId layer index creatorId sourceSetName maxActApprox frac_nonzero freq_hist_data_bar_heights
    freq_hist_data_bar_values logits_hist_data_bar_heights logits_hist_data_bar_values neg_str neg_values pos_str
    pos_values neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices
    correlated_neurons_pearson correlated_neurons_l1 decoder_weights_dist topkCosSimIndices topkCosSimValues hasVector
    vector vectorLabel hookName vectorDefaultSteerStrength""".split()
)
ACTIVATION_FIELDS = tuple(
    """id modelId layer index creatorId dataSource tokens values maxValue minValue maxValueTokenIndex
    qualifyingTokenIndex binMin binMax binContains dfaValues dfaMaxValue dfaTargetIndex""".split()
)
EXPLANATION_FIELDS = tuple(
    "id modelId layer index authorId description embedding typeName explanationModelName notes".split()
)


def export_bundle(
    index: FeatureIndex, folder: Path | str, dictionaries: Mapping[str, Loaded] | None = None
) -> list[Path]:
    """Write every dictionary of an index under ``folder``/v1; with ``dictionaries`` decoder directions (``vector``).

    The files written; an existing one is replaced. Raises StorageError when the disk is full.
    """
    model = Path(str(index.about["model"])).name
    root, written = Path(folder) / "v1", list[Path]()
    types = sorted({label.source for label in index.database.every_label()})
    written.append(_lines(root / "config" / "explanation_type.jsonl", ({"name": one} for one in types)))
    for name in index.names:
        source = _Source.of(index, name, model)
        place = root / model / source.layer
        for file, value in source.tables(index).items():
            written.append(_lines(place / f"{file}.jsonl", [value]))
        loaded = None if dictionaries is None else dictionaries.get(name)
        for number, start in enumerate(range(0, index.sizes[name], BATCH)):
            latents = range(start, min(start + BATCH, index.sizes[name]))
            for kind, rows in source.rows(index, latents, loaded).items():
                written.append(_lines(place / kind / f"batch-{number}.jsonl.gz", rows))
    return written


@dataclass(frozen=True)
class _Source:
    """One dictionary under the names of the bundle."""

    model: str
    name: str
    layer: str
    """``{layer number}-{source set}``."""
    set_name: str
    hook: str

    @classmethod
    def of(cls, index: FeatureIndex, name: str, model: str) -> "_Source":
        kind = index.kinds[name]
        site = Site.parse(kind["reads"][0]) if kind.get("reads") else None
        if (found := re.fullmatch(r"(\d+)-(.+)", name)) is not None:
            return cls(model, name, name, found[2], site.tl_name if site else "")
        number = site.layer if site is not None and site.layer is not None else 0
        words = re.sub(rf"\.{number}(?=\.|$)", "", name, count=1)
        set_name = re.sub(r"[^a-z0-9]+", "-", f"gemscope-{words}".lower()).strip("-")
        return cls(model, name, f"{number}-{set_name}", set_name, site.tl_name if site else "")

    @property
    def _key(self) -> dict[str, str]:
        return {"modelId": self.model, "layer": self.layer}

    def tables(self, index: FeatureIndex) -> dict[str, dict[str, Any]]:
        """The one-line files."""
        kind = index.kinds[self.name]
        about = {"creatorName": _CREATOR, "urls": [], "visibility": "PUBLIC"}
        source = {
            "id": self.layer,
            "modelId": self.model,
            "setName": self.set_name,
            "creatorId": _CREATOR,
            "hasDashboards": True,
            "inferenceEnabled": False,
            "num_prompts": len(layout.load(index.folder / "starts.npy")),
            "num_tokens_in_prompt": None,
            "notes": json.dumps({"dictionary": self.name, "tokens": index.about["tokens"], **kind}),
            "visibility": "PUBLIC",
        }
        return {
            "release": {
                "name": _CREATOR,
                "description": "an index made by gemscope",
                "creatorNameShort": _CREATOR,
                **about,
            },
            "model": {"id": self.model, "displayName": self.model, "creatorId": _CREATOR},
            "sourceset": {
                "modelId": self.model,
                "name": self.set_name,
                "description": str(kind.get("kind", "")),
                "type": str(kind.get("kind", "")),
                "releaseName": _CREATOR,
                **about,
            },
            "source": source,
        }

    def rows(self, index: FeatureIndex, latents: Sequence[int], loaded: Loaded | None) -> dict[str, Iterable[Any]]:
        """Features, activations and explanations of some latents."""
        window = int(index.about["config"]["window"]) if index.about["spelling"] == "pieces" else None
        pages = [index.feature(f"{self.name}/{i}", before=window, after=window) for i in latents]
        records = index.latents(self.name).records
        bounds = _bounds(index, self.name, latents)
        pieces = index.about["spelling"] == "pieces"
        features: list[dict[str, Any]] = []
        activations: list[dict[str, Any]] = []
        explanations: list[dict[str, Any]] = []
        for at, (latent, page) in enumerate(zip(latents, pages, strict=True)):
            key = {**self._key, "index": str(latent)}
            vector = [] if loaded is None else directions(loaded, latent, latent + 1)[0].tolist()
            features.append(self._feature(key, page, records[latent], vector, pieces))
            groups: list[tuple[Sequence[Example], Sequence[float]]] = [(page.top, (_TOP, _TOP, _TOP))]
            groups += [(group, bounds[at][number].tolist()) for number, group in enumerate(page.groups)]
            count = 0
            for examples, bin_ in groups:
                for example in examples:
                    activations.append(_activation(key, f"{self.layer}-{latent}-{count}", example, bin_))
                    count += 1
            for number, label in enumerate(page.labels):
                explanations.append(_explanation(key, f"{self.layer}-{latent}-{number}", label))
        return {"features": features, "activations": activations, "explanations": explanations}

    def _feature(
        self, key: dict[str, str], page: Any, record: Any, vector: list[float], pieces: bool
    ) -> dict[str, Any]:
        filled = {
            **key,
            "creatorId": _CREATOR,
            "sourceSetName": self.set_name,
            "maxActApprox": _short(page.peak),
            "frac_nonzero": page.density,
            "freq_hist_data_bar_heights": [count for _, count in page.histogram],
            "freq_hist_data_bar_values": [_short(at) for at, _ in page.histogram],
            "pos_str": [_word(text, pieces) for text, _ in page.promoted],
            "pos_values": [_short(by) for _, by in page.promoted],
            "neg_str": [_word(text, pieces) for text, _ in page.suppressed],
            "neg_values": [_short(by) for _, by in page.suppressed],
            "topkCosSimIndices": [i for i in record["nearest"].tolist() if i >= 0],
            "topkCosSimValues": [
                _short(v) for i, v in zip(record["nearest"].tolist(), record["cosine"].tolist(), strict=True) if i >= 0
            ],
            "hasVector": bool(vector),
            "vector": vector,
            "vectorLabel": None,
            "hookName": self.hook,
            "vectorDefaultSteerStrength": None,
        }
        return {name: filled.get(name, []) for name in FEATURE_FIELDS}


def _bounds(index: FeatureIndex, name: str, latents: Sequence[int]) -> layout.Array:
    """[latents, groups, 3]: lowest and highest activation of each group, and its share of all; 0 without examples."""
    parts = index.latents(name)
    if parts.bounds is not None:
        return np.array(parts.bounds[list(latents)])
    found = np.zeros((len(latents), int(index.about["config"]["groups"]), 3))
    for at, latent in enumerate(latents):
        record = parts.records[latent]
        start = int(record["examples"]) + int(record["n_top"])
        cuts = start + np.cumsum([0, *record["n_group"].tolist()])
        values = [parts.examples[a:b]["value"].astype(np.float64) for a, b in pairwise(cuts.tolist())]
        there = [group for group, one in enumerate(values) if len(one)]
        if there:
            bins = parts.bins[int(record["bins"]) : int(record["bins"]) + int(record["n_bins"])]
            found[at, there] = _intervals(bins, {group: values[group] for group in there}, len(values))
    return found


def _intervals(bins: layout.Array, values: Mapping[int, layout.Array], groups: int) -> list[tuple[float, float, float]]:
    """Of some groups, from the activations of their examples: from where to where, and the share in between.

    A group ends at its quantile, read off the histogram along a straight line within the bin; or at its own or the next
    group's example where that would be on the wrong side.
    """
    edges, counts = histogram.edges().astype(np.float64), bins["count"].astype(np.int64)
    low, high, below = edges[bins["bin"]], edges[bins["bin"].astype(np.int64) + 1], np.cumsum(counts) - counts
    total, there = int(counts.sum()), list(values)
    ends = [min(low[0], values[there[0]].min())]
    for one, other in pairwise(there):
        wanted = (one + 1) * total / groups
        at = np.searchsorted(below + counts, wanted)
        quantile = low[at] + (high[at] - low[at]) * (wanted - below[at]) / counts[at]
        ends.append(float(np.clip(quantile, values[one].max(), values[other].min())))
    ends.append(max(high[-1], values[there[-1]].max()))
    shares = np.interp(ends, np.stack([low, high], 1).ravel(), np.stack([below, below + counts], 1).ravel() / total)
    shares[0], shares[-1] = 0, 1
    return list(zip(ends, ends[1:], np.diff(shares).tolist(), strict=False))


def _activation(key: dict[str, str], id_: str, example: Example, bin_: Sequence[float]) -> dict[str, Any]:
    values = [_short(v) for v in example.values]
    return {
        "id": id_,
        **key,
        "creatorId": _CREATOR,
        "dataSource": _CREATOR,
        "tokens": list(example.tokens),
        "values": values,
        "maxValue": max(values),
        "minValue": min(values),
        "maxValueTokenIndex": values.index(max(values)),
        "qualifyingTokenIndex": example.marked,
        "binMin": _short(bin_[0]),
        "binMax": _short(bin_[1]),
        "binContains": bin_[2],
        "dfaValues": [],
        "dfaMaxValue": None,
        "dfaTargetIndex": None,
    }


def _explanation(key: dict[str, str], id_: str, label: Label) -> dict[str, Any]:
    about = dict(label.about or {})
    return {
        "id": id_,
        **key,
        "authorId": _CREATOR,
        "description": label.text,
        "embedding": None,
        "typeName": label.source,
        "explanationModelName": about.get("explanationModelName"),
        "notes": about.get("notes"),
    }


def _word(text: str, pieces: bool) -> str:
    return "".join(readable([text])) if pieces else text


def _short(value: float) -> float:
    """A float32 as the shortest decimal that is read back as the same."""
    return float(str(np.float32(value)))


def _lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(text, _LEVEL, mtime=0) if path.suffix == ".gz" else text)
    return path


def import_bundle(bundle: Path | str, folder: Path | str, *, model: str | None = None) -> FeatureIndex:
    """Read a bundle (a folder that holds ``v1``, or a model's or a source's part of it) into an index in ``folder``.

    Dictionaries are called by their source ids, and tokens are the bundle's strings. Raises FormatError for a damaged
    file, InputError when there is no bundle or ``folder`` is not empty.
    """
    places = sorted(path.parent for path in Path(bundle).rglob("features") if path.is_dir())
    if not places:
        raise InputError(f"there is no source with features in {bundle}; give a folder in Neuronpedia's layout.")
    if len({place.parent for place in places}) > 1:
        raise InputError(f"{bundle} holds several models; give the folder of one of them.")
    words, contexts = _Words(), FoundContexts()
    found: dict[str, dict[int, FoundLatent]] = {}
    kinds: dict[str, dict[str, Any]] = {}
    tokens = 0
    for place in places:
        found[place.name] = _read_source(place, words, contexts)
        source = next(iter(_read_lines(place / "source.jsonl")), {}) if (place / "source.jsonl").is_file() else {}
        kinds[place.name] = _kind_of(source)
        tokens = max(tokens, int(kinds[place.name].pop("tokens", 0)))
    sizes = {name: max(latents, default=-1) + 1 for name, latents in found.items()}
    about = {"tokens": tokens, "rows": {"kind": "bundle", "name": Path(bundle).name}}
    name = model or places[0].parent.name
    pieces = {i: text for text, i in words.known.items()}
    write_index(Path(folder), name, found, contexts, pieces, about=about, kinds=kinds, sizes=sizes)
    return FeatureIndex.open(folder)


@dataclass
class _Words:
    """Numbers for token strings."""

    known: dict[str, int] = field(default_factory=dict[str, int])

    def ids(self, texts: Iterable[str]) -> list[int]:
        """Their numbers."""
        return [self.known.setdefault(text, len(self.known)) for text in texts]


def _kind_of(source: Mapping[str, Any]) -> dict[str, Any]:
    """What our own export noted, or what every source says."""
    try:
        noted = json.loads(source.get("notes") or "{}")
    except (TypeError, ValueError):
        noted = {}
    if isinstance(noted, dict) and "dictionary" in noted:
        return {key: value for key, value in noted.items() if key != "dictionary"}
    prompts, length = source.get("num_prompts") or 0, source.get("num_tokens_in_prompt") or 0
    return {"kind": "sae", "reads": [], "writes": [], "tokens": int(prompts) * int(length)}


def _read_source(place: Path, words: _Words, contexts: FoundContexts) -> dict[int, FoundLatent]:
    activations: dict[int, list[dict[str, Any]]] = {}
    labels: dict[int, list[Label]] = {}
    for latent, row in _read_all(place / "activations"):
        activations.setdefault(latent, []).append(row)
    for latent, row in _read_all(place / "explanations", "description"):
        about = {key: row.get(key) for key in ("explanationModelName", "notes") if row.get(key) is not None}
        text, kind = str(row["description"]), str(row.get("typeName") or "imported")
        labels.setdefault(latent, []).append(Label(0, text, kind, None, about or None))
    found: dict[int, FoundLatent] = {}
    for latent, row in _read_all(place / "features"):
        try:
            found[latent] = _latent(row, activations.pop(latent, []), labels.get(latent, []), words, contexts)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FormatError(f"feature {latent} in {place} lacks a part ({error}); fetch the bundle again.") from error
    return found


def _latent(
    row: Mapping[str, Any],
    activations: list[dict[str, Any]],
    labels: list[Label],
    words: _Words,
    contexts: FoundContexts,
) -> FoundLatent:
    def pairs(texts: str, values: str) -> list[tuple[int, float]]:
        return list(zip(words.ids(row.get(texts) or []), row.get(values) or [], strict=True))

    top: list[FoundExample] = []
    groups: dict[tuple[float, float, float], list[FoundExample]] = {}
    for one in activations:
        example = _example(one, words, contexts)
        low, high = one.get("binMin"), one.get("binMax")
        if low is None or high is None or low < 0 or low >= high:  # -1 is what the strongest have
            top.append(example)
        else:
            groups.setdefault((float(low), float(high), float(one.get("binContains") or 0)), []).append(example)
    bounds = sorted(groups)
    heights, centres = row.get("freq_hist_data_bar_heights") or [], row.get("freq_hist_data_bar_values") or []
    return FoundLatent(
        density=float(row.get("frac_nonzero") or 0.0),
        peak=float(row.get("maxActApprox") or 0.0),
        bars=list(zip(centres, map(round, heights), strict=True)),
        count=sum(map(round, heights)),
        promoted=pairs("pos_str", "pos_values"),
        suppressed=pairs("neg_str", "neg_values"),
        nearest=list(zip(row.get("topkCosSimIndices") or [], row.get("topkCosSimValues") or [], strict=True)),
        top=top,
        groups=[groups[one] for one in bounds],
        bounds=bounds,
        labels=labels,
    )


def _example(row: Mapping[str, Any], words: _Words, contexts: FoundContexts) -> FoundExample:
    values = row["values"]
    at = row.get("qualifyingTokenIndex")
    at = int(row["maxValueTokenIndex"] if at is None else at)
    if len(values) != len(row["tokens"]) or not 0 <= at < len(values):
        raise ValueError("tokens and values that do not agree")
    start = contexts.add(words.ids(row["tokens"]))
    near = [(i - at, float(v)) for i, v in enumerate(values) if v and i != at]
    return FoundExample(start + at, float(values[at]), near)


def _read_all(folder: Path, *needed: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(latent, row) of every row; raises FormatError for one without its latent's number or a field that is needed."""
    for path in sorted(folder.glob("*.jsonl*"), key=lambda one: [int(n) for n in re.findall(r"\d+", one.name)]):
        for number, row in enumerate(_read_lines(path), 1):
            lacking = [name for name in ("index", *needed) if row.get(name) is None]
            if lacking or not str(row["index"]).isdecimal():
                wrong = f"no {' and '.join(lacking)}" if lacking else f"the index {row['index']!r}, which is no latent"
                raise FormatError(f"row {number} of {path} has {wrong}; fetch the bundle again.")
            yield int(row["index"]), row


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        for line in text.split("\n"):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("a line that is no object")
                yield row
    except (OSError, EOFError, ValueError) as error:
        raise FormatError(f"{path} is missing or damaged ({error}); fetch the bundle again.") from error
