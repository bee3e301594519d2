"""Unit directions pushed apart, more of them than there are dimensions."""

import torch
from torch.optim import Adam

from gemscope.core.arrays import Float, Tensor

_CHUNK = 1024


def unit(rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Every row over its norm; rows of zeros stay."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def spread_out(rows: Float[Tensor, "n d"], steps: int, rate: float) -> Float[Tensor, "n d"]:
    """Unit rows after ``steps`` of Adam on sum_{i != j} (d_i d_j)^2 + n sum_i (|d_i|^2 - 1)^2, then normalised
    (SynthSAEBench, the recipe of its 16k world).
    """
    table = unit(rows).clone()
    table.requires_grad_()
    optimizer = Adam([table], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        for first in range(0, len(table), _CHUNK):
            part = table[first : first + _CHUNK]
            itself = part.square().sum(1)
            others = (part @ table.T).square().sum() - itself.square().sum()
            (others + len(table) * (itself - 1).square().sum()).backward()
        optimizer.step()
    return unit(table.detach())


def mean_max_cosine(rows: Float[Tensor, "n d"]) -> float:
    """Mean over rows of the largest |cosine| with another row (rho_mm)."""
    table, found = unit(rows), 0.0
    for first in range(0, len(table), _CHUNK):
        cosines = (table[first : first + _CHUNK] @ table.T).abs()
        at = torch.arange(len(cosines), device=rows.device)
        cosines[at, at + first] = 0.0
        found += cosines.max(1).values.double().sum().item()
    return found / len(table)
