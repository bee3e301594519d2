"""Sparse arithmetic shared by every dictionary: a dense encoder product, and only the entries that matter
after it.

Notable:
- ``encode_above`` never holds more than a cache-sized block of the [batch, d_sae] pre-activations;
- everything behind it, decoding and all backward passes, touches only the entries of the ``Support``;
- both are differentiable by ordinary autograd, so an objective is written as if the codes were dense;
- the three products below are stock torch, and run on CPU and CUDA.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch.autograd import Function
from torch.nn.functional import embedding_bag

from gemscope.core.arrays import Bool, Float, Int, Tensor

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

_BLOCK = {"cpu": 1 << 20}
"""Pre-activations computed at a time: 4 MB on a CPU, for its cache; elsewhere few launches matter more."""


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
        return torch.sort(self.latents, stable=True)[1], _offsets(self.latents, self.d_sae)

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


def times_latents(
    support: Support, values: Float[Tensor, " entries"], table: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "batch d"]:
    """The sparse matrix times a matrix with one row per latent."""
    offsets = support.row_offsets[:-1]
    return embedding_bag(support.latents, table, offsets, mode="sum", per_sample_weights=values)


def times_rows(
    support: Support, values: Float[Tensor, " entries"], table: Float[Tensor, "batch d"]
) -> Float[Tensor, "d_sae d"]:
    """The transposed sparse matrix times a matrix with one row per batch row."""
    order, offsets = support.by_latent
    rows, weights = support.rows.index_select(0, order), values.index_select(0, order)
    return embedding_bag(rows, table, offsets[:-1], mode="sum", per_sample_weights=weights)


def dots(
    support: Support, left: Float[Tensor, "batch d"], right: Float[Tensor, "d_sae d"]
) -> Float[Tensor, " entries"]:
    """``left[row] . right[latent]`` at each entry."""
    zeros = left.new_zeros(len(support.rows))
    size = (support.batch, support.d_sae)
    matrix = torch.sparse_csr_tensor(support.row_offsets, support.latents, zeros, size, check_invariants=False)
    return torch.sparse.sampled_addmm(matrix, left, right.T, beta=0.0).values()


def _select_above(x: Tensor, W_enc: Tensor, b_enc: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, latents and values of the pre-activations above ``floor``, block of rows by block of rows."""
    d_sae = len(b_enc)
    size = max(1, _BLOCK.get(x.device.type, 1 << 26) // d_sae)
    found: list[Tensor] = []
    values: list[Tensor] = []
    for start in range(0, len(x), size):
        pre_acts = torch.addmm(b_enc, x[start : start + size], W_enc)
        where = (pre_acts > floor).view(-1).nonzero().squeeze(1)
        values.append(pre_acts.view(-1).index_select(0, where))
        found.append(where + start * d_sae)
    flat = torch.cat(found)
    rows = torch.div(flat, d_sae, rounding_mode="floor")
    return rows, flat - rows * d_sae, torch.cat(values)


class _Encode(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, latents, values = _select_above(x, W_enc, b_enc, floor)
        ctx.support = Support(rows, latents, len(x), len(b_enc))
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
