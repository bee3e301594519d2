"""What the trainer reads: batches of activations from several sites at once, and their first moments."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site


@runtime_checkable
class ActivationSource(Protocol):
    """Rows of activations, aligned over sites: row r of every site is the same token."""

    @property
    def rows(self) -> int:
        """Number of rows per epoch."""
        ...

    def width(self, site: Site) -> int:
        """Width of a site's activations."""
        ...

    def batches(
        self, sites: Sequence[Site], batch_size: int, seed: int, epoch: int
    ) -> Iterator[dict[Site, Float[Tensor, "batch width"]]]:
        """Every row once, in an order given by ``seed`` and ``epoch``; only the last batch may be smaller."""
        ...


@runtime_checkable
class Place(Protocol):
    """A place in a stream of rows, as plain JSON values."""

    def as_dict(self) -> dict[str, int]:
        """The place."""
        ...

    @classmethod
    def of_dict(cls, value: Any) -> Any:
        """Back from ``as_dict``."""
        ...


@runtime_checkable
class PlacedStream(Protocol):
    """Batches without end, and the place of the next one."""

    @property
    def position(self) -> Place:
        """Where the next batch begins."""
        ...

    def __next__(self) -> dict[Site, Float[Tensor, "batch width"]]: ...


@runtime_checkable
class SplicedStream(PlacedStream, Protocol):
    """Batches that a running model gives, which can be run on the last one again."""

    def divergence(self, site: Site, recon: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
        """Mean over the last batch's rows of KL(model ‖ model with raw ``recon`` in the place of ``site``), in nats; it
        can be differentiated once.
        """
        ...


@runtime_checkable
class SeekableSource(ActivationSource, Protocol):
    """A source that can begin anywhere without reading what lies before, such as a store on a disk."""

    def stream(self, sites: Sequence[Site], batch_size: int, seed: int = 0, *, start: Any = None) -> PlacedStream:
        """Batches of every epoch, from ``start`` on."""
        ...


@runtime_checkable
class NamedSource(ActivationSource, Protocol):
    """A source that says itself which rows it gives, such as a model that is run meanwhile, whose rows are not the same
    to the last bit on every machine.
    """

    @property
    def identity(self) -> str:
        """The same for the same rows wherever they are, another for others."""
        ...


@dataclass(frozen=True)
class Moments:
    """Mean and size of a site's activations."""

    mean: Float[Tensor, " width"]
    """Mean row, fp32."""
    scale: float
    """C with E||x / C||^2 = 1."""
    spread: float
    """E||x - mean||^2 / C^2: the squared error, after scaling, of a dictionary that does nothing."""


class BatchReader:
    """Full batches, epoch after epoch, that can go on where another reader was; what is left over at the end of an
    epoch is skipped.

    Raises InputError when there are fewer rows than one batch.
    """

    def __init__(self, data: ActivationSource, sites: Sequence[Site], batch_size: int, seed: int) -> None:
        if data.rows < batch_size:
            raise InputError(
                f"{data.rows} rows are fewer than one batch of {batch_size}; harvest more text or lower batch_size."
            )
        self._data, self._sites, self._size, self._seed = data, list(sites), batch_size, seed
        self._epoch = self._batch = 0
        self._batches: Iterator[dict[Site, Tensor]] | None = None
        self._stream = data.stream(self._sites, batch_size, seed) if isinstance(data, SeekableSource) else None

    @property
    def stream(self) -> PlacedStream | None:
        """What the batches come from now, another one after ``seek``; None where the source has no streams."""
        return self._stream

    def position(self) -> dict[str, int]:
        """Where the next batch is, as plain JSON values."""
        if self._stream is not None:
            return dict(self._stream.position.as_dict())
        return {"epoch": self._epoch, "batch": self._batch}

    def seek(self, position: Mapping[str, int]) -> None:
        """Go on from what ``position`` gave; a source that is not seekable is read through to there."""
        if isinstance(self._data, SeekableSource) and self._stream is not None:
            start = type(self._stream.position).of_dict(dict(position))
            self._stream = self._data.stream(self._sites, self._size, self._seed, start=start)
            return
        self._epoch, self._batch = position["epoch"], 0
        self._batches = self._begin()
        while self._batch < position["batch"]:
            next(self._batches)
            self._batch += 1

    def __next__(self) -> dict[Site, Float[Tensor, "batch width"]]:
        for _ in range(4):  # what is left of an epoch, its end, and a batch of the next one
            batch = next(self._stream) if self._stream is not None else self._next_of_epoch()
            if batch is not None and len(batch[self._sites[0]]) == self._size:
                return batch
        raise InputError(f"an epoch has fewer rows than one batch of {self._size}; give more text or lower batch_size.")

    def _begin(self) -> Iterator[dict[Site, Tensor]]:
        return self._data.batches(self._sites, self._size, self._seed, self._epoch)

    def _next_of_epoch(self) -> dict[Site, Tensor] | None:
        self._batches = self._begin() if self._batches is None else self._batches
        batch = next(self._batches, None)
        if batch is None:
            self._epoch, self._batch, self._batches = self._epoch + 1, 0, None
        else:
            self._batch += 1
        return batch


def first_rows(
    data: ActivationSource, sites: Sequence[Site], rows: int, batch_size: int, seed: int
) -> dict[Site, Float[Tensor, "rows width"]]:
    """The first ``rows`` rows of epoch 0, all when there are fewer, in fp32; raises InputError where there is none."""
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    have = 0
    for batch in data.batches(sites, batch_size, seed, 0):
        for site in sites:
            parts[site].append(batch[site][: rows - have].float())
        have += len(batch[sites[0]])
        if have >= rows:
            break
    if not have:
        raise InputError(
            "there is no row: no document fell on this side of the split; give more text, or hold out another share."
        )
    return {site: torch.cat(part) for site, part in parts.items()}


def moments(x: Float[Tensor, "rows width"], site: Site) -> Moments:
    """Measured in float64. Raises InputError when there is a NaN or infinity, or nothing varies."""
    wide = x.double()
    mean = wide.mean(0)
    size = wide.square().sum(1).mean().item()
    spread = (wide - mean).square().sum(1).mean().item()
    if not (0 < spread < float("inf")):
        raise InputError(
            f"the activations of {site} have a mean squared distance of {spread} from their mean; nothing can"
            " be learned from constant or non-finite rows, so harvest them again."
        )
    return Moments(mean.float(), size**0.5, spread / size)
