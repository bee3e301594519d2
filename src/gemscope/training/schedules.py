"""How learning rates and weights move over a run: factors, by the number of updates already made."""

import math

from gemscope.training.config import TrainConfig


def cosine_warmup(step: int, length: float, start: float = 0.1) -> float:
    """From ``start`` at step 0 along half a cosine to 1 at step ``length`` (Gemma Scope, section 3.2)."""
    if step >= length:
        return 1.0
    return start + (1 - start) * (1 - math.cos(math.pi * step / length)) / 2


def linear_warmup(step: int, length: float) -> float:
    """From 0 at step 0 to 1 at step ``length``."""
    return 1.0 if step >= length else step / length


def linear_decay(step: int, total: int, length: float) -> float:
    """1 until ``length`` steps before ``total``, then straight to 0 at step ``total``, which is after the
    last update.
    """
    return 1.0 if step <= total - length else (total - step) / length


def geometric(step: int, first: float, last: float, length: float) -> float:
    """From ``first`` at step 0 in equal ratios to ``last`` at step ``length``."""
    return last if step >= length else first * (last / first) ** (step / length)


def cosine_decay(step: int, total: int, length: float) -> float:
    """1 until ``length`` steps before ``total``, then along half a cosine to 0 at step ``total``."""
    left = linear_decay(step, total, length)
    return (1 - math.cos(math.pi * left)) / 2


def rate_factor(config: TrainConfig, done: int) -> float:
    """Of all learning rates after ``done`` updates: the warm-up times the decay that ``config`` asks for."""
    factor = cosine_warmup(done, config.warmup * config.steps)
    if config.decay is None or config.decay_shape == "constant":
        return factor
    shape = linear_decay if config.decay_shape == "linear" else cosine_decay
    return factor * shape(done, config.steps, config.decay * config.steps)
