"""Learned directions against true ones: the best pairs, how alike they are, and what chance would give."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.evaluation.worlds.directions import unit

_DRAWS = 3
"""Random dictionaries behind a floor."""


@dataclass(frozen=True)
class Match:
    """How alike two sets of directions are."""

    pairs: tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]
    """Latents and features, one to one, with the largest sum of |cosines|; as many as the smaller set has."""
    best: Int[Tensor, " latents"]
    """For each latent the feature of largest |cosine|; several may have the same."""
    mcc: float
    """Mean |cosine| of the pairs (mean correlation coefficient)."""
    uniqueness: float
    """Different features in ``best`` over the number of latents."""


def match(learned: Float[Tensor, "latents width"], true: Float[Tensor, "features width"]) -> Match:
    """Directions by |cosine|, in float64; a row of zeros is like nothing."""
    cosines = cosines_of(learned, true)
    latents, features = assignment(1 - cosines.cpu().numpy())
    pairs = torch.from_numpy(latents), torch.from_numpy(features)
    best = cosines.argmax(1).cpu()
    mcc = cosines[pairs[0], pairs[1]].mean().item()
    return Match(pairs, best, mcc, len(best.unique()) / len(best))


def cosines_of(learned: Float[Tensor, "a width"], true: Float[Tensor, "b width"]) -> Float[Tensor, "a b"]:
    """|cosine| of all pairs, float64."""
    return (unit(learned.detach().double()) @ unit(true.double()).T).abs()


def random_floor(
    where: Bool[Tensor, "latents width"], true: Float[Tensor, "features width"], seed: int = 0
) -> tuple[float, float]:
    """MCC and uniqueness of random directions, 0 outside ``where``: the mean of three draws."""
    found: list[Match] = []
    for draw in range(_DRAWS):
        generator = torch.Generator().manual_seed(seed * _DRAWS + draw)
        found.append(match(torch.randn(where.shape, generator=generator) * where.cpu(), true.cpu()))
    return math.fsum(m.mcc for m in found) / _DRAWS, math.fsum(m.uniqueness for m in found) / _DRAWS


def adjusted(value: float, floor: float) -> float:
    """0 at the floor, 1 at 1."""
    return (value - floor) / (1 - floor)


def assignment(cost: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns, one to one, of least total cost, min(rows, columns) of them, rows ascending.

    Shortest augmenting paths with potentials, one row after the other, the inner loop over columns in numpy (Crouse
    2016, "On implementing 2D rectangular assignment algorithms"); scipy's ``linear_sum_assignment`` does the same.
    """
    if cost.shape[0] > cost.shape[1]:
        columns, rows = assignment(np.ascontiguousarray(cost.T))
        order = np.argsort(rows)
        return rows[order], columns[order]
    n, m = cost.shape
    row_of = np.full(m, -1, dtype=np.int64)
    column_of = np.full(n, -1, dtype=np.int64)
    u, v = np.zeros(n), np.zeros(m)
    for row in range(n):
        _augment(cost, row, row_of, column_of, u, v)
    return np.arange(n, dtype=np.int64), column_of


def _augment(
    cost: NDArray[np.float64],
    start: int,
    row_of: NDArray[np.int64],
    column_of: NDArray[np.int64],
    u: NDArray[np.float64],
    v: NDArray[np.float64],
) -> None:
    """Give row ``start`` a column, moving others; potentials u and v stay feasible."""
    m = cost.shape[1]
    shortest, before = np.full(m, np.inf), np.full(m, -1, dtype=np.int64)
    open_, rows, reached = np.ones(m, dtype=bool), [start], 0.0
    row = start
    while True:
        through = reached + cost[row] - u[row] - v
        better = open_ & (through < shortest)
        shortest[better], before[better] = through[better], row
        column = int(np.where(open_, shortest, np.inf).argmin())
        reached = float(shortest[column])
        open_[column] = False
        if row_of[column] < 0:
            break
        row = int(row_of[column])
        rows.append(row)
    u[start] += reached
    others = np.array(rows[1:], dtype=np.int64)
    u[others] += reached - shortest[column_of[others]]
    closed = ~open_
    v[closed] -= reached - shortest[closed]
    while True:
        row = int(before[column])
        row_of[column] = row
        column_of[row], column = column, int(column_of[row])
        if row == start:
            return
