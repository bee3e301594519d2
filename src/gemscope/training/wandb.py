"""Reports to Weights & Biases (extra ``wandb``). Without a network, or without a key, the run is kept in the folder
(``wandb sync --append`` uploads it, part by part where it was stopped); training never waits for it.
"""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemscope.core.extras import need
from gemscope.core.files import write_text
from gemscope.training.log import numbers


class WeightsAndBiases:
    """A ``Log`` to one W&B run, whose id is kept in the folder. Raises InputError when wandb is not installed."""

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any], name: str | None = None) -> None:
        self._module = need("wandb", "wandb")
        self._folder, self._about = folder, {"project": project, "config": dict(config), "name": name}
        self._run: Any = None
        self._after = 0

    def write(self, step: int, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Every number, at its step; steps that were reported before a resume are not repeated."""
        if self._run is None:
            self._run = self._begin()
        if step > self._after:
            self._run.log(numbers(values), step=step)

    def rewind(self, step: int) -> None:
        """A run there cannot forget: the same one goes on after ``step``; from 0 on it is another."""
        self._after = step
        if step == 0:
            self._id.unlink(missing_ok=True)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()

    @property
    def _id(self) -> Path:
        return self._folder / "id.txt"

    def _begin(self) -> Any:
        if not self._id.is_file():
            write_text(self._id, uuid.uuid4().hex)
        mode = os.environ.get("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
        where = {"dir": str(self._folder), "mode": mode, "id": self._id.read_text(), "resume": "allow"}
        return self._module.init(**self._about, **where)
