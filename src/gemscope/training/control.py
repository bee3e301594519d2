"""Keeping the mean L0 where it was asked for.

A quadratic penalty shapes how the L0 is shared among latents and rows. In the second half of the time that its target
stands still, all thresholds are multiplied by a common factor after every update (earlier, that costs concepts; see
docs/log.md): as a latent's frequency falls several times faster than its threshold rises,
the mean L0 follows its target within some tens of steps, whatever else pulls at it (a penalty alone moves thresholds
no faster than their learning rate, however large its weight). The other penalties know no target: there the knob is
their weight, turned in equal ratios.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.training.config import TrainConfig

_MEMORY = 0.98
"""Of the running mean of the L0 and its ratio to the target, per step."""
_THRESHOLDS = 0.05
"""How far the logarithm of all thresholds moves per step and per unit of the L0's log ratio to its target."""
_SUM = 1e-3
"""The same, per unit of the sum of those ratios: makes up for what steadily pulls the other way, such as the frequency
penalty. Where nothing pulls, a latent's frequency falls about six times faster than its threshold rises, and the
answer is damped: 0.001 * 6 is below (0.05 * 6)**2 / 4."""
_NEAR = 0.3
"""Log ratio below which ratios are summed: what is summed on a long way is overshot at its end."""
_LARGEST_SUM = 0.1
_WEIGHT = 0.02
"""How far that of the weight moves."""
_REACH = math.log(1e4)
"""How far the weight may move from its first value."""
_OFF, _OFF_WEIGHT = 1.1, 1.25
"""Ratio to the target from which the L0 counts as missed; a weight acts slowly, and no more once learning rates have
fallen."""
_SMALL = 0.5
"""Thresholds below this, in pre-activation scales, are moved as this one is: they can reach zero, and leave it."""
_LIFT = 0.05
"""Share by which a too frequent latent's threshold rises in one update: where its pre-activations lie beyond the
estimator's window, the frequency penalty has no gradient."""
_MARGIN = 0.8
"""Share of ``frequency_scale`` from which a latent, on one batch, is too frequent."""


class L0Control:
    """The weight of the sparsity penalty, the factor on all thresholds, and what the L0 does."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.steers_weight = config.penalised and config.sparsity != "quadratic"
        self.knob = 0.0
        """The weight over its first value, as a logarithm."""
        self.mean = 0.0
        """Running mean of the L0."""
        self.sum = 0.0
        """Of what is added to the logarithm of the thresholds at every step."""
        self.log_ratio = 0.0
        """Running mean of the logarithm of the L0 over its target, which moves while it is annealed."""
        self.done = 0

    @property
    def weight(self) -> float:
        """Of the penalty, in spreads."""
        return self.config.sparsity_weight * math.exp(self.knob)

    def observe(self, l0: float, target: float, done: int) -> float:
        """Take in the L0 of one batch; what to multiply all thresholds by."""
        ratio = math.log(max(l0, 1e-3) / target)
        memory = _MEMORY if self.done else 0.0
        self.mean = memory * self.mean + (1 - memory) * l0
        self.log_ratio = memory * self.log_ratio + (1 - memory) * ratio
        self.done = done + 1
        ratio = max(-1.0, min(1.0, ratio))
        if not self.steers_weight:
            if done < (1 + self.config.annealing) / 2 * self.config.steps:
                return 1.0
            if abs(ratio) < _NEAR:
                self.sum = max(-_LARGEST_SUM, min(_LARGEST_SUM, self.sum + _SUM * ratio))
            return math.exp(_THRESHOLDS * ratio + self.sum)
        if done >= self.config.sparsity_warmup * self.config.steps:
            self.knob = max(-_REACH, min(_REACH, self.knob + _WEIGHT * ratio))
        return 1.0

    @torch.no_grad()
    def move(
        self, threshold: Float[Tensor, " d_sae"], factor: float, frequency: Float[Tensor, " d_sae"], scale: float
    ) -> None:
        """Move thresholds by ``factor`` towards the target, in place, and those of too frequent latents upwards.

        ``frequency`` is the share of the last batch's rows on which each latent was active, ``scale`` the
        pre-activations'.
        """
        size = threshold.clamp(min=_SMALL * scale)
        move = (factor - 1) * size
        if self.config.frequency_weight > 0:
            move = torch.where(
                frequency > _MARGIN * self.config.frequency_scale, move.clamp(min=0) + _LIFT * size, move
            )
        threshold += move
        threshold.clamp_(min=0)

    def warnings(self) -> tuple[str, ...]:
        """When the knob is at its end, or the L0 misses its target once the target stands still."""
        config = self.config
        if not config.penalised or self.done < max(config.annealing, config.sparsity_warmup) * config.steps + 100:
            return ()
        if abs(self.log_ratio) < math.log(_OFF_WEIGHT if self.steers_weight else _OFF):
            return ()
        at = f"{config.site}: L0 is {self.mean:.1f} where {config.target_l0:g} was asked for"
        if abs(self.knob) == _REACH:
            return (f"{at}, and the weight of the penalty has reached its end, {self.weight:.2g}; change target_l0.",)
        if not self.steers_weight and self.log_ratio < 0:
            return (f"{at}, although the thresholds were let down; so many latents are not positive: lower target_l0.",)
        return (f"{at}; it is still moving: train longer.",)

    def state_dict(self) -> dict[str, float | int]:
        """Plain numbers."""
        names = ("knob", "sum", "mean", "log_ratio", "done")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        for name in ("knob", "sum", "mean", "log_ratio"):
            setattr(self, name, float(state[name]))
        self.done = int(state["done"])
