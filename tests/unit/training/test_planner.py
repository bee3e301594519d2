"""The planner's prediction against the memory that a real step takes, in a process of its own whose allocator gives
freed blocks back at once, so that what is measured is what is in use.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemscope.core.sites import Site
from gemscope.training.config import TrainConfig
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.planner import fits, memory_of, plan, proposals

ROOT = Path(__file__).parents[3]
READ, WRITTEN = Site("mlp_in", 0), Site("mlp_out", 0)


def measured(*words: object) -> dict[str, int]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, str(Path(__file__).with_name("measured_step.py")), *map(str, words)]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


@pytest.mark.parametrize("moments", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_step_takes_what_was_predicted(moments: str) -> None:
    found = measured(6, 320, 4096, 256, moments)
    assert found["measured"] == pytest.approx(found["predicted"], rel=0.1)


@pytest.mark.slow
def test_a_step_of_the_270m_shape_takes_what_was_predicted() -> None:
    """18 layers of 640, 16k latents in all: 912 per layer."""
    found = measured(18, 640, 912, 1024, "float32")
    assert found["measured"] == pytest.approx(found["predicted"], rel=0.1)


def clt(**change: object) -> MultiLayerConfig:
    given: dict[str, object] = {"target_site": WRITTEN, "kind": "clt", "layers": tuple(range(18)), "d_sae": 1024}
    given["calibration_rows"] = 4096
    return MultiLayerConfig(READ, target_l0=50.0, **{**given, **change})  # pyright: ignore[reportArgumentType]


def widths(config: TrainConfig) -> dict[Site, int]:
    return dict.fromkeys(config.sites, 640)


def test_counts_are_those_of_the_formulas() -> None:
    config = clt()
    memory = memory_of(config, widths(config))
    pairs, small = 18 * 19 // 2, 18 * (2 * 1024 + 640)
    assert memory.weights == memory.moments == 4 * (1024 * 640 * (pairs + 18) + small)
    halved, tied = clt(moments="bfloat16"), clt(tied=True)
    assert memory_of(halved, widths(halved)).moments == pytest.approx(memory.moments / 2, rel=0.01)
    assert memory_of(tied, widths(tied)).weights == 4 * (1024 * 640 * 36 + small)
    whole = plan([config], widths(config))
    assert whole.rows == 2000 * 2048
    assert whole.activations == whole.rows * 36 * 640 * 2
    assert whole.checkpoint == memory.weights + memory.moments
    assert whole.flops == 2.0 * whole.rows * 18 * 640 * 1024


def test_what_does_not_fit_gets_proposals() -> None:
    config = clt()
    found = plan([config], widths(config))
    assert fits(found, found.total)
    assert proposals([config], widths(config), found.total) == []
    text = proposals([config], widths(config), int(found.total * 0.9))
    assert [line.split(":")[0] for line in text] == ["bf16 moments", "decoders offloaded", "latents over 2 processes"]
    assert "tied decoders" in proposals([clt(d_sae=1023)], widths(config), 1000)[0]
    several = [TrainConfig(Site("resid_post", i), d_sae=4096, target_l0=32.0) for i in range(4)]
    at = {config.site: 640 for config in several}
    one = memory_of(several[0], at).total
    assert "fewer dictionaries" in proposals(several, at, int(one * 1.5))[-1]
