"""What to train and how: one frozen config per dictionary."""

from dataclasses import asdict, dataclass
from typing import Any

from gemscope.core.errors import InputError
from gemscope.core.sites import Site


@dataclass(frozen=True)
class TrainConfig:
    """One JumpReLU SAE at one site.

    Lengths in activation space are relative, so that one config suits every site: the *spread* is the mean
    squared distance of the scaled activations from their mean (the squared error of a dictionary that does
    nothing), the *pre-activation scale* the standard deviation of the pre-activations before the first step.
    """

    site: Site
    """Where the activations come from."""
    d_sae: int
    """Number of latents."""
    target_l0: float
    """Active latents per row to aim for, in the mean."""
    steps: int = 2000
    """Updates; the same for all dictionaries of a pass."""
    batch_size: int = 2048
    """Rows per update; the same for all dictionaries of a pass."""
    seed: int = 0
    """Decides the initial weights and the order of the rows; the same for all dictionaries of a pass."""
    learning_rate: float = 2e-3
    """Adam's, for weights and biases."""
    threshold_learning_rate: float = 2e-3
    """Adam's, for the thresholds, in pre-activation scales."""
    warmup: float = 0.05
    """Share of the steps over which the learning rates rise along a cosine from a tenth."""
    decay: float | None = 0.2
    """Share of the steps over which the learning rates fall linearly to zero at the end."""
    beta1: float = 0.0
    """Adam's decay of the first moment; Gemma Scope trains without momentum."""
    beta2: float = 0.999
    """Adam's decay of the second moment."""
    sparsity_weight: float = 0.3
    """Weight of the penalty on the distance from the target L0, in spreads."""
    sparsity_warmup: float = 0.05
    """Share of the steps over which that weight rises linearly from zero."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka: the first so many latents have to reconstruct alone too; ascending, each below ``d_sae``."""
    first_l0_factor: float = 4.0
    """The target begins this many times higher: latents learn a direction before they have to be rare."""
    annealing: float = 0.5
    """Share of the steps over which the target falls, in equal ratios, to ``target_l0``."""
    bandwidth: float = 0.5
    """Width of the window that a threshold's gradient is estimated from, in pre-activation scales."""
    dead_after_rows: int = 20_000
    """A latent that has not been active for this many rows counts as dead."""
    dead_weight: float = 0.1
    """Weight of the penalty that draws dead latents back towards their thresholds, in spreads."""
    calibration_rows: int = 16_384
    """Training rows that mean, scale and thresholds are measured on, before the first and after the last step."""

    def __post_init__(self) -> None:
        if self.d_sae < 1 or self.steps < 1 or self.batch_size < 1 or self.calibration_rows < 2:
            raise InputError("d_sae, steps and batch_size must be at least 1, calibration_rows at least 2.")
        if not 0 < self.target_l0 < self.d_sae:
            raise InputError(
                f"target_l0 {self.target_l0} must lie between 0 and the number of latents, {self.d_sae};"
                " typical is 10 to 100."
            )
        if list(self.prefixes) != sorted({p for p in self.prefixes if 0 < p < self.d_sae}):
            raise InputError(f"prefixes {self.prefixes} must ascend between 0 and the number of latents, {self.d_sae}.")
        for name in ("learning_rate", "threshold_learning_rate", "bandwidth", "first_l0_factor"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("warmup", "decay", "sparsity_warmup", "annealing"):
            if not 0 <= (getattr(self, name) or 0.0) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share of the steps, from 0 to 1.")

    @property
    def first_l0(self) -> float:
        """Where the target begins: at most half of the latents."""
        return max(self.target_l0, min(self.target_l0 * self.first_l0_factor, self.d_sae / 2))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; the site as ``resid_post.3``."""
        return asdict(self) | {"site": str(self.site)}
