"""The sparse products on CUDA, as Triton kernels: sums of chosen rows, and dot products at chosen pairs.

``bag`` is decoding (entries by row) and both gradients of a table (entries by latent); ``pair_dots`` is the gradient
of the codes. Sums are made in the order of the entries, so results repeat bit for bit. Without Triton or a GPU the
module is empty of kernels and ``AVAILABLE`` is False; with TRITON_INTERPRET=1 they run, slowly, on any machine.
"""

import importlib
import importlib.util
import os
from typing import Any

import torch

from gemscope.core.arrays import Float, Int, Tensor

AVAILABLE = bool(
    (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1") and importlib.util.find_spec("triton")
)
"""Whether the kernels can run here."""

triton: Any = importlib.import_module("triton") if AVAILABLE else None
tl: Any = importlib.import_module("triton.language") if AVAILABLE else None

_WIDEST = 1024
"""Columns that one program of ``bag`` sums."""


if AVAILABLE:

    @triton.jit
    def _bag_program(out, index, weights, offsets, table, d, BLOCK: tl.constexpr):  # pyright: ignore
        number = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < d
        first = tl.load(offsets + number)
        last = tl.load(offsets + number + 1)
        total = tl.zeros((BLOCK,), dtype=out.dtype.element_ty)
        for i in range(first, last):
            row = tl.load(index + i)
            total += tl.load(weights + i) * tl.load(table + row * d + column, mask=inside, other=0.0)
        tl.store(out + number * d + column, total, mask=inside)

    @triton.jit
    def _dots_program(out, latents, offsets, left, right, d, BLOCK: tl.constexpr):  # pyright: ignore
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < d
        own = tl.load(left + row * d + column, mask=inside, other=0.0)
        first = tl.load(offsets + row)
        last = tl.load(offsets + row + 1)
        for i in range(first, last):
            other = tl.load(right + tl.load(latents + i) * d + column, mask=inside, other=0.0)
            tl.store(out + i, tl.sum(own * other))

else:
    _bag_program = _dots_program = None


def bag(
    index: Int[Tensor, " entries"],
    table: Float[Tensor, "m d"],
    offsets: Int[Tensor, " bags_plus_1"],
    weights: Float[Tensor, " entries"],
) -> Float[Tensor, "bags d"]:
    """Row b is the sum of weights[i] * table[index[i]] over offsets[b] <= i < offsets[b + 1]."""
    bags, d = len(offsets) - 1, table.shape[1]
    out = table.new_empty(bags, d)
    block = min(_WIDEST, triton.next_power_of_2(d))
    if bags:
        grid = (bags, triton.cdiv(d, block))
        arguments = [x.contiguous() for x in (index, weights, offsets, table)]
        _bag_program[grid](out, *arguments, d, BLOCK=block)
    return out


def pair_dots(
    latents: Int[Tensor, " entries"],
    offsets: Int[Tensor, " batch_plus_1"],
    left: Float[Tensor, "batch d"],
    right: Float[Tensor, "d_sae d"],
) -> Float[Tensor, " entries"]:
    """left[row] . right[latent] at each entry, entries row by row."""
    out, d = left.new_empty(len(latents)), left.shape[1]
    if len(latents):
        block = triton.next_power_of_2(d)
        arguments = [x.contiguous() for x in (latents, offsets, left, right)]
        _dots_program[(len(left),)](out, *arguments, d, BLOCK=block)
    return out
