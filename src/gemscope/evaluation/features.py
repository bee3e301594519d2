"""What probes are fitted on: sparse codes or dense activations, behind one pair of questions."""

from typing import Protocol, runtime_checkable

import torch

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.evaluation.concepts import ActiveEntries, rows_to_latents


@runtime_checkable
class Features(Protocol):
    """A matrix of rows and features."""

    def contrast(
        self, train: Bool[Tensor, " rows"], y: Bool[Tensor, "rows labels"]
    ) -> Float[Tensor, "features labels"]:
        """(mean on positive − mean on negative training rows) / standard deviation on the training rows."""
        ...

    def columns(self, chosen: Int[Tensor, "labels k"]) -> Float[Tensor, "labels rows k"]:
        """Some features for each label."""
        ...


def _contrast(
    hits: Float[Tensor, "features labels"],
    whole: Float[Tensor, " features"],
    squares: Float[Tensor, " features"],
    positives: Float[Tensor, " labels"],
    rows: int,
) -> Float[Tensor, "features labels"]:
    mean = whole / rows
    deviation = (squares / rows - mean.square()).clamp_min(0.0).sqrt()
    difference = hits / positives - (whole[:, None] - hits) / (rows - positives)
    return torch.where(deviation[:, None] > 0, difference / deviation.clamp_min(1e-300)[:, None], 0.0)


class Sparse:
    """The codes of a dictionary."""

    def __init__(self, active: ActiveEntries) -> None:
        self.active = active

    def contrast(
        self, train: Bool[Tensor, " rows"], y: Bool[Tensor, "rows labels"]
    ) -> Float[Tensor, "features labels"]:
        """See ``Features``."""
        keep = train[self.active.row]
        part = ActiveEntries(
            self.active.shape, self.active.row[keep], self.active.latent[keep], self.active.value[keep]
        )
        value = part.value.double()
        zeros = torch.zeros(part.shape[1], dtype=torch.float64)
        whole, squares = zeros.index_add(0, part.latent, value), zeros.index_add(0, part.latent, value.square())
        known = y[train].double().sum(0)
        return _contrast(rows_to_latents(part, value, y.double()), whole, squares, known, int(train.sum()))

    def columns(self, chosen: Int[Tensor, "labels k"]) -> Float[Tensor, "labels rows k"]:
        """See ``Features``."""
        wanted, place = chosen.unique(return_inverse=True)
        lookup = torch.full((self.active.shape[1],), -1, dtype=torch.long)
        lookup[wanted] = torch.arange(len(wanted))
        at = lookup[self.active.latent]
        keep = at >= 0
        table = torch.zeros(self.active.shape[0], len(wanted), dtype=torch.float32)
        table[self.active.row[keep], at[keep]] = self.active.value[keep].float()
        return table[:, place].transpose(0, 1).contiguous()


class Dense:
    """Activations, or any other matrix."""

    def __init__(self, x: Float[Tensor, "rows features"]) -> None:
        self.x = x

    def contrast(
        self, train: Bool[Tensor, " rows"], y: Bool[Tensor, "rows labels"]
    ) -> Float[Tensor, "features labels"]:
        """See ``Features``."""
        x, known = self.x[train].double(), y[train].double()
        x = x - x.mean(0)
        return _contrast(x.T @ known, x.sum(0), x.square().sum(0), known.sum(0), len(x))

    def columns(self, chosen: Int[Tensor, "labels k"]) -> Float[Tensor, "labels rows k"]:
        """See ``Features``."""
        return self.x[:, chosen].transpose(0, 1).contiguous()


def strongest(contrast: Float[Tensor, "features labels"], k: int) -> Int[Tensor, "labels k"]:
    """The features of the largest absolute contrast for each label, the strongest first."""
    return contrast.abs().topk(min(k, len(contrast)), dim=0).indices.T
