"""Rows of activations in the order of their documents, from a store, from memory, or from a model on the fly.

Notable: a *context* is what the model read at once (a document, or one piece of a long one), and a block holds whole
contexts, so that what is counted by context needs no second look. Only a model on the fly gives special tokens too;
stores and sets hold content tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from gemscope.activations.pools import unpacked_bits
from gemscope.activations.positions import bucketed, content_mask
from gemscope.activations.sets import ActivationSet
from gemscope.activations.store import Store
from gemscope.core.arrays import Bool, Int, Tensor
from gemscope.core.sites import Site
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Tokens

POSITION_BITS = 31
"""A token's place is its document's number and, in this many bits, its position there."""


@dataclass(frozen=True, eq=False)
class Where:
    """What is known of rows beside their activations; sorted by document and position."""

    doc: Int[Tensor, "rows"]
    pos: Int[Tensor, "rows"]
    """Position in the document's tokens, its <bos> being 0."""
    token: Int[Tensor, "rows"]
    piece: Int[Tensor, "rows"]
    """Which of the document's pieces, from 0."""
    step: Int[Tensor, "rows"]
    """Position in what the model read at once."""
    special: Bool[Tensor, "rows"]
    """Not content: a control token or a word of the chat template."""

    def __len__(self) -> int:
        return len(self.doc)

    @property
    def place(self) -> Int[Tensor, "rows"]:
        """Document and position in one number."""
        return (self.doc.long() << POSITION_BITS) | self.pos.long()

    @property
    def context(self) -> Int[Tensor, "rows"]:
        """Number of the context in this block, from 0."""
        fresh = torch.ones(len(self), dtype=torch.bool)
        fresh[1:] = (self.doc[1:] != self.doc[:-1]) | (self.piece[1:] != self.piece[:-1])
        return fresh.cumsum(0) - 1

    def __getitem__(self, rows: Any) -> "Where":
        return Where(*(getattr(self, name)[rows] for name in _COLUMNS))


_COLUMNS = ("doc", "pos", "token", "piece", "step", "special")


@dataclass(frozen=True, eq=False)
class Block:
    """Whole contexts."""

    where: Where
    acts: Mapping[Site, Tensor]
    """Site -> rows in any order."""
    order: Int[Tensor, "rows"] | None
    """Row r of ``where`` is row ``order[r]`` of ``acts``; None: row r."""

    def rows(self, site: Site, start: int, stop: int) -> Tensor:
        """Activations of some rows."""
        x = self.acts[site]
        return x[start:stop] if self.order is None else x.index_select(0, self.order[start:stop])

    def chunks(self, rows: int) -> Iterator[tuple[int, int]]:
        """Stretches of whole contexts of at most ``rows`` rows, or of one context where that is longer."""
        context = self.where.context
        ends = [*((context[1:] != context[:-1]).nonzero()[:, 0] + 1).tolist(), len(self.where)]
        start = last = 0
        for end in ends:
            if end - start > rows and last > start:
                yield start, last
                start = last
            last = end
        if last > start:
            yield start, last


@runtime_checkable
class Rows(Protocol):
    """Where an index gets its rows from; a unit is an independent part."""

    units: int
    rows: int
    """Content tokens in all units, about: of which share partners are counted."""

    def describe(self) -> dict[str, Any]:
        """What is read, as plain JSON values."""
        ...

    def width(self, site: Site) -> int:
        """Of the activations at a site; raises InputError where there are none."""
        ...

    def blocks(self, unit: int, sites: Sequence[Site]) -> Iterator[Block]:
        """The blocks of a unit, in a fixed order."""
        ...


class StoreRows:
    """A store, or one side of its split; a block is one of its buckets, which is read into memory as a whole."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._context = int(store.plan.config.get("context", 1 << 30))
        self._buckets = {int(one["unit"]): list(one["buckets"]) for one in store.manifest["units"]}
        self.units = len(store.shards)
        self.rows = store.rows

    def describe(self) -> dict[str, Any]:
        """The plan's identity and the store's size."""
        plan = self._store.plan
        return {"kind": "store", "name": self._store.place.name, "rows": self.rows, "config": dict(plan.config)}

    def width(self, site: Site) -> int:
        """As the store says."""
        return self._store.width(site)

    def blocks(self, unit: int, sites: Sequence[Site]) -> Iterator[Block]:
        """One block a bucket."""
        shard = self._store.shards[unit]
        origin = self._store.origin(shard.unit)
        whole = {site: self._store.shard(site, shard.unit) for site in sites}
        start = 0
        for rows in self._buckets[shard.unit]:
            at = slice(start, start + rows)
            doc, pos, token = (x[at].numpy().astype(np.int64) for x in (origin.doc, origin.pos, origin.token))
            order = np.lexsort((pos, doc))
            if self._store.keep is not None:
                order = order[unpacked_bits(self._store.keep[unit], start, start + rows)[order]]
            where = _of_pieces(*(torch.from_numpy(x[order]) for x in (doc, pos, token)), context=self._context)
            acts = {site: x[at].clone() for site, x in whole.items()}
            yield Block(where, acts, torch.from_numpy(order))
            start += rows


def _of_pieces(doc: Tensor, pos: Tensor, token: Tensor, *, context: int) -> Where:
    """Documents longer than the context were read in pieces (docs/formats.md, store)."""
    later = pos >= context
    rest = max(context - 1, 1)
    piece = torch.where(later, 1 + torch.div(pos - context, rest, rounding_mode="floor"), 0)
    step = torch.where(later, 1 + (pos - context) % rest, pos)
    return Where(doc, pos, token, piece, step, torch.zeros(len(doc), dtype=torch.bool))


class SetRows:
    """Activations in memory."""

    def __init__(self, rows: ActivationSet, unit_rows: int = 1 << 16) -> None:
        self._set = rows
        ends = (rows.doc[1:] != rows.doc[:-1]).nonzero()[:, 0] + 1
        starts = torch.cat([torch.zeros(1, dtype=torch.long), ends, torch.tensor([rows.rows])])
        wanted = torch.arange(0, rows.rows, unit_rows)
        self._bounds = [*starts[torch.searchsorted(starts, wanted)].unique().tolist(), rows.rows]
        if len(self._bounds) > 1 and self._bounds[-2] == rows.rows:
            self._bounds.pop()
        self.units = len(self._bounds) - 1
        self.rows = rows.rows

    def describe(self) -> dict[str, Any]:
        """How the rows were made."""
        return {"kind": "set", "rows": self.rows, "about": dict(self._set.about)}

    def width(self, site: Site) -> int:
        """As the set says."""
        return self._set.width(site)

    def blocks(self, unit: int, sites: Sequence[Site]) -> Iterator[Block]:
        """One block."""
        at = slice(self._bounds[unit], self._bounds[unit + 1])
        doc, pos, token = (x[at].long() for x in (self._set.doc, self._set.pos, self._set.token))
        where = _of_pieces(doc, pos, token, context=1 << 30)
        yield Block(where, {site: self._set[site][at] for site in sites}, None)


class LiveRows:
    """A model that reads texts now; special tokens are counted apart."""

    def __init__(
        self, gemma: Gemma, items: Sequence[Tokens], *, unit_tokens: int = 1 << 14, batch_tokens: int = 8192
    ) -> None:
        self._gemma, self._items, self._batch = gemma, list(items), batch_tokens
        self._bounds, filled = [0], 0
        for number, item in enumerate(self._items, 1):
            filled += len(item)
            if filled >= unit_tokens or number == len(self._items):
                self._bounds.append(number)
                filled = 0
        self.units = len(self._bounds) - 1
        self.rows = int(sum(int(item.content_mask.sum()) for item in self._items))

    def describe(self) -> dict[str, Any]:
        """The model and the number of documents."""
        return {"kind": "live", "model": self._gemma.name, "documents": len(self._items), "rows": self.rows}

    def width(self, site: Site) -> int:
        """As the model says."""
        return self._gemma.width(site)

    @torch.no_grad()
    def blocks(self, unit: int, sites: Sequence[Site]) -> Iterator[Block]:
        """One block a batch of documents of similar length."""
        first = self._bounds[unit]
        items = self._items[first : self._bounds[unit + 1]]
        for chosen, batch in bucketed(self._gemma, items, self._batch):
            rows, pos = batch.mask.nonzero(as_tuple=True)
            captured = self._gemma.capture(batch, sites)
            content = content_mask(batch)
            where = Where(
                doc=torch.tensor(chosen)[rows] + first,
                pos=pos,
                token=batch.ids[batch.mask],
                piece=torch.zeros_like(pos),
                step=pos,
                special=~content[batch.mask],
            )
            yield Block(where, {site: captured.rows(site) for site in sites}, None)
