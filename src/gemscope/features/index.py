"""An index of features: made in one pass over rows, opened in an instant, read latent by latent."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gemscope.activations import locks
from gemscope.activations.harvesting import Slice
from gemscope.artifacts.config import Loaded
from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import read_json
from gemscope.features import histogram, layout
from gemscope.features.blocks import Rows
from gemscope.features.config import IndexConfig
from gemscope.features.contexts import Contexts, Span
from gemscope.features.database import Database, Label
from gemscope.features.feature import Example, Feature, FeatureId, Relative
from gemscope.features.finishing import finish
from gemscope.features.passing import (
    Progress,
    check_dictionaries,
    check_plan,
    count_units,
    is_finished,
    plan_of,
    whole,
)
from gemscope.features.pieces import Pieces
from gemscope.features.spelling import Reader
from gemscope.models.gemma import Gemma


def index(
    folder: Path | str,
    rows: Rows,
    dictionaries: Mapping[str, Loaded],
    config: IndexConfig | None = None,
    *,
    gemma: Gemma | None = None,
    share: Slice | None = None,
    progress: Progress | None = None,
) -> "FeatureIndex | None":
    """Index ``dictionaries`` (name -> dictionary) over ``rows`` in ``folder``, or what is missing of that, or a slice.

    ``gemma`` is needed for promoted tokens and spellings. The result depends on rows, dictionaries and config only, not
    on slices, interruptions or resumes; None while other slices have not done theirs. Raises OccupiedError for another
    index in that folder, InputError for dictionaries of other rows, StorageError when the disk is full.
    """
    folder, config = Path(folder), config or IndexConfig()
    check_dictionaries(rows, dictionaries)
    if is_finished(folder):
        check_plan(folder, plan_of(rows, dictionaries, config))
    elif not count_units(folder, rows, dictionaries, config, share=share, progress=progress):
        return None
    else:
        with locks.finishing(folder):
            if not is_finished(folder):  # by a slice that ended at the same time
                part = whole(folder, dictionaries, config, rows)
                finish(folder, part, dictionaries, config, gemma, rows.describe())
    return FeatureIndex.open(folder)


@dataclass(frozen=True, eq=False)
class Latents:
    """The arrays of one dictionary, memory-mapped."""

    records: layout.Array
    bins: layout.Array
    examples: layout.Array
    near: layout.Array
    outputs: layout.Array | None
    bounds: layout.Array | None
    """Of an import: [latents, groups, 3], lowest and highest activation of each group, and its share."""


_PARTS = ("latents", "bins", "examples", "near")
_MORE = ("outputs", "groups")
"""Arrays that not every dictionary has."""
_SQLITE_HEAD = 1 << 14
"""Bytes of the database in which the list of dictionaries lies, unless there are many."""


@dataclass(frozen=True, eq=False)
class FeatureIndex:
    """An open index. Make one with ``index``, open it with ``FeatureIndex.open``."""

    folder: Path
    about: Mapping[str, Any]
    """``index.json``."""
    database: Database
    names: tuple[str, ...]
    """Of the dictionaries, in order."""
    sizes: Mapping[str, int]
    firsts: Mapping[str, int]
    """Number of each dictionary's first latent over all dictionaries."""
    kinds: Mapping[str, Mapping[str, Any]]
    """What is known of each dictionary: kind, sites, sizes."""

    @classmethod
    def open(cls, folder: Path | str) -> "FeatureIndex":
        """Read ``index.json``; raises FormatError when there is no finished index."""
        folder = Path(folder)
        layout.prefetch_heads([folder / "index.json", folder / "index.sqlite"], _SQLITE_HEAD)
        Contexts.prefetch(folder)
        Pieces.prefetch(folder)
        if not (folder / "index.json").is_file():
            raise FormatError(f"there is no finished index in {folder}; make it with: gemscope index --out {folder}")
        about = read_json(folder / "index.json")
        if (
            not isinstance(about, dict)
            or about.get("format") != layout.FORMAT
            or about.get("version") != layout.VERSION
        ):
            raise FormatError(f"{folder} holds no {layout.FORMAT} of version {layout.VERSION}; make the index again.")
        base = Database(folder / "index.sqlite")
        rows = base.dictionaries()
        return cls(
            folder,
            about,
            base,
            tuple(name for name, *_ in rows),
            {name: latents for name, latents, _, _ in rows},
            {name: first for name, _, first, _ in rows},
            {name: kind for name, _, _, kind in rows},
        )

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def find_id(self, text: str | FeatureId) -> FeatureId:
        """Read ``resid_post.4/1234``; raises InputError with what there is."""
        if isinstance(text, FeatureId):
            name, number = text.dictionary, str(text.latent)
        else:
            name, _, number = text.rpartition("/")
        if name not in self.sizes:
            raise InputError(
                f"there is no dictionary {name!r} in {self.folder}; write for example {self.names[0]}/0"
                f" (dictionaries: {', '.join(self.names)})."
            )
        if not number.isdecimal() or int(number) >= self.sizes[name]:
            raise InputError(f"there is no latent {number!r} of {name}; it has latents 0 to {self.sizes[name] - 1}.")
        return FeatureId(name, int(number))

    def number(self, feature: str | FeatureId) -> int:
        """The latent's number over all dictionaries."""
        found = self.find_id(feature)
        return self.firsts[found.dictionary] + found.latent

    def id_of(self, number: int) -> FeatureId:
        """The way back."""
        name = next(name for name in reversed(self.names) if self.firsts[name] <= number)
        return FeatureId(name, number - self.firsts[name])

    @cached_property
    def contexts(self) -> Contexts:
        """The texts that it was made over."""
        return Contexts(self.folder)

    @cached_property
    def pieces(self) -> Pieces:
        """How its tokens are spelled."""
        return Pieces(self.folder)

    @cached_property
    def _open(self) -> dict[str, Latents]:
        return {}

    def latents(self, name: str) -> Latents:
        """The arrays of a dictionary; ``records`` has one record a latent (docs/formats.md)."""
        if name not in self._open:
            folder = self.folder / "dictionaries" / name
            parts, more = ([folder / f"{part}.npy" for part in some] for some in (_PARTS, _MORE))
            layout.prefetch_heads([*parts, *more], layout.HEAD)
            records, bins, examples, near = map(layout.load, parts)
            outputs, bounds = (layout.load(path) if path.is_file() else None for path in more)
            self._open[name] = Latents(records, bins, examples, near, outputs, bounds)
        return self._open[name]

    def feature(self, feature: str | FeatureId, *, before: int | None = 24, after: int | None = 24) -> Feature:
        """The page of a latent; examples have ``before`` and ``after`` tokens around the marked one (None: the whole
        context). Raises InputError for a latent that does not exist.
        """
        found = self.find_id(feature)
        with ThreadPoolExecutor(1) as beside:  # what is not in memory yet is read from the disk at the same time
            labels = beside.submit(self.database.labels, self.number(found))
            return self._page(found, before, after, labels)

    def _page(self, found: FeatureId, before: int | None, after: int | None, labels: Future[list[Label]]) -> Feature:
        parts = self.latents(found.dictionary)
        layout.prefetch(parts.records, np.array([found.latent]), 2)
        record = parts.records[found.latent]
        self._expect(parts, record, found.latent)
        raw = list(self._raw_examples(parts, record))
        spans = self.contexts.spans([token for token, *_ in raw], before, after)
        spelled = self._spellings(record, parts, found.latent, spans)
        read = Reader(spelled, marked=self.about["spelling"] == "pieces")
        examples = [_example(*one, span, read(span.ids)) for one, span in zip(raw, spans, strict=True)]
        cuts = np.cumsum([0, int(record["n_top"]), *record["n_group"].tolist()]).tolist()
        groups = [examples[a:b] for a, b in pairwise(cuts[1:])]
        return Feature(
            id=str(found),
            labels=tuple(labels.result()),
            count=int(record["count"]),
            density=float(record["density"]),
            peak=float(record["peak"]),
            special_count=int(record["special_count"]),
            special_peak=float(record["special_peak"]),
            steps=tuple(record["steps"].tolist()),
            histogram=self._histogram(parts, record),
            promoted=_shifts(record["promoted"], record["promoted_by"], spelled),
            suppressed=_shifts(record["suppressed"], record["suppressed_by"], spelled),
            by_output=_by_output(parts, found.latent, "", spelled),
            suppressed_by_output=_by_output(parts, found.latent, "low_", spelled),
            nearest=self._relatives(found.dictionary, record["nearest"], record["cosine"]),
            elsewhere=tuple(
                Relative(f"{self.names[which]}/{latent}", float(value))
                for which, latent, value in zip(
                    record["elsewhere_in"].tolist(),
                    record["elsewhere"].tolist(),
                    record["elsewhere_cosine"],
                    strict=True,
                )
                if latent >= 0
            ),
            partners=self._relatives(
                found.dictionary, record["partner"], record["partner_jaccard"], record["partner_count"]
            ),
            top=tuple(examples[: cuts[1]]),
            groups=tuple(map(tuple, groups)),
            bounds=()
            if parts.bounds is None
            else tuple((low, high) for low, high, _ in parts.bounds[found.latent].tolist()),
        )

    def _expect(self, parts: Latents, record: Any, latent: int) -> None:
        """Ask for all that the record refers to."""
        examples = int(record["n_top"]) + int(record["n_group"].sum())
        after = int(parts.records["near"][latent + 1]) if latent + 1 < len(parts.records) else len(parts.near)
        for array, field, count in (
            (parts.examples, "examples", examples),
            (parts.near, "near", after - int(record["near"])),
            (parts.bins, "bins", int(record["n_bins"])),
        ):
            layout.prefetch(array, record[field].reshape(1).astype(np.int64), count)

    def _histogram(self, parts: Latents, record: Any) -> tuple[tuple[float, int], ...]:
        start = int(record["bins"])
        bins = parts.bins[start : start + int(record["n_bins"])]
        at = histogram.centres()[bins["bin"]] if "bin" in (bins.dtype.names or ()) else bins["centre"]
        return tuple(zip(at.tolist(), bins["count"].tolist(), strict=True))

    def _raw_examples(self, parts: Latents, record: Any) -> Iterator[tuple[int, float, list[tuple[int, float]]]]:
        """(token, activation, activations around it) of each example."""
        start = int(record["examples"])
        count = int(record["n_top"]) + int(record["n_group"].sum())
        near = int(record["near"])
        rows = np.array(parts.examples[start : start + count])
        around = np.array(parts.near[near : near + int(rows["near"].sum())])
        values = layout.bfloat16(around["value"]) if around["value"].dtype.kind == "u" else around["value"]
        pairs = list(zip(around["at"].tolist(), values.tolist(), strict=True))
        ends = np.cumsum(rows["near"], dtype=np.int64).tolist()
        every = zip(rows["token"].tolist(), rows["value"].tolist(), [0, *ends], ends, strict=False)
        for token, value, first, last in every:
            yield token, value, pairs[first:last]

    def _spellings(self, record: Any, parts: Latents, latent: int, spans: Sequence[Span]) -> dict[int, str]:
        """Spellings of every token on the page, in one question."""
        ids = {*record["promoted"].tolist(), *record["suppressed"].tolist()}
        if parts.outputs is not None:
            names = {"token", "low_token"}.intersection(parts.outputs.dtype.names or ())
            ids |= {i for name in names for i in parts.outputs[latent][name].reshape(-1).tolist()}
        return self.pieces.of(ids.union(*(span.ids for span in spans)))

    def _relatives(self, name: str, ids: Any, values: Any, counts: Any = None) -> tuple[Relative, ...]:
        every = zip(
            ids.tolist(), values.tolist(), counts.tolist() if counts is not None else [None] * len(ids), strict=True
        )
        return tuple(Relative(f"{name}/{i}", value, count) for i, value, count in every if i >= 0)


def _example(
    token: int, value: float, around: Sequence[tuple[int, float]], span: Span, words: Sequence[str]
) -> Example:
    low, high = span.low, span.high
    values = [0.0] * (high - low)
    for distance, one in [*around, (0, value)]:
        if low <= token + distance < high:
            values[token + distance - low] = one
    shown = tuple(words[low - span.start : high - span.start])
    return Example(shown, tuple(values), token - low, value, span.special, span.doc, low - span.first)


def _by_output(
    parts: Latents, latent: int, of: str, spelled: Mapping[int, str]
) -> tuple[tuple[tuple[str, float], ...], ...]:
    if parts.outputs is None or f"{of}token" not in (parts.outputs.dtype.names or ()):
        return ()
    return tuple(_shifts(one[f"{of}token"], one[f"{of}by"], spelled) for one in parts.outputs[latent])


def _shifts(ids: Any, by: Any, spelled: Mapping[int, str]) -> tuple[tuple[str, float], ...]:
    pairs = zip(ids.tolist(), by.tolist(), strict=True)
    return tuple((spelled.get(i, ""), float(value)) for i, value in pairs if i >= 0)
