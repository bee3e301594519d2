"""What the trainer asks of a dictionary that is being trained, whatever its kind.

``single.SingleLayerLearner`` is the one for SAEs and transcoders, ``multilayer`` has the one for crosscoders and
CLTs. A learner is built from its config and raw calibration rows of all its sites; it owns normalisation,
optimiser, schedules and the controller of its L0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from gemscope.core.arrays import Float, Tensor
from gemscope.core.sites import Site
from gemscope.dictionaries.base import Dictionary
from gemscope.training.config import TrainConfig

Rows = Mapping[Site, Float[Tensor, "rows _"]]
"""Raw activations, aligned over sites: row r of every site is the same token."""


@dataclass(frozen=True)
class StepResult:
    """What one update saw, on the device; the numbers are those before the update."""

    loss: Float[Tensor, ""]
    """The whole objective."""
    fvu: Float[Tensor, ""]
    """Squared error over the spread; the mean over sites for several."""
    l0: Float[Tensor, ""]
    """Mean active latents per row, over all layers."""
    terms: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict[str, Tensor])
    """The parts of the objective by name, weighted."""


@runtime_checkable
class Learner(Protocol):
    """All that changes while one dictionary is trained."""

    @property
    def config(self) -> TrainConfig:
        """What was asked for."""
        ...

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites that it reads or predicts."""
        ...

    @property
    def idle_rows(self) -> Tensor:
        """For each latent (flat over layers) the rows since it was last active, int64."""
        ...

    def update(self, batch: Rows, done: int) -> StepResult:
        """One update of the optimiser on raw rows, after ``done`` updates."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as tensors, numbers and nested dicts of them: enough to go on bit for bit."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the learner must have been built from the same config and calibration rows."""
        ...

    def finished(self, calibration: Rows) -> tuple[Dictionary, dict[str, float]]:
        """A correct dictionary for raw activations, as training stands, and its numbers.

        Normalisation is folded in, and thresholds are set so that the mean L0 on ``calibration`` (rows held out
        from training, if there are any) is the target. The numbers: ``l0_train`` as it was in training and ``l0``
        as it is now on ``calibration``, ``threshold_factor``, ``dead_fraction``, ``scale_in``, ``scale_out``,
        ``bandwidth``.
        """
        ...

    def warnings(self) -> tuple[str, ...]:
        """What the user should know about how it is going; empty when all is well."""
        ...
