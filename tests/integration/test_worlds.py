"""The trainer on worlds of known features: every target that a world sets, as the mean of three seeds."""

from pathlib import Path

import pytest

from gemscope.benchmark.worlds import benchmark, lines
from gemscope.evaluation.worlds.tiers import TIERS, Method

TARGETS = [(name, method) for name, one in TIERS.items() if name != "16k" for method in one.targets]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), TARGETS, ids="-".join)
def test_the_target_of_a_world_is_met(name: str, method: Method, tmp_path: Path) -> None:
    (line,) = lines(benchmark([name], range(3), [method], file=tmp_path / "runs.jsonl"))
    assert line.met, (TIERS[name].targets[method], line)
