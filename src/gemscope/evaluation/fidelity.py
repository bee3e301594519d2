"""Sparsity and reconstruction of a dictionary, streamed over held-out rows with fp64 accumulators.

Definitions (x a row, x̂ its reconstruction, ⟨·⟩ the mean over all rows that were seen, not over batches):

- ``l0``: ⟨number of non-zero latents⟩;
- ``fvu``: ⟨‖x − x̂‖²⟩ / ⟨‖x − x̄‖²⟩ with x̄ = ⟨x⟩ per dimension, so that a dictionary that always answers the
  mean has 1 (Gemma Scope, Lieberum et al. 2024, section 4.1). The denominator is merged from batch to batch
  by Chan et al.'s update and not as ⟨‖x‖²⟩ − ‖x̄‖², which loses its digits where the mean is large against
  the spread;
- ``cosine``: ⟨cos(x, x̂)⟩; ``norm_ratio``: ⟨‖x̂‖⟩ / ⟨‖x‖⟩, below 1 when the reconstruction shrinks.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from gemscope.core.arrays import Float, Int, Tensor
from gemscope.core.errors import InputError

DENSITY_BINS = tuple(-6 + 0.5 * i for i in range(13))
"""Edges of the density histogram, as log10(share of rows): -6, -5.5, ... 0. The first bin also takes what is
below.
"""


@dataclass(frozen=True)
class Fidelity:
    """What a dictionary keeps of its activations; every number is over ``rows`` rows."""

    rows: int
    """Number of token positions measured."""
    l0: float
    """Mean number of latents active per row."""
    fvu: float
    """Fraction of variance unexplained; 0 is perfect, 1 is no better than the mean."""
    mse: float
    """Mean squared distance ‖x − x̂‖², summed over dimensions."""
    cosine: float
    """Mean cosine between a row and its reconstruction."""
    norm_ratio: float
    """Mean norm of the reconstruction over mean norm of the activation."""
    firings: tuple[int, ...]
    """Per latent, the number of rows on which it is active."""

    @cached_property
    def dead(self) -> int:
        """Latents that were active on none of the rows."""
        return sum(count == 0 for count in self.firings)

    @property
    def alive(self) -> int:
        """Latents that were active at least once."""
        return len(self.firings) - self.dead

    @property
    def dead_fraction(self) -> float:
        """Dead latents over all latents; falls as more rows are seen, so quote ``rows`` with it."""
        return self.dead / len(self.firings)

    @property
    def dense_fraction(self) -> float:
        """Latents active on more than a tenth of the rows, over all latents."""
        return sum(count > self.rows / 10 for count in self.firings) / len(self.firings)

    @property
    def density(self) -> Float[Tensor, "d_sae"]:
        """Per latent, the share of rows on which it is active."""
        return torch.tensor(self.firings, dtype=torch.float64) / self.rows

    @property
    def histogram(self) -> tuple[int, ...]:
        """Latents alive per bin of log10 density; the bins' edges are ``DENSITY_BINS``."""
        density = self.density
        edges = torch.tensor(DENSITY_BINS, dtype=torch.float64)
        place = torch.bucketize(density[density > 0].log10(), edges[1:-1], right=True)
        return tuple(torch.bincount(place, minlength=len(DENSITY_BINS) - 1).tolist())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the derived numbers."""
        derived = {
            "dead": self.dead,
            "dead_fraction": self.dead_fraction,
            "dense_fraction": self.dense_fraction,
            "density_histogram": {"log10_edges": list(DENSITY_BINS), "latents": list(self.histogram)},
        }
        return asdict(self) | derived


class FidelitySums:
    """Running sums for ``Fidelity``: call ``add`` per batch of rows, then ``result``."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        self.rows = 0
        self.mean: Float[Tensor, "d_in"] = torch.zeros(d_in, dtype=torch.float64)
        self._spread = 0.0
        self._error = 0.0
        self._active = 0
        self._cosine = 0.0
        self._norm = 0.0
        self._norm_recon = 0.0
        self._firings: Int[Tensor, "d_sae"] = torch.zeros(d_sae, dtype=torch.long)

    def add(
        self,
        x: Float[Tensor, "rows d_in"],
        recon: Float[Tensor, "rows d_in"],
        active: Int[Tensor, "entries"],
    ) -> None:
        """Take in a batch: activations, reconstructions, and the latent of each (row, latent) pair that is
        active.
        """
        if len(x) == 0:
            return
        x, recon = x.double().cpu(), recon.double().cpu()
        self._add_spread(x)
        self._error += float((x - recon).square().sum())
        norm, norm_recon = x.norm(dim=1), recon.norm(dim=1)
        self._norm += float(norm.sum())
        self._norm_recon += float(norm_recon.sum())
        self._cosine += float(((x * recon).sum(1) / (norm * norm_recon).clamp_min(1e-300)).sum())
        self._firings += torch.bincount(active.cpu(), minlength=len(self._firings))
        self._active += len(active)

    def _add_spread(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Chan, Golub and LeVeque's pairwise update of the mean and of Σ‖x − mean‖²."""
        count, mean = len(x), x.mean(0)
        shift = mean - self.mean
        total = self.rows + count
        self._spread += float((x - mean).square().sum() + shift.square().sum() * (self.rows * count / total))
        self.mean = self.mean + shift * (count / total)
        self.rows = total

    def result(self) -> Fidelity:
        """The measures over all rows so far; raises InputError when the rows have no spread to explain."""
        if self.rows < 2 or self._spread == 0:
            raise InputError(f"{self.rows} token positions without any spread; FVU needs at least two that differ.")
        return Fidelity(
            rows=self.rows,
            l0=self._active / self.rows,
            fvu=self._error / self._spread,
            mse=self._error / self.rows,
            cosine=self._cosine / self.rows,
            norm_ratio=self._norm_recon / self._norm,
            firings=tuple(self._firings.tolist()),
        )
