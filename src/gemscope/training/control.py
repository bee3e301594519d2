"""Keeping the mean L0 where it was asked for.

A quadratic penalty has the target built in and needs only watching. The others know no target: their weight is the
knob, and this turns it, in equal ratios per step, towards the L0 that was asked for.
"""

import math
from collections.abc import Mapping
from typing import Any

from gemscope.training.config import TrainConfig

_MEMORY = 0.98
"""Of the running mean of the L0, per step."""
_GAIN = 0.02
"""How far the logarithm of the weight moves per step and per unit of the L0's log ratio to its target."""
_REACH = math.log(1e4)
"""How far it may move from its first value."""
_OFF = 1.25
"""Ratio to the target from which the L0 counts as missed."""


class L0Control:
    """The weight of the sparsity penalty, and what the L0 does."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.log_ratio = 0.0
        """The weight over its first value, as a logarithm."""
        self.mean = 0.0
        """Running mean of the L0."""
        self.done = 0

    @property
    def steers(self) -> bool:
        """Whether the weight moves."""
        return self.config.penalised and self.config.sparsity != "quadratic"

    @property
    def weight(self) -> float:
        """Of the penalty, in spreads."""
        return self.config.sparsity_weight * math.exp(self.log_ratio)

    def observe(self, l0: float, target: float, done: int) -> None:
        """Take in the L0 of one batch."""
        self.mean = l0 if self.done == 0 else _MEMORY * self.mean + (1 - _MEMORY) * l0
        self.done = done + 1
        if self.steers:
            off = math.log(max(self.mean, 1e-3) / target)
            self.log_ratio = max(-_REACH, min(_REACH, self.log_ratio + _GAIN * max(-1.0, min(1.0, off))))

    def warnings(self) -> tuple[str, ...]:
        """When the knob is at its end, or the L0 misses its target once the target stands still."""
        config = self.config
        if not config.penalised or self.done < max(config.annealing, config.sparsity_warmup) * config.steps + 50:
            return ()
        ratio = max(self.mean, 1e-3) / config.target_l0
        if 1 / _OFF < ratio < _OFF:
            return ()
        at = f"{config.site}: L0 is {self.mean:.1f} where {config.target_l0:g} was asked for"
        if abs(self.log_ratio) == _REACH:
            return (f"{at}, and the weight of the penalty has reached its end, {self.weight:.2g}; change target_l0.",)
        if config.sparsity == "quadratic":
            return (f"{at}; raise threshold_learning_rate or bandwidth, as a larger weight changes little under Adam.",)
        return (f"{at}; the weight of the penalty is still moving, now {self.weight:.2g}: train longer.",)

    def state_dict(self) -> dict[str, float | int]:
        """Plain numbers."""
        return {"log_ratio": self.log_ratio, "mean": self.mean, "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.log_ratio, self.mean, self.done = float(state["log_ratio"]), float(state["mean"]), int(state["done"])
