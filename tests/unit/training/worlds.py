"""Synthetic activations for the training tests: known features in superposition, held in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.core.sites import Site

SITE = Site("resid_post", 1)
OTHER = Site("mlp_out", 2)


@dataclass
class MemorySource:
    """The smallest thing that satisfies ``ActivationSource``."""

    data: dict[Site, Float[Tensor, "rows width"]]
    reads: int = 0

    @property
    def rows(self) -> int:
        return len(next(iter(self.data.values())))

    def width(self, site: Site) -> int:
        return self.data[site].shape[1]

    def batches(
        self, sites: Sequence[Site], batch_size: int, seed: int, epoch: int
    ) -> Iterator[dict[Site, Float[Tensor, "batch width"]]]:
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for rows in order.split(batch_size):
            self.reads += len(sites)
            yield {site: self.data[site][rows] for site in sites}


def superposition(
    rows: int, d: int = 48, features: int = 64, active: float = 4.0, seed: int = 0, scale: float = 5.0
) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "features d"]]:
    """Rows = a sum of a few of more features than dimensions, on a large mean, with a little noise; and the
    features.

    ``seed`` picks the rows; the features and the mean are always the same.
    """
    fixed = torch.Generator().manual_seed(1234)
    directions = torch.randn(features, d, generator=fixed)
    directions /= directions.norm(dim=1, keepdim=True)
    mean = torch.randn(d, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(rows, features, generator=generator) < active / features
    size = 0.7 + 0.6 * torch.rand(rows, features, generator=generator)
    noise = 0.02 * torch.randn(rows, d, generator=generator)
    return scale * ((on * size) @ directions + mean + noise), directions
