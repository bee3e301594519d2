"""TopK and BatchTopK over the latents of all layers and processes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gemscope.core.arrays import Float, Int, Tensor
from gemscope.dictionaries.sparse import Slice, Support, select
from gemscope.training.sharding import Mesh


@dataclass(frozen=True)
class Candidates:
    """Where entries come from."""

    x: Float[Tensor, "batch positions d_in"]
    slices: Callable[[Tensor | None], list[Slice]]
    """The encoders, with a floor for each latent, or None for above 0."""
    n: int
    width: int
    """Latents per layer in this process."""
    mesh: Mesh

    @property
    def latents(self) -> int:
        """Of all layers, in this process."""
        return self.n * self.width

    def overall(self, latents: Int[Tensor, " entries"]) -> Int[Tensor, " entries"]:
        """Index over all layers and processes: what decides between equal values."""
        layer = torch.div(latents, self.width, rounding_mode="floor")
        local = latents - layer * self.width
        return layer * self.width * self.mesh.latents + local * self.mesh.latents + self.mesh.shard


Chosen = tuple[Support, Float[Tensor, " entries"], float]
"""Active entries, their values, and the mean over rows (or the only) smallest of them."""


def row_codes(given: Candidates, k: int) -> Chosen:
    """The ``k`` largest positive entries of every row, over all processes (Gao et al. 2024, eq. 3)."""
    support, values = select(given.x, given.slices(None), given.latents, k)
    mesh = given.mesh
    if mesh.latents > 1:
        count = min(k, given.latents)
        best = values.new_zeros(support.batch, count)
        index = torch.full_like(best, 1 << 62, dtype=torch.int64)
        place = torch.arange(len(values), device=values.device) - support.row_offsets[:-1][support.rows]
        overall = given.overall(support.latents)
        best[support.rows, place], index[support.rows, place] = values, overall
        last, at = mesh.best(best, index, k)
        last, at = last[support.rows], at[support.rows]
        keep = (values > last) | ((values == last) & (overall <= at))
        support = Support(support.rows[keep], support.latents[keep], support.batch, support.d_sae)
        values = values[keep]
    smallest = values.new_full((support.batch,), float("inf")).scatter_reduce(0, support.rows, values, "amin")
    return support, values, _mean_of_finite(smallest, mesh)


def batch_codes(given: Candidates, k: float, guess: float) -> Chosen:
    """The ``batch * k`` largest positive entries of the batch, over all processes (Bussmann et al. 2024).

    Only entries above a floor are looked at: three quarters of the last smallest value, halved until there are enough.
    """
    mesh = given.mesh
    wanted = round(len(given.x) * mesh.data * k)
    floor = max(0.75 * guess, 0.0)
    while True:
        support, values = select(given.x, given.slices(given.x.new_full((given.latents,), floor)), given.latents)
        count = torch.tensor(float(len(values)), device=given.x.device)
        if floor <= 0 or float(mesh.sum_over_data(mesh.sum_over_latents(count))) >= wanted:
            break
        floor = floor / 2 if floor > 1e-6 else 0.0
    last = mesh.kth_of_batch(values, wanted)
    keep = values >= last if float(last) > 0 else values > 0
    found = Support(support.rows[keep], support.latents[keep], support.batch, support.d_sae)
    return found, values[keep], float(last)


def _mean_of_finite(x: Tensor, mesh: Mesh) -> float:
    """Over rows that have an entry; the smallest of a row is the smallest over the shards."""
    smallest = torch.stack(mesh.gather(x)).amin(0)
    smallest = smallest[smallest.isfinite()]
    both = torch.stack([smallest.sum(), smallest.new_tensor(float(len(smallest)))])
    both = mesh.sum_over_data(both)
    return float(both[0] / both[1].clamp_min(1))
