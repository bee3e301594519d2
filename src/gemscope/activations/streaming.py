"""Activations made while they are wanted: the interface of a store, without a disk.

Units of the source are permuted, a few at a time are open, their documents are permuted and run in pools, and the
rows of a pool are permuted: the shuffle of a store, with a forward pass in the place of a read.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gemscope.activations.order import LIVE_ROWS, LIVE_TEXTS, LIVE_UNITS, Position
from gemscope.activations.passes import Passes
from gemscope.activations.pieces import encode
from gemscope.activations.plan import HarvestConfig, Plan, make_plan
from gemscope.activations.planned import PlannedRows
from gemscope.activations.sets import document_share
from gemscope.activations.sources import Source, Text
from gemscope.activations.stream import Cut, Origin, Part, Pool, Stream
from gemscope.activations.units import Bucket, Filling
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.models.gemma import Gemma

_POOL_ROWS = 1 << 16
_POOL_BYTES = 512 << 20
_OPEN_UNITS = 8


@dataclass(frozen=True, eq=False)
class LiveActivations(PlannedRows):
    """Rows of activations computed on the fly. Make one with ``LiveActivations.of``."""

    gemma: Gemma
    source: Source
    plan: Plan
    pool_rows: int
    """Rows mixed at a time, about; up to three pools are in memory."""
    side: tuple[bool, float, int] | None = None
    """(whether held out, share, seed) of a split; None: all documents."""

    @classmethod
    def of(
        cls, gemma: Gemma, source: Source, config: HarvestConfig, *, pool_rows: int | None = None
    ) -> "LiveActivations":
        """What ``harvest_to`` would store, not stored; ``pool_rows`` is 65,536 by default, fewer where they would take
        more than 512 MiB. Raises the errors of ``make_plan``.
        """
        plan = make_plan(gemma, source, config)
        rows = pool_rows or max(1, min(_POOL_ROWS, _POOL_BYTES // plan.row_bytes))
        unit = max(1, round(rows / plan.rows_per_document))
        return cls(gemma, source, replace(plan, unit_documents=unit), rows)

    @property
    def name(self) -> str:
        """What it is."""
        return "this stream"

    @property
    def identity(self) -> str:
        """Which rows these are: model, texts, positions and side. The rows' own bits depend on the machine."""
        return f"{self.plan.id} {self.plan.unit_documents} {self.side}"

    @property
    def rows(self) -> int:
        """Rows per epoch, estimated from a sample."""
        whole = self.plan.documents * self.plan.rows_per_document
        if self.side is None:
            return round(whole)
        held_out, share, _ = self.side
        return round(whole * (share if held_out else 1 - share))

    def split(self, held_out: float, seed: int = 0) -> tuple["LiveActivations", "LiveActivations"]:
        """(training side, held-out side), by document, as a store of the same documents is split."""
        if not 0 < held_out < 1:
            raise InputError(f"held-out share {held_out} is outside (0, 1); use for example 0.1.")
        return replace(self, side=(False, held_out, seed)), replace(self, side=(True, held_out, seed))

    def stream(
        self,
        sites: Sequence[Site | str],
        batch_size: int,
        seed: int = 0,
        *,
        start: Position | None = None,
        epochs: int | None = None,
        device: torch.device | None = None,
    ) -> Stream:
        """Shuffled batches, as of a store: same order and same position for the same arguments.

        The model runs in another thread, one pool ahead.
        """
        wanted = [self.check_site(site) for site in sites]
        reader = LiveReader(self, wanted, seed)
        return Stream(reader, wanted, batch_size, start=start or Position(), epochs=epochs, device=device)

    def wanted(self, document: int) -> bool:
        """Whether a document is on this side."""
        if self.side is None:
            return True
        held_out, share, seed = self.side
        return (document_share(seed, document) < share) == held_out


class LiveReader:
    """Pools of one stream, made by the model."""

    def __init__(self, live: LiveActivations, sites: Sequence[Site], seed: int) -> None:
        self._live, self._seed = live, seed
        plan = live.plan
        self._plan = replace(plan, sites={site: plan.sites[site] for site in sites})
        self._window: tuple[int, int, list[tuple[int, Text]]] | None = None

    def pools(self, epoch: int) -> int:
        """One a unit."""
        return self._plan.units

    def load(self, epoch: int, pool: int, cut: Cut) -> Pool:
        """Run the documents of a pool."""
        chosen = self.documents(epoch, pool)
        plan, gemma = self._plan, self._live.gemma
        texts = [text for _, text in chosen]
        pieces = encode(gemma, texts, 0, int(plan.config["context"]))
        rows = int(pieces.content.sum())
        bucket = Bucket.empty(plan, rows)
        if rows:
            seed = [self._seed, epoch, pool, LIVE_ROWS]
            filling = Filling(gemma, plan, pieces, np.arange(len(pieces)), seed, bucket)
            with Passes(gemma) as passes:
                filling.run(passes)
        numbers = np.array([number for number, _ in chosen], dtype=np.int64)
        doc = numbers[bucket.doc] if bucket.rows else np.empty(0, np.int64)
        columns = [torch.from_numpy(one) for one in (doc, bucket.pos, bucket.token)]
        parts, start = deque[Part](), cut.row  # copied: a batch that is kept must not keep its pool
        for size in cut.sizes(bucket.rows):
            mine = slice(start, start + size)
            acts = {site: x[mine].clone() for site, x in bucket.data.items()}
            parts.append((acts, Origin(*(x[mine].clone() for x in columns))))
            start += size
        return Pool(bucket.rows, parts)

    def documents(self, epoch: int, pool: int) -> list[tuple[int, Text]]:
        """(number, text) of the documents of a pool: a share of the permuted documents of the open units."""
        plan, live = self._plan, self._live
        order = np.random.default_rng([self._seed, epoch, 0, LIVE_UNITS]).permutation(plan.units)
        windows = -(-plan.units // _OPEN_UNITS)
        edges = [i * plan.units // windows for i in range(windows + 1)]
        first = max(edge for edge in edges if edge <= pool)
        members = order[first : min(edge for edge in edges if edge > pool)].tolist()
        if self._window is None or self._window[:2] != (epoch, first):
            texts: list[tuple[int, Text]] = []
            for unit in members:
                start, stop = plan.range(unit)
                numbered = zip(range(start, stop), live.source.read(start, stop), strict=False)
                texts += [(number, text) for number, text in numbered if live.wanted(number)]
            mixed = np.random.default_rng([self._seed, epoch, first, LIVE_TEXTS]).permutation(len(texts))
            self._window = epoch, first, [texts[i] for i in mixed]
        texts, share = self._window[2], pool - first
        cuts = [len(texts) * i // len(members) for i in (share, share + 1)]
        return texts[cuts[0] : cuts[1]]
