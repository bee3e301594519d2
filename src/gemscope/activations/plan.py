"""The plan of a store: which documents make which unit, decided before the first forward pass.

Notable:
- a unit is a fixed range of documents, so its identity depends neither on how many workers there are nor on
  what they do; whoever comes first writes the plan, everybody else finds it and checks that it is theirs;
- sizes come from a sample of the documents, which also gives each site's usual norm.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch

from gemscope.activations.pieces import Pieces, batches, encode, row_tokens
from gemscope.activations.positions import RULE
from gemscope.activations.shards import ITEM_BYTES, Dtype
from gemscope.activations.sources import Source, Text
from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import read_json
from gemscope.core.sites import Site
from gemscope.models.gemma import Gemma
from gemscope.models.weights import weights_hash

FORMAT = "gemscope.store"
VERSION = 1
SAMPLE = 256
"""Documents in the sample."""
_BUCKET_BYTES = 1 << 30
_BUCKET_ROWS = 1 << 20
_FILL = 0.75


@dataclass(frozen=True)
class HarvestConfig:
    """What a store shall hold."""

    sites: tuple[str, ...]
    """Sites, as ``resid_post.3``."""
    tokens: int | None = None
    """Rows to harvest, as near as whole documents come to it; None: the whole source."""
    context: int = 1024
    """Tokens that the model reads at once; longer documents are cut."""
    dtype: str = "bfloat16"
    """What is stored: ``bfloat16`` or ``float32``."""
    bucket_rows: int | None = None
    """Rows that are shuffled together; None: a bucket of all sites takes 1 GiB, and at most 1,048,576 rows."""
    unit_rows: int | None = None
    """Rows of a unit, about; None: three quarters of a bucket."""
    batch_tokens: int = 8192
    """Positions in one forward pass, padding included."""
    packing: bool = False
    """Whether short documents share rows of a batch, each seeing itself only. Batches are larger and hold less padding,
    and attention costs more; off, since that made a CPU slower at every shape measured.
    """
    outlier_factor: float = 10.0
    """A row is an outlier when its norm at some site is this many times the site's median."""
    drop_outliers: bool = False
    """Leave outliers out, at all sites."""
    seed: int = 0
    """Of the shuffle."""

    def __post_init__(self) -> None:
        for name in ("tokens", "bucket_rows", "unit_rows", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1.")
        if self.context < 2:
            raise InputError(f"context {self.context} is below 2: a <bos> and one token; use for example 1024.")
        if self.dtype not in get_args(Dtype):
            raise InputError(f"unknown dtype {self.dtype!r} for a store; use one of {', '.join(get_args(Dtype))}.")
        if not self.outlier_factor > 1:
            raise InputError(f"outlier_factor {self.outlier_factor} must be above 1; use for example 10.")


@dataclass(frozen=True)
class SitePlan:
    """What is planned for one site."""

    width: int
    median_norm: float
    """Of the sample's rows."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides a store's bytes."""

    config: Mapping[str, Any]
    """What was asked for, resolved: options, model, source, number types."""
    sites: Mapping[Site, SitePlan]
    documents: int
    """Documents in all units."""
    unit_documents: int
    """Documents of each unit but the last."""
    bucket_rows: int
    rows_per_document: float
    """In the sample."""
    bounds: tuple[int, ...] | None = None
    """Of a merged store: the first document of each unit, and one after the last; None: all units are alike."""
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Free."""

    @property
    def id(self) -> str:
        """sha256 of what was asked for."""
        return hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode()).hexdigest()

    @property
    def units(self) -> int:
        """Number of units."""
        return math.ceil(self.documents / self.unit_documents) if self.bounds is None else len(self.bounds) - 1

    @property
    def dtype(self) -> Dtype:
        """What is stored."""
        return cast(Dtype, self.config["dtype"])

    @property
    def row_tokens(self) -> int | None:
        """Tokens of a row that short documents share; None: they do not."""
        return self.config["row_tokens"]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row at all sites."""
        return ITEM_BYTES[self.dtype] * sum(site.width for site in self.sites.values())

    def range(self, unit: int) -> tuple[int, int]:
        """Documents of a unit: (first, one after the last)."""
        if self.bounds is not None:
            return self.bounds[unit], self.bounds[unit + 1]
        return unit * self.unit_documents, min(self.documents, (unit + 1) * self.unit_documents)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, as in plan.json."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "id": self.id,
            "config": dict(self.config),
            "sites": {str(site): asdict(plan) for site, plan in self.sites.items()},
            "documents": self.documents,
            "unit_documents": self.unit_documents,
            "bucket_rows": self.bucket_rows,
            "rows_per_document": self.rows_per_document,
            "bounds": None if self.bounds is None else list(self.bounds),
            "about": dict(self.about),
        }

    @classmethod
    def of_dict(cls, value: Any, where: str) -> "Plan":
        """From plan.json; raises FormatError when it is none."""
        if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
            raise FormatError(f"{where} is no {FORMAT} of version {VERSION}; check the path.")
        try:
            sites = {Site.parse(name): SitePlan(**plan) for name, plan in value["sites"].items()}
            numbers = {
                name: value[name] for name in ("documents", "unit_documents", "bucket_rows", "rows_per_document")
            }
            bounds = None if value["bounds"] is None else tuple(value["bounds"])
            plan = cls(value["config"], sites, **numbers, bounds=bounds, about=value["about"])
            if plan.id == value["id"]:
                return plan
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{where} lacks a part ({error}); harvest again into another folder.") from error
        raise FormatError(f"{where} was changed: its id does not fit its config; harvest again into another folder.")

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """The plan of the store in ``folder``; raises FormatError when there is none."""
        return cls.of_dict(read_json(folder / "plan.json"), str(folder / "plan.json"))


def resolved(gemma: Gemma, source: Source, config: HarvestConfig) -> dict[str, Any]:
    """What was asked for as plain values, with the model and the source named exactly.

    Raises SiteError for a site that the model does not have, InputError for none or a pattern.
    """
    sites = sorted({gemma.check_site(site) for site in config.sites}, key=lambda site: site.order)
    if not sites:
        raise InputError("no site to harvest; name at least one, for example 'resid_post.0'.")
    for site in sites:
        gemma.width(site)
    context = min(config.context, gemma.shape.context)
    return {
        **asdict(config),
        "sites": [str(site) for site in sites],
        "context": context,
        "row_tokens": row_tokens(gemma.shape, context) if config.packing else None,
        "model": gemma.name,
        "revision": gemma.revision,
        "weights_sha256": None if gemma.revision else weights_hash(gemma),
        "model_dtype": str(gemma.dtype).removeprefix("torch."),
        "source": source.describe(),
        "positions": RULE,
    }


@torch.no_grad()
def make_plan(gemma: Gemma, source: Source, config: HarvestConfig, about: Mapping[str, Any] | None = None) -> Plan:
    """Look at a sample and decide the units.

    Raises InputError when the source has no text, or never ends and no number of tokens was given.
    """
    asked = resolved(gemma, source, config)
    count = source.count()
    if count is None and config.tokens is None:
        raise InputError("this source of text never ends; say how many tokens to harvest.")
    sites = [Site.parse(site) for site in asked["sites"]]
    texts = _sample(source, count)
    pieces = encode(gemma, texts, 0, asked["context"])
    rows = int(pieces.content.sum())
    if rows == 0:
        raise InputError(f"nothing to harvest: no content token in {len(texts)} documents of the source.")
    per_document = rows / len(texts)
    wanted = count if config.tokens is None else math.ceil(config.tokens / per_document)
    documents = min(wanted or 0, count if count is not None else wanted or 0)
    norms = _norms(gemma, pieces, sites, config.batch_tokens)
    planned = {site: SitePlan(gemma.width(site), norms[site]) for site in sites}
    row_bytes = ITEM_BYTES[config.dtype] * sum(site.width for site in planned.values())
    bucket = config.bucket_rows or max(1, min(_BUCKET_ROWS, _BUCKET_BYTES // row_bytes))
    unit_documents = max(1, round((config.unit_rows or _FILL * bucket) / per_document))
    return Plan(asked, planned, documents, unit_documents, bucket, per_document, about=dict(about or {}))


def check_same(plan: Plan, asked: Mapping[str, Any], folder: Path) -> None:
    """Raises InputError, naming what differs, when the store in ``folder`` was begun with something else."""
    differing = [name for name in {**plan.config, **asked} if plan.config.get(name) != asked.get(name)]
    if differing:
        shown = "; ".join(
            f"{name} {_short(plan.config.get(name))} there, {_short(asked.get(name))} now" for name in differing
        )
        raise InputError(f"{folder} holds another harvest ({shown}); choose another folder with --out.")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _sample(source: Source, count: int | None) -> list[Text]:
    """The first documents of a source without end, else eight runs of documents evenly over it."""
    if count is None or count <= SAMPLE:
        return list(source.read(0, SAMPLE if count is None else count))
    run = SAMPLE // 8
    starts = [i * (count - run) // 7 for i in range(8)]
    return [text for start in starts for text in source.read(start, start + run)]


def _norms(gemma: Gemma, pieces: Pieces, sites: Sequence[Site], batch_tokens: int) -> dict[Site, float]:
    """Median norm of the rows of the first batches of a sample."""
    chosen = np.arange(len(pieces), dtype=np.int64)
    found: dict[Site, list[float]] = {site: [] for site in sites}
    rows = 0
    for one in batches(gemma, pieces, chosen, batch_tokens):
        captured = gemma.capture(one.batch, sites)
        for site in sites:
            x = captured[site]
            kept = x.reshape(-1, x.shape[-1]).index_select(0, one.flat.to(x.device))
            found[site] += kept.float().norm(dim=1).tolist()
        rows += len(one.flat)
        if rows >= 4096:
            break
    return {site: float(np.median(norms)) for site, norms in found.items()}
