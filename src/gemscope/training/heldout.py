"""Measures on rows that were not trained on, for any kind of dictionary, while it trains and after."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.core.sites import Site
from gemscope.dictionaries.base import Dictionary
from gemscope.training.config import TrainConfig
from gemscope.training.data import ActivationSource, first_rows

_ROWS = 1024


class HeldOut:
    """An ``Evaluate``: L0, FVU, dead and dense latents on the first ``rows`` rows of ``data``."""

    def __init__(self, data: ActivationSource, sites: Sequence[Site], rows: int = 8192, seed: int = 0) -> None:
        self._rows: Mapping[Site, Tensor] = first_rows(data, list(dict.fromkeys(sites)), rows, min(rows, 1024), seed)

    def __call__(self, config: TrainConfig, dictionary: Dictionary) -> Mapping[str, Any]:
        """The measures, as plain JSON values."""
        return measured(dictionary, [self._rows[s] for s in config.reads], [self._rows[s] for s in config.writes])


@torch.no_grad()
def measured(
    dictionary: Dictionary, x: Sequence[Float[Tensor, "rows _"]], y: Sequence[Float[Tensor, "rows _"]]
) -> dict[str, Any]:
    """``l0`` per row over all layers; ``fvu`` of each layer and their mean; shares of latents that were never active
    (``dead_fraction``) and of those active on more than a tenth of the rows (``dense_fraction``).
    """
    device = dictionary.b_enc.device if isinstance(dictionary.b_enc, Tensor) else dictionary.b_enc[0].device  # pyright: ignore
    rows, count, active = len(x[0]), torch.zeros(dictionary.n_latents), 0
    errors = torch.zeros(len(y), dtype=torch.float64)
    for start in range(0, rows, _ROWS):
        part = torch.stack([t[start : start + _ROWS] for t in x], 1).to(device).float()
        target = torch.stack([t[start : start + _ROWS] for t in y], 1).to(device).float()
        support, values = dictionary._select(part)  # pyright: ignore[reportPrivateUsage]
        active += len(values)
        count += torch.bincount(support.latents.cpu(), minlength=dictionary.n_latents)
        recon = dictionary(part if dictionary.n_positions > 1 else part[:, 0])
        errors += (target - recon.view_as(target)).double().square().sum((0, 2)).cpu()
    spread = torch.tensor([float((t.double() - t.double().mean(0)).square().sum()) for t in y])
    by_layer = (errors / spread).tolist()
    return {
        "rows": rows,
        "l0": active / rows,
        "fvu": sum(by_layer) / len(by_layer),
        "fvu_by_layer": by_layer,
        "dead_fraction": float((count == 0).float().mean()),
        "dense_fraction": float((count > rows / 10).float().mean()),
    }
