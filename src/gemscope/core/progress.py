"""How far a stage of long work is, for whoever shows it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StageProgress:
    """Where a stage stands."""

    stage: str
    """``text``, ``harvest``, ``train``, ``evaluate``, ``index`` ..., or one of those with `` more``."""
    done: int
    total: int
    unit: str
    """What is counted: ``tokens``, ``steps``, ``documents`` ..."""
    reused: bool = False
    """The stage's output was there already."""


Report = Callable[[StageProgress], None]
