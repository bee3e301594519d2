"""Reports to Weights & Biases (extra ``wandb``). Without a network, or without a key, the run is kept in the folder
(``wandb sync`` uploads it); training never waits for it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemscope.core.extras import need
from gemscope.training.log import numbers


class WeightsAndBiases:
    """A ``Log`` to one W&B run. Raises InputError when wandb is not installed."""

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any], name: str | None = None) -> None:
        module = need("wandb", "wandb")
        online = bool(os.environ.get("WANDB_API_KEY"))
        mode = os.environ.get("WANDB_MODE", "online" if online else "offline")
        folder.mkdir(parents=True, exist_ok=True)
        self._run = module.init(project=project, dir=str(folder), config=dict(config), name=name, mode=mode)
        self._after = 0

    def write(self, step: int, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Every number, at its step; steps that were reported before a resume are not repeated."""
        if step > self._after:
            self._run.log(numbers(values), step=step)

    def rewind(self, step: int) -> None:
        """A run there cannot forget; it goes on after ``step``."""
        self._after = step

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
