"""Gradients of the two large tables as sums of sparse outer products, never dense.

The gradient of W_dec is acts' @ grad_recon, that of the encoder rows E = W_enc.T is grad_pre' @ x, both with one
factor so sparse that the products below are made only when the optimiser comes to a few latents, in the cache,
and are gone afterwards. Everything before is ordinary autograd: ``encode`` and ``decode`` hand their gradients to
an ``OuterGradient`` instead of returning them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.autograd import Function

from gemscope.core.arrays import Float, Tensor
from gemscope.dictionaries.sparse import Support, bag, dots, times_latents, times_rows


@dataclass
class OuterGradient:
    """A gradient [d_sae, d], the sum of (sparse [rows, d_sae])' @ (table [rows, d])."""

    shape: tuple[int, ...]
    terms: list[tuple[Support, Tensor, Tensor]] = field(default_factory=list[tuple[Support, Tensor, Tensor]])

    def add(self, support: Support, values: Tensor, table: Tensor) -> None:
        """One more product."""
        self.terms.append((support, values, table))

    def blocks(self, size: int) -> Iterator[Float[Tensor, "latents d"] | None]:
        """The gradient of ``size`` latents after the other; None where nothing reaches them."""
        parts = [_Term.of(*term, size=size) for term in self.terms]
        for start in range(0, self.shape[0], size):
            found: Tensor | None = None
            for part in parts:
                block = part.block(start, min(start + size, self.shape[0]), start // size)
                found = block if found is None else found if block is None else found + block
            yield found

    def dense(self) -> Float[Tensor, "d_sae d"]:
        """All of it."""
        total = self.terms[0][1].new_zeros(self.shape) if self.terms else torch.zeros(self.shape)
        for support, values, table in self.terms:
            total += times_rows(support, values, table)
        return total


@dataclass(frozen=True)
class _Term:
    """One product, its entries ordered by latent."""

    rows: Tensor
    weights: Tensor
    offsets: Tensor
    cuts: list[int]
    table: Tensor
    whole: Tensor | None

    @staticmethod
    def of(support: Support, values: Tensor, table: Tensor, size: int) -> "_Term":
        order, offsets = support.by_latent
        rows, weights = support.rows.index_select(0, order), values.index_select(0, order)
        cuts = [*offsets[:-1:size].tolist(), len(rows)]
        whole = times_rows(support, values, table) if support.is_dense else None
        return _Term(rows, weights, offsets, cuts, table, whole)

    def block(self, start: int, stop: int, number: int) -> Tensor | None:
        first, last = self.cuts[number], self.cuts[number + 1]
        if first == last:
            return None
        if self.whole is not None:
            return self.whole[start:stop]
        offsets = self.offsets[start : stop + 1] - first
        return bag(self.rows[first:last], self.table, offsets, self.weights[first:last])


def _nonzero(support: Support, values: Tensor) -> tuple[Support, Tensor]:
    """Without the entries that are 0, such as those just below a threshold, where they are many."""
    at = values.nonzero()[:, 0]
    if len(at) > 0.9 * len(values):
        return support, values
    rows, latents = support.rows.index_select(0, at), support.latents.index_select(0, at)
    return Support(rows, latents, support.batch, support.d_sae), values.index_select(0, at)


class _Encode(Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        bias: Tensor,
        centre: Tensor,
        support: Support,
        x: Tensor,
        E: Tensor,
        gradient: OuterGradient,
    ) -> Tensor:
        ctx.rest = (support, x, E, gradient)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        support, x, E, gradient = cast(tuple[Support, Tensor, Tensor, OuterGradient], ctx.rest)
        active, values = _nonzero(support, grad)
        gradient.add(active, values, x)
        of_bias = grad.new_zeros(support.d_sae).index_add_(0, support.latents, grad)
        of_centre = -(of_bias @ E) if ctx.needs_input_grad[2] else None
        return None, of_bias, of_centre, None, None, None, None


def encode(
    support: Support,
    values: Float[Tensor, " entries"],
    x: Float[Tensor, "rows d_in"],
    E: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    centre: Float[Tensor, " d_in"],
    gradient: OuterGradient,
) -> Float[Tensor, " entries"]:
    """``values``, which are the pre-activations x E' + bias at the entries, where x is already less ``centre``;
    with gradients to ``bias``, ``centre`` (if it wants one) and, through ``gradient``, E.

    ``centre`` was subtracted from every row, so its gradient needs the sum over rows only: one product with a
    vector.
    """
    return cast(Tensor, _Encode.apply(values, bias, centre, support, x, E, gradient))


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, support: Support, W_dec: Tensor, gradient: OuterGradient) -> Tensor:
        ctx.rest = (support, W_dec, gradient)
        active, values = _nonzero(support, values)
        ctx.codes = (active, values)
        return times_latents(active, values, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        support, W_dec, gradient = cast(tuple[Support, Tensor, OuterGradient], ctx.rest)
        grad = grads[0].contiguous()
        active, values = cast(tuple[Support, Tensor], ctx.codes)
        gradient.add(active, values, grad)
        return dots(support, grad, W_dec) if ctx.needs_input_grad[0] else None, None, None, None


def decode(
    support: Support,
    values: Float[Tensor, " entries"],
    W_dec: Float[Tensor, "d_sae d_out"],
    gradient: OuterGradient,
) -> Float[Tensor, "batch d_out"]:
    """The sparse codes times W_dec, with gradients to ``values`` and, through ``gradient``, W_dec."""
    return cast(Tensor, _Decode.apply(values, support, W_dec, gradient))
