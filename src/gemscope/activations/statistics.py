"""Mean, norms and second moments of a site, gathered in parts and added up in a fixed order."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gemscope.core.arrays import Float, Tensor

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """Sums over rows, as stored; the empty ones are zeros."""

    rows: int
    total: Vector
    """Sum of the rows [width]."""
    squares: Vector
    """Sum of the squared rows [width]."""
    norms: float
    """Sum of the rows' Euclidean norms."""
    largest: float
    """The largest norm."""

    @property
    def mean(self) -> Vector:
        """Mean row [width]."""
        return self.total / max(self.rows, 1)

    @property
    def second_moment(self) -> Vector:
        """Mean square of each coordinate [width]."""
        return self.squares / max(self.rows, 1)

    @property
    def mean_norm(self) -> float:
        """Mean of the rows' norms."""
        return self.norms / max(self.rows, 1)

    @property
    def mean_square_norm(self) -> float:
        """Mean of the rows' squared norms: C**2 for the C with E||x / C||**2 = 1."""
        return float(self.second_moment.sum())

    def scalars(self) -> dict[str, Any]:
        """Plain JSON values: the sums that are single numbers."""
        return {"norms": self.norms, "largest": self.largest}


def none_yet(width: int) -> SiteStatistics:
    """Statistics of no rows."""
    return SiteStatistics(0, np.zeros(width), np.zeros(width), 0.0, 0.0)


def of_rows(
    rows: Float[Tensor, "rows width"], wide: Float[Tensor, "rows width"]
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "sums"]]:
    """The rows' norms, and the sums over them end to end in one float32 tensor on their device: total, squares, norms,
    largest. ``wide`` is float32 memory of the same shape, overwritten.
    """
    total = wide.copy_(rows).sum(0)
    norms = wide.square_().sum(1).sqrt_()
    largest = norms.max() if len(norms) else norms.sum()
    return norms, torch.cat([total, wide.sum(0), torch.stack([norms.sum(), largest])])


def unpacked(rows: int, packed: Float[Tensor, "packed"]) -> SiteStatistics:
    """Statistics of a batch."""
    values = packed.double().numpy()
    width = (len(values) - 2) // 2
    return SiteStatistics(rows, values[:width], values[width:-2], float(values[-2]), float(values[-1]))


def added(parts: Iterable[SiteStatistics], width: int) -> SiteStatistics:
    """Several added up, in the order given."""
    whole = none_yet(width)
    for part in parts:
        whole = SiteStatistics(
            rows=whole.rows + part.rows,
            total=whole.total + part.total,
            squares=whole.squares + part.squares,
            norms=whole.norms + part.norms,
            largest=max(whole.largest, part.largest),
        )
    return whole
