"""Which features are in a row and how strongly: base rates, a hierarchy, correlations, sizes.

The recipe of SynthSAEBench (reference: SAELens 6.54, ``synthetic``; written anew), drawn in this order:

1. a feature fires where a Gaussian lies above its quantile; the Gaussians have a low-rank correlation;
2. its size is relu(mean + spread * noise);
3. level by level from the roots: a child's size is multiplied by parent / mean of parent, which is 0 where the parent
   is off, and of several siblings that fire one is kept, each with equal chance.

Notable: a level is drawn only where its parents are on, a few features per row instead of most of them; what is left
out would be multiplied by 0, so that the rows have the same distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gemscope.core.arrays import Bool, Float, Tensor
from gemscope.core.errors import InputError

_LEAST_OWN = 0.01
"""Least share of a feature's Gaussian that is its own."""


@dataclass(frozen=True)
class CodesConfig:
    """How features fire. Raises InputError when a value cannot be."""

    features: int
    """Number of features."""
    most: float
    """Base rate of the most frequent feature."""
    least: float
    """Base rate of the rarest."""
    exponent: float = 0.5
    """Base rates are rank^-exponent, scaled linearly to lie between the two."""
    roots: int = 0
    """Trees of the hierarchy; their roots are the first features, then come their children, and so on."""
    branching: int = 4
    """Children of each feature in a tree, mutually exclusive."""
    depth: int = 0
    """Levels below the roots."""
    correlation: float = 0.0
    """Standard deviation of the factors of the Gaussians' correlation."""
    rank: int = 25
    """Number of those factors."""
    mean_first: float = 5.0
    """Mean size of the first feature where it fires; straight to ``mean_last``."""
    mean_last: float = 4.0
    """Mean size of the last one."""
    spread: float = 0.5
    """Standard deviations of sizes are |spread + spread * noise|, one per feature."""
    seed: int = 42
    """Of the sizes (seed + 1) and the correlation (seed + 4)."""

    def __post_init__(self) -> None:
        if not 0 < self.least < self.most <= 1:
            raise InputError(f"base rates from {self.least} to {self.most} must ascend between 0 and 1.")
        if self.levels[-1] > self.features:
            raise InputError(f"the trees hold {self.levels[-1]} features, but there are {self.features}; add features.")

    @property
    def levels(self) -> tuple[int, ...]:
        """Where each level of the hierarchy ends; one entry for the roots, then one per level below."""
        ends = [self.roots]
        for level in range(1, self.depth + 1 if self.roots else 1):
            ends.append(ends[-1] + self.roots * self.branching**level)
        return tuple(ends)


class Codes:
    """Draws rows of sizes, 0 where a feature is off."""

    def __init__(self, config: CodesConfig, device: torch.device | None = None) -> None:
        self.config = config
        n = config.features
        self.base = base_rates(config).to(device)
        self.rates = corrected_rates(config, self.base)
        """What is drawn before the hierarchy, so that afterwards about ``base`` is left."""
        self.means = torch.linspace(config.mean_first, config.mean_last, n).to(device)
        noise = torch.randn(n, generator=torch.Generator().manual_seed(config.seed + 1))
        self.spreads = (config.spread + config.spread * noise).abs().to(device)
        self.factors, own = None, torch.ones(n)
        if config.correlation > 0:
            factors, own = _correlation(config)
            self.factors = factors.T.contiguous().to(device)
        self.own = own.sqrt().to(device)
        self.thresholds = (2**0.5 * torch.erfinv(1 - 2 * self.rates)).to(device)
        self.device = self.base.device

    @torch.no_grad()
    def draw(self, rows: int, generator: torch.Generator) -> Float[Tensor, "rows features"]:
        """Sizes of all features in new rows."""
        config, ends = self.config, (0, *self.config.levels)
        sizes = torch.zeros(rows, config.features, device=self.device)
        shared = None
        if self.factors is not None:
            shared = torch.randn(rows, len(self.factors), generator=generator, device=self.device)
        for part in (slice(0, ends[1]), slice(ends[-1], config.features)):
            fires = self._fires((rows, part.stop - part.start), part, shared, generator)
            row, which = fires.nonzero(as_tuple=True)
            sizes[row, which + part.start] = self._sizes(which + part.start, generator)
        for start, middle, end in zip(ends, ends[1:], ends[2:], strict=False):
            self._draw_children(sizes, slice(start, middle), slice(middle, end), shared, generator)
        return sizes

    def _draw_children(
        self, sizes: Tensor, parents: slice, children: slice, shared: Tensor | None, generator: torch.Generator
    ) -> None:
        """One level, where its parents are on: elsewhere its features are off whatever is drawn."""
        branching = self.config.branching
        row, group = (sizes[:, parents] > 0).nonzero(as_tuple=True)
        which = children.start + group[:, None] * branching + torch.arange(branching, device=self.device)
        fires = self._fires(which.shape, which, shared, generator, row)
        own = self._sizes(which, generator) * fires
        lots = torch.rand(own.shape, generator=generator, device=self.device)
        winner = torch.where(own > 0, lots, -1.0).argmax(1, keepdim=True)
        parent = group + parents.start
        size = own.gather(1, winner)[:, 0] * sizes[row, parent] / self.means[parent]
        sizes[row, which.gather(1, winner)[:, 0]] = size

    def _fires(
        self,
        shape: Sequence[int],
        which: slice | Tensor,
        shared: Tensor | None,
        generator: torch.Generator,
        row: Tensor | None = None,
    ) -> Bool[Tensor, "_ _"]:
        """Features ``which`` of every row, or of the rows ``row``."""
        if shared is None or self.factors is None:
            return torch.rand(*shape, generator=generator, device=self.device) < self.rates[which]
        own = torch.randn(*shape, generator=generator, device=self.device) * self.own[which]
        if row is None:
            return own.addmm_(shared, self.factors[:, which]) > self.thresholds[which]
        common = torch.einsum("pr,pbr->pb", shared[row], self.factors.T[which])
        return own + common > self.thresholds[which]

    def _sizes(self, which: Tensor, generator: torch.Generator) -> Tensor:
        """relu(mean + spread * noise) of some features."""
        noise = torch.randn(which.shape, generator=generator, device=self.device)
        return noise.mul_(self.spreads[which]).add_(self.means[which]).relu_()


def base_rates(config: CodesConfig) -> Float[Tensor, " features"]:
    """rank^-exponent, scaled linearly so that the first is ``most`` and the last ``least``."""
    ranks = torch.arange(1, config.features + 1, dtype=torch.float32) ** -config.exponent
    return config.least + (config.most - config.least) * (ranks - ranks[-1]) / (ranks[0] - ranks[-1]).clamp(min=1e-12)


def corrected_rates(config: CodesConfig, base: Float[Tensor, " features"]) -> Float[Tensor, " features"]:
    """p / parent * (1 + sum of the siblings' p / parent), at most 1: what makes up, nearly, for what the hierarchy
    takes away; all p uncorrected.
    """
    rates, ends = base.clone(), (0, *config.levels)
    for start, middle, end in zip(ends, ends[1:], ends[2:], strict=False):
        own = base[middle:end].view(middle - start, config.branching)
        given = own / base[start:middle, None]
        rates[middle:end] = (given * (1 + given.sum(1, keepdim=True) - given)).flatten()
    return rates.clamp(max=1.0)


def _correlation(config: CodesConfig) -> tuple[Tensor, Tensor]:
    """Factors [features, rank] and what is each feature's own of its variance of 1."""
    generator = torch.Generator().manual_seed(config.seed + 4)
    factors = torch.randn(config.features, config.rank, generator=generator) * config.correlation
    shared = factors.square().sum(1, keepdim=True)
    factors = torch.where(1 - shared < _LEAST_OWN, factors * ((1 - _LEAST_OWN) / shared).sqrt(), factors)
    return factors, 1 - factors.square().sum(1)
