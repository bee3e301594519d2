"""Batches of whole contexts that a model has just read, for what needs more of a row than its activations.

- a batch is all content rows of some contexts, one context after the other, and what the model was given is kept until
  the next batch: the model can be run on it again with something else in the place of these rows;
- every batch has exactly its rows: the last context is cut behind the row that fills it, and what is cut off is left
  out of that epoch (a row's activations do not depend on what comes later);
- the contexts of a pool of ``LiveActivations`` are permuted, and a place in the stream is (epoch, pool, context), from
  which it goes on without running what lies before.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gemscope.activations.divergence import FINAL, Given, divergence, rows_at
from gemscope.activations.order import LIVE_ROWS, Position
from gemscope.activations.pieces import Pieces, batches, encode
from gemscope.activations.streaming import LiveActivations, LiveReader
from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site


@dataclass(frozen=True, eq=False)
class LiveContexts:
    """The activations of ``live`` context by context: what the trainer reads for end-to-end training.

    Raises InputError when ``live`` leaves rows out.
    """

    live: LiveActivations

    def __post_init__(self) -> None:
        if self.live.plan.config["drop_outliers"]:
            raise InputError("contexts are read whole; make the LiveActivations without drop_outliers.")

    @property
    def sites(self) -> list[Site]:
        """The sites, in the order of a forward pass."""
        return self.live.sites

    @property
    def rows(self) -> int:
        """Rows per epoch, estimated from a sample."""
        return self.live.rows

    @property
    def identity(self) -> str:
        """That of the same rows shuffled, and that they come by contexts."""
        return f"contexts of {self.live.identity}"

    def width(self, site: Site | str) -> int:
        """Width of a site's activations."""
        return self.live.width(site)

    def split(self, held_out: float, seed: int = 0) -> tuple["LiveContexts", LiveActivations]:
        """(contexts to train on, shuffled rows of the held-out documents), by document as any source is split."""
        training, held = self.live.split(held_out, seed)
        return LiveContexts(training), held

    def stream(
        self,
        sites: Sequence[Site | str],
        batch_size: int,
        seed: int = 0,
        *,
        start: Position | None = None,
        epochs: int | None = None,
    ) -> "ContextStream":
        """Batches from ``start`` on: the same for the same arguments."""
        wanted = [self.live.check_site(site) for site in sites]
        return ContextStream(self.live, wanted, batch_size, seed, start=start or Position(), epochs=epochs)

    def batches(
        self, sites: Sequence[Site], batch_size: int, seed: int = 0, epoch: int = 0
    ) -> Iterator[dict[Site, Float[Tensor, "batch _"]]]:
        """Every context once, in an order given by ``seed`` and ``epoch``: one epoch of a stream."""
        return self.stream(sites, batch_size, seed, start=Position(epoch), epochs=1)


class ContextStream(Iterator[dict[Site, Float[Tensor, "batch _"]]]):
    """Batches of the rows of contexts, epoch after epoch; the last batch of an epoch may be smaller."""

    def __init__(
        self,
        live: LiveActivations,
        sites: Sequence[Site],
        batch_size: int,
        seed: int,
        *,
        start: Position,
        epochs: int | None,
    ) -> None:
        """``epochs`` is how many to go through, the one of ``start`` included; None is without end.

        Raises InputError for a batch size below 1.
        """
        if batch_size < 1:
            raise InputError(f"batch size {batch_size} is below 1; use for example 2048.")
        self.gemma = live.gemma
        """The model that reads them."""
        self.position = start
        """The place of the next batch: hand it to another stream with the same arguments to go on from here."""
        self.given: tuple[Given, ...] = ()
        """What the model was given for the last batch."""
        self._plan, self._sites, self._size, self._seed = live.plan, list(sites), batch_size, seed
        self._reader = LiveReader(live, sites, seed)
        self._steps = self._steps_from(start, None if epochs is None else start.epoch + epochs)

    @torch.no_grad()
    def __next__(self) -> dict[Site, Float[Tensor, "batch _"]]:
        pieces, position = next(self._steps)
        given: list[Given] = []
        found: dict[Site, list[Tensor]] = {site: [] for site in self._sites}
        size, packed = int(self._plan.config["batch_tokens"]), self._plan.row_tokens
        for one in batches(self.gemma, pieces, np.arange(len(pieces)), size, packed):
            seen = self.gemma.capture(one.batch, [*self._sites, FINAL])
            for site in self._sites:
                found[site].append(rows_at(seen[site], one.flat))
            given.append(Given(one.batch, one.flat, rows_at(seen[FINAL], one.flat)))
        self.given, self.position = tuple(given), position
        return {site: torch.cat(parts) for site, parts in found.items()}

    def divergence(self, site: Site, recon: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
        """Mean over the last batch's rows of KL(model ‖ model with raw ``recon`` in the place of ``site``), in nats; it
        can be differentiated once.
        """
        return divergence(self.gemma, self.given, site, recon)

    def _steps_from(self, place: Position, last: int | None) -> Generator[tuple[Pieces, Position]]:
        """The contexts of each batch, and the place after them; stops before epoch ``last``."""
        while last is None or place.epoch < last:
            yield from self._steps_of_epoch(place)
            place = Position(place.epoch + 1)

    def _steps_of_epoch(self, place: Position) -> Generator[tuple[Pieces, Position]]:
        parts: list[tuple[Tensor, ...]] = []
        have, first = 0, place.row
        for pool in range(place.pool, self._reader.pools(place.epoch)):
            contexts = self._contexts(place.epoch, pool)
            if first > len(contexts):
                raise InputError(f"context {first} of a pool of {len(contexts)}: this is a position in another stream.")
            for number, part in enumerate(contexts[first:], first + 1):
                rows = part[1].nonzero()[: self._size - have, 0]
                parts.append(tuple(column[: int(rows[-1]) + 1] for column in part))
                have += len(rows)
                if have == self._size:
                    yield _joined(parts), Position(place.epoch, pool, number)
                    parts, have = [], 0
            first = 0
        if parts:
            yield _joined(parts), Position(place.epoch + 1)

    def _contexts(self, epoch: int, pool: int) -> list[tuple[Tensor, ...]]:
        """Ids, content and positions of each context of a pool, permuted."""
        texts = [text for _, text in self._reader.documents(epoch, pool)]
        pieces = encode(self.gemma, texts, 0, int(self._plan.config["context"]))
        order = np.random.default_rng([self._seed, epoch, pool, LIVE_ROWS]).permutation(len(pieces))
        columns = [column.split(np.diff(pieces.bounds).tolist()) for column in (pieces.ids, pieces.content, pieces.pos)]
        return [tuple(column[i] for column in columns) for i in order]


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> Pieces:
    ids, content, pos = (torch.cat(column) for column in zip(*parts, strict=True))
    lengths = [len(part[0]) for part in parts]
    return Pieces(ids, content, pos, np.cumsum([0, *lengths]), np.arange(len(parts)), 0)
