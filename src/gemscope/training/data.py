"""What the trainer reads: batches of activations from several sites at once, and their first moments."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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


@dataclass(frozen=True)
class Moments:
    """Mean and size of a site's activations."""

    mean: Float[Tensor, " width"]
    """Mean row, fp32."""
    scale: float
    """C with E||x / C||^2 = 1."""
    spread: float
    """E||x - mean||^2 / C^2: the squared error, after scaling, of a dictionary that does nothing."""


def endless_batches(
    data: ActivationSource, sites: Sequence[Site], batch_size: int, seed: int
) -> Iterator[dict[Site, Float[Tensor, "batch width"]]]:
    """Full batches, epoch after epoch; what is left over at the end of an epoch is skipped.

    Raises InputError when there are fewer rows than one batch.
    """
    if data.rows < batch_size:
        raise InputError(
            f"{data.rows} rows are fewer than one batch of {batch_size}; harvest more text or lower batch_size."
        )
    epoch = 0
    while True:
        for batch in data.batches(sites, batch_size, seed, epoch):
            if len(batch[sites[0]]) == batch_size:
                yield batch
        epoch += 1


def first_rows(
    data: ActivationSource, sites: Sequence[Site], rows: int, batch_size: int, seed: int
) -> dict[Site, Float[Tensor, "rows width"]]:
    """The first ``rows`` rows of epoch 0, or all when there are fewer, in fp32."""
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    have = 0
    for batch in data.batches(sites, batch_size, seed, 0):
        for site in sites:
            parts[site].append(batch[site][: rows - have].float())
        have += len(batch[sites[0]])
        if have >= rows:
            break
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
