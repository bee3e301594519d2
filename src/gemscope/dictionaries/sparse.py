"""Sparse arithmetic shared by every dictionary: a dense encoder product, and only the entries that matter
after it.

Notable:
- ``select`` takes the encoder slice by slice, wherever it comes from, and never holds more than a cache-sized
  block of the [batch, d_sae] pre-activations;
- everything behind it, decoding and all backward passes, touches only the entries of the ``Support``;
- ``encode_above`` and ``decode_sparse`` are differentiable by ordinary autograd, so an objective is written as
  if the codes were dense;
- the three products below are stock torch on a CPU, and Triton kernels on CUDA where Triton is installed.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import torch
from torch.autograd import Function
from torch.nn.functional import embedding_bag

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.dictionaries import triton_kernels
from gemscope.dictionaries.products import Affine

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

_BLOCK = {"cpu": 1 << 20}
"""Pre-activations computed at a time: 4 MB on a CPU, for its cache; elsewhere few launches matter more."""


_DENSE = 0.1
"""Share of all entries above which products are dense. On a CPU they are faster from 0.14 at 16,384 latents, 0.19 at
8,192 and 0.22 at 4,096 (benchmarks/crossing.py, d 640): up to there sparse ones do not lose. Not measured on CUDA."""


@dataclass(frozen=True)
class Support:
    """The (row, latent) pairs of a sparse [batch, d_sae] matrix, row by row, latents ascending within a row."""

    rows: Int[Tensor, " entries"]
    latents: Int[Tensor, " entries"]
    batch: int
    d_sae: int

    @cached_property
    def row_offsets(self) -> Int[Tensor, " batch_plus_1"]:
        """Where each row's entries start; the last one is the number of entries (the CSR row pointer)."""
        return _offsets(self.rows, self.batch)

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " entries"], Int[Tensor, " d_sae_plus_1"]]:
        """The order that sorts the entries by latent, and where each latent's entries then start."""
        short = self.latents.to(torch.int16 if self.d_sae < 1 << 15 else torch.int32)  # sorts in half the time
        return torch.sort(short, stable=True)[1], _offsets(self.latents, self.d_sae)

    @cached_property
    def is_dense(self) -> bool:
        """Whether there are so many entries that dense matrices are used."""
        return len(self.rows) > _DENSE * self.batch * self.d_sae

    def between(self, first: int, last: int) -> tuple["Support", Bool[Tensor, " entries"]]:
        """The entries of latents ``first`` to ``last`` - 1, and which entries they are."""
        inside = (self.latents >= first) & (self.latents < last)
        return Support(self.rows[inside], self.latents[inside], self.batch, self.d_sae), inside

    def per_row(self, values: Float[Tensor, " entries"]) -> Float[Tensor, " batch"]:
        """Sum of the entries of each row; differentiable."""
        return values.new_zeros(self.batch).index_add(0, self.rows, values)


def _offsets(index: Tensor, size: int) -> Tensor:
    counts = torch.bincount(index, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def bag(
    index: Int[Tensor, " entries"],
    table: Float[Tensor, "m d"],
    offsets: Int[Tensor, " bags_plus_1"],
    weights: Float[Tensor, " entries"],
) -> Float[Tensor, "bags d"]:
    """Row b is the sum of weights[i] * table[index[i]] over offsets[b] <= i < offsets[b + 1]."""
    if table.is_cuda and triton_kernels.AVAILABLE:
        return triton_kernels.bag(index, table, offsets, weights)
    return embedding_bag(index, table, offsets[:-1], mode="sum", per_sample_weights=weights)


def times_latents(
    support: Support, values: Float[Tensor, " entries"], table: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "batch d"]:
    """The sparse matrix times a matrix with one row per latent."""
    if support.is_dense:
        parts = [part @ table for part, _ in _dense_blocks(support, values)]
        return torch.cat(parts)
    return bag(support.latents, table, support.row_offsets, values)


def times_rows(
    support: Support, values: Float[Tensor, " entries"], table: Float[Tensor, "batch d"]
) -> Float[Tensor, "d_sae d"]:
    """The transposed sparse matrix times a matrix with one row per batch row."""
    if support.is_dense:
        found = table.new_zeros(support.d_sae, table.shape[1])
        for part, start in _dense_blocks(support, values):
            found.addmm_(part.T, table[start : start + len(part)])
        return found
    order, offsets = support.by_latent
    return bag(support.rows.index_select(0, order), table, offsets, values.index_select(0, order))


def dots(
    support: Support, left: Float[Tensor, "batch d"], right: Float[Tensor, "d_sae d"]
) -> Float[Tensor, " entries"]:
    """``left[row] . right[latent]`` at each entry.

    Taken latent by latent: of the two tables it is then the small one, ``left``, that is read out of order.
    """
    if support.is_dense:
        cuts = [*support.row_offsets[: support.batch : _DENSE_ROWS].tolist(), len(support.rows)]
        flat = (support.rows % _DENSE_ROWS) * support.d_sae + support.latents
        parts: list[Tensor] = []
        for i, (a, b) in enumerate(pairwise(cuts)):
            block = left[i * _DENSE_ROWS : (i + 1) * _DENSE_ROWS] @ right.T
            parts.append(block.view(-1).index_select(0, flat[a:b]))
        return torch.cat(parts)
    if left.is_cuda and triton_kernels.AVAILABLE:
        return triton_kernels.pair_dots(support.latents, support.row_offsets, left, right)
    order, offsets = support.by_latent
    rows = support.rows.index_select(0, order)
    size = (support.d_sae, support.batch)
    zeros = left.new_zeros(len(rows))
    matrix = torch.sparse_csr_tensor(offsets, rows, zeros, size, check_invariants=False)
    found = torch.sparse.sampled_addmm(matrix, right, left.T, beta=0.0).values()
    return torch.empty_like(found).index_copy_(0, order, found)


_DENSE_ROWS = 256


def _dense_blocks(support: Support, values: Tensor) -> Iterator[tuple[Tensor, int]]:
    """The matrix, some rows at a time, and which row is the first."""
    cuts = [*support.row_offsets[: support.batch : _DENSE_ROWS].tolist(), len(values)]
    flat = (support.rows % _DENSE_ROWS) * support.d_sae + support.latents
    for i, (a, b) in enumerate(pairwise(cuts)):
        count = min(_DENSE_ROWS, support.batch - i * _DENSE_ROWS)
        part = values.new_zeros(count * support.d_sae).index_put_((flat[a:b],), values[a:b])
        yield part.view(count, support.d_sae), i * _DENSE_ROWS


@dataclass(frozen=True)
class Slice:
    """Some neighbouring latents of an encoder."""

    position: int
    """Which of a row's vectors they read; 0 for single-layer kinds."""
    first: int
    """Index of the first of them, counted over all positions."""
    W_enc: Float[Tensor, "d_in width"]
    b_enc: Float[Tensor, " width"]
    floor: Float[Tensor, " width"] | None
    """An entry is kept where its pre-activation is above this; None means above 0."""


def select(
    x: Float[Tensor, "batch positions d_in"], slices: Iterable[Slice], d_sae: int, k: int | None = None
) -> tuple[Support, Float[Tensor, " entries"]]:
    """The pre-activations above their floors, or with ``k`` the k largest positive ones of each row, and where.

    Slices may be in any dtype; the products are in that of ``x``. ``d_sae`` counts the latents of all positions.
    """
    batch, parts = len(x), _Parts([], [], [])
    best = None if k is None else x.new_zeros(batch, min(k, d_sae))
    for part in slices:
        width = len(part.b_enc)
        W_enc, b_enc = part.W_enc.to(x.dtype), part.b_enc.to(x.dtype)
        floor = 0.0 if part.floor is None else part.floor.to(x.dtype)
        size = max(1, _BLOCK.get(x.device.type, 1 << 26) // width)
        product = Affine(W_enc, b_enc)
        for start in range(0, batch, size):
            pre_acts = product(x[start : start + size, part.position])
            kept = pre_acts > floor
            if best is not None:
                kept &= pre_acts >= _raise_floor(best[start : start + size], pre_acts)
            where = kept.view(-1).nonzero().squeeze(1)
            row = torch.div(where, width, rounding_mode="floor")
            parts.values.append(pre_acts.view(-1).index_select(0, where))
            parts.latents.append(where - row * width + part.first)
            parts.rows.append(row + start)
        parts.slices += 1
    rows, latents, values = parts.joined(x, d_sae)
    if best is not None and k is not None:
        keep = not_surplus(rows, values, best[:, -1], k)
        rows, latents, values = rows[keep], latents[keep], values[keep]
    return Support(rows, latents, batch, d_sae), values


@dataclass
class _Parts:
    """What ``select`` has found so far, block by block."""

    rows: list[Tensor]
    latents: list[Tensor]
    values: list[Tensor]
    slices: int = 0

    def joined(self, x: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
        """Everything, row by row."""
        if not self.rows:
            none = torch.zeros(0, dtype=torch.int64, device=x.device)
            return none, none, x.new_zeros(0)
        rows, latents, values = torch.cat(self.rows), torch.cat(self.latents), torch.cat(self.values)
        if self.slices < 2:
            return rows, latents, values
        order = (rows * d_sae + latents).argsort()
        return rows[order], latents[order], values[order]


def _raise_floor(best: Tensor, pre_acts: Tensor) -> Tensor:
    """Merge a block into the largest positive values of its rows, in place; the smallest of them, per row."""
    count = best.shape[1]
    largest = pre_acts.topk(min(count, pre_acts.shape[1]), dim=1).values
    best.copy_(torch.cat([best, largest], dim=1).topk(count, dim=1).values)
    return best[:, -1:]


def not_surplus(rows: Tensor, values: Tensor, smallest: Tensor, k: int) -> Tensor:
    """Which of the candidates are among the ``k`` largest of their row, of equal ones the first."""
    at = smallest[rows]
    tied = values == at
    above = torch.zeros(len(smallest), dtype=torch.int64, device=rows.device).index_add(0, rows, (values > at).long())
    count = torch.zeros_like(above).index_add(0, rows, tied.long())
    before = count.cumsum(0) - count
    rank = tied.cumsum(0) - before[rows]
    return (values > at) | (tied & (rank <= k - above[rows]))


class _Encode(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        support, values = select(x[:, None], [Slice(0, 0, W_enc, b_enc, floor)], len(b_enc))
        rows, latents = support.rows, support.latents
        ctx.support = support
        ctx.save_for_backward(x, W_enc)
        ctx.mark_non_differentiable(rows, latents)
        return rows, latents, values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        grad = grads[2]
        x, W_enc = ctx.saved_tensors
        support: Support = ctx.support
        wants_x, wants_W, wants_b, _ = ctx.needs_input_grad
        grad_x = times_latents(support, grad, W_enc.T.contiguous()) if wants_x else None
        grad_W = times_rows(support, grad, x).T if wants_W else None
        grad_b = grad.new_zeros(support.d_sae).index_add(0, support.latents, grad) if wants_b else None
        return grad_x, grad_W, grad_b, None


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, support: Support) -> Tensor:
        ctx.support = support
        ctx.save_for_backward(values, W_dec)
        return times_latents(support, values, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad = grads[0].contiguous()
        values, W_dec = ctx.saved_tensors
        wants_values, wants_W, _ = ctx.needs_input_grad
        grad_values = dots(ctx.support, grad, W_dec) if wants_values else None
        return grad_values, times_rows(ctx.support, values, grad) if wants_W else None, None


def encode_above(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    floor: Float[Tensor, " d_sae"],
) -> tuple[Support, Float[Tensor, " entries"]]:
    """The pre-activations x @ W_enc + b_enc that lie above ``floor``, and where; differentiable except in
    ``floor``.
    """
    rows, latents, values = cast(tuple[Tensor, Tensor, Tensor], _Encode.apply(x, W_enc, b_enc, floor))
    return Support(rows, latents, len(x), len(b_enc)), values


def decode_sparse(
    support: Support, values: Float[Tensor, " entries"], W_dec: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "batch d_out"]:
    """The sparse codes times W_dec (no bias); differentiable in ``values`` and ``W_dec``."""
    return cast(Tensor, _Decode.apply(values, W_dec, support))


def decode_prefixes(
    support: Support, values: Float[Tensor, " entries"], W_dec: Float[Tensor, "d_sae d_out"], prefixes: Sequence[int]
) -> list[Float[Tensor, "batch d_out"]]:
    """``decode_sparse`` of the first ``p`` latents only, for each ``p`` of ascending ``prefixes``.

    Each entry is decoded once: a prefix adds its own latents to the prefix before it.
    """
    found: list[Tensor] = []
    for first, last in zip([0, *prefixes], prefixes, strict=False):
        part, inside = support.between(first, last)
        added = decode_sparse(part, values[inside], W_dec)
        found.append(found[-1] + added if found else added)
    return found


class _Attach(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, support: Support, columns: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.shape, ctx.support, ctx.columns = x.shape, support, columns
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        batch, positions, d_in = ctx.shape
        support: Support = ctx.support
        used, local = support.latents.unique(return_inverse=True)
        rows = support.rows * positions + torch.div(support.latents, support.d_sae // positions, rounding_mode="floor")
        read = Support(rows, local, batch * positions, len(used))
        return times_latents(read, grad.contiguous(), ctx.columns(used)).view(batch, positions, d_in), None, None, None


def attach(
    x: Float[Tensor, "batch positions d_in"],
    support: Support,
    values: Float[Tensor, " entries"],
    columns: Callable[[Int[Tensor, " latents"]], Float[Tensor, "latents d_in"]],
) -> Float[Tensor, " entries"]:
    """``values``, selected from a frozen encoder without autograd, with their gradient to ``x``.

    ``columns`` gives the encoder's columns of some latents, as rows.
    """
    return cast(Tensor, _Attach.apply(x, values, support, columns)) if x.requires_grad else values
