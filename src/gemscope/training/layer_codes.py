"""Which entries of a batch matter: TopK, BatchTopK and dead latents, over all layers and processes."""

from collections.abc import Iterator

import torch

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.dictionaries.sparse import Slice, Support, select
from gemscope.training.layer_gradients import Layers
from gemscope.training.sharding import Mesh

_BLOCK = 1 << 14
"""Latents of a layer whose encoder is taken at a time."""

Rows = Float[Tensor, "batch positions d_in"]
Chosen = tuple[Support, Float[Tensor, " entries"]]
"""Entries and their pre-activations."""


def slices(layers: Layers, floor: Float[Tensor, " latents"] | None = None) -> Iterator[Slice]:
    """The encoders of all layers, with a floor for each latent, or None for above 0."""
    for layer in range(layers.n):
        W_enc, b_enc = layers.weights[f"W_enc.{layer}"], layers.weights[f"b_enc.{layer}"]
        for first in range(0, layers.d_sae, _BLOCK):
            part = slice(first, min(first + _BLOCK, layers.d_sae))
            index = layer * layers.d_sae + first
            low = None if floor is None else floor[index : index + part.stop - first]
            yield Slice(layer, index, W_enc[part].T, b_enc[part], low)


def _slices_of(layers: Layers, which: Int[Tensor, " chosen"]) -> Iterator[Slice]:
    """The encoders of some latents, ascending; an entry's latent is then its place among them."""
    owner, first = torch.div(which, layers.d_sae, rounding_mode="floor"), 0
    for layer in range(layers.n):
        mine = which[owner == layer] - layer * layers.d_sae
        for own in mine.split(_BLOCK) if len(mine) else ():
            W_enc, b_enc = layers.weights[f"W_enc.{layer}"], layers.weights[f"b_enc.{layer}"]
            yield Slice(layer, first, W_enc[own].T, b_enc[own], None)
            first += len(own)


def row_codes(layers: Layers, x: Rows, k: int, mesh: Mesh, which: Int[Tensor, " chosen"] | None = None) -> Chosen:
    """The ``k`` largest positive entries of every row, over all processes (Gao et al. 2024, eq. 3), of all latents or
    of those of this process in ``which``, ascending; of equal ones the first.
    """
    count = layers.n * layers.d_sae if which is None else max(1, len(which))
    support, values = select(x, slices(layers) if which is None else _slices_of(layers, which), count, k)
    latents = support.latents if which is None else which[support.latents]
    support = Support(support.rows, latents, support.batch, layers.n * layers.d_sae)
    if mesh.latents == 1:
        return support, values
    best = values.new_zeros(support.batch, k)
    index = torch.full_like(best, 1 << 62, dtype=torch.int64)
    place = torch.arange(len(values), device=values.device) - support.row_offsets[:-1][support.rows]
    overall = support.latents * mesh.latents + mesh.shard  # index over all layers and processes
    best[support.rows, place], index[support.rows, place] = values, overall
    last, at = mesh.best(best, index, k)
    last, at = last[support.rows], at[support.rows]
    return _kept(support, values, (values > last) | ((values == last) & (overall <= at)))


def batch_codes(layers: Layers, x: Rows, k: float, mesh: Mesh, guess: float) -> tuple[Support, Tensor, float]:
    """The ``batch * k`` largest positive entries of the batch, over all processes (Bussmann et al. 2024), and the
    smallest of them.

    Only entries above a floor are looked at: three quarters of the last smallest value, halved until there are enough.
    """
    wanted = round(len(x) * mesh.data * k)
    floor = max(0.75 * guess, 0.0)
    while True:
        floors = x.new_full((layers.n * layers.d_sae,), floor)
        support, values = select(x, slices(layers, floors), len(floors))
        count = torch.tensor(float(len(values)), device=x.device)
        if floor <= 0 or float(mesh.sum_over_data(mesh.sum_over_latents(count))) >= wanted:
            break
        floor = floor / 2 if floor > 1e-6 else 0.0
    last = mesh.kth_of_batch(values, wanted)
    keep = values >= last if float(last) > 0 else values > 0
    return *_kept(support, values, keep), float(last)


def with_dead(
    layers: Layers, x: Rows, chosen: Chosen, dead: Bool[Tensor, " latents"], k: int, mesh: Mesh
) -> tuple[Support, Float[Tensor, " all"], Bool[Tensor, " all"]]:
    """The entries of ``chosen`` and the ``k`` largest positive ones of every row among dead latents, which are not in
    it (AuxK, Gao et al. 2024, appendix A.2); and which are ``chosen``'s.
    """
    few, values = row_codes(layers, x, k, mesh, dead.nonzero()[:, 0])
    rows = torch.cat([chosen[0].rows, few.rows])
    latents = torch.cat([chosen[0].latents, few.latents])
    order = (rows * few.d_sae + latents).argsort()
    both = Support(rows[order], latents[order], few.batch, few.d_sae)
    return both, torch.cat([chosen[1], values])[order], order < len(chosen[1])


def _kept(support: Support, values: Tensor, keep: Tensor) -> Chosen:
    return Support(support.rows[keep], support.latents[keep], support.batch, support.d_sae), values[keep]
