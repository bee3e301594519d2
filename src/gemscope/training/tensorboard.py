"""Reports to TensorBoard (extra ``tensorboard``): local event files, no network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemscope.core.extras import need
from gemscope.training.log import numbers


class TensorBoard:
    """A ``Log`` that writes event files into a folder. Raises InputError when TensorBoard is not installed."""

    def __init__(self, folder: Path) -> None:
        need("tensorboard", "tensorboard")
        self._folder = folder
        self._module = need("torch.utils.tensorboard", "tensorboard")
        self._writer: Any = None
        self._first = 0

    def write(self, step: int, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Every number as a scalar."""
        if self._writer is None:
            self._writer = self._module.SummaryWriter(str(self._folder), purge_step=self._first or None)
        for name, value in numbers(values).items():
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """What was written after ``step`` is hidden."""
        self._first = step + 1

    def close(self) -> None:
        """Write what is waiting."""
        if self._writer is not None:
            self._writer.close()
