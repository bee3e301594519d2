"""The planner's prediction against the memory that real steps and runs take, in a process of its own whose allocator
gives freed blocks back at once, so that what is measured is what is in use.
"""

import inspect
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gemscope.cli import train_view
from gemscope.core.errors import InputError
from gemscope.core.quantities import work_text
from gemscope.core.sites import Site
from gemscope.training import planner
from gemscope.training.config import TrainConfig
from gemscope.training.heldout import HeldOut
from gemscope.training.memory import memory_of
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.planner import HELD_OUT, fits, plan, product_speed, proposals, warning, widths_of
from gemscope.training.recipe import Entry
from gemscope.training.single import SingleLayerLearner

ROOT = Path(__file__).parents[3]
READ, WRITTEN = Site("mlp_in", 0), Site("mlp_out", 0)
GPU = torch.device("cuda")


def measured(script: str, *words: object) -> dict[str, int]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, words)]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


@pytest.mark.parametrize("moments", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_step_takes_what_was_predicted(moments: str) -> None:
    found = measured("measured_step.py", 6, 320, 4096, 256, moments)
    assert found["measured"] == pytest.approx(found["predicted"], rel=0.1)


@pytest.mark.slow
def test_a_step_of_the_270m_shape_takes_what_was_predicted() -> None:
    """18 layers of 640, 16k latents in all: 912 per layer."""
    found = measured("measured_step.py", 18, 640, 912, 1024, "float32")
    assert found["measured"] == pytest.approx(found["predicted"], rel=0.1)


@pytest.mark.parametrize(
    "what",
    [
        "sae topk 640 8192 1024 1024",
        pytest.param("sae jumprelu 640 2048 1024 8192", marks=pytest.mark.slow),
        pytest.param("clt jumprelu 320 2048 256 1024", marks=pytest.mark.slow),
        pytest.param("clt topk 320 1024 1024 1024", marks=pytest.mark.slow),
    ],
)
def test_a_run_takes_what_was_predicted(tmp_path: Path, what: str) -> None:
    """Steps, checkpoint, export and evaluation; and the steps alone."""
    found = measured("measured_run.py", tmp_path, *what.split())
    assert found["measured_steps"] == pytest.approx(found["steps"], rel=0.15)
    assert found["measured_whole"] == pytest.approx(found["whole"], rel=0.1)


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


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_checkpoint_of_one_layer_is_what_its_learner_keeps(beta1: float) -> None:
    config = TrainConfig(READ, 256, 8.0, calibration_rows=512, batch_size=64, beta1=beta1)
    rows = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    learner = SingleLayerLearner(config, {READ: rows})
    learner.update({READ: rows[:64]}, 0)

    def size(state: object) -> int:
        if isinstance(state, torch.Tensor):
            return state.numel() * state.itemsize
        parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
        return sum(map(size, parts))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]

    assert plan([config], {READ: 64}).checkpoint == pytest.approx(size(learner.state_dict()), rel=0.02)


def test_a_pass_has_all_calibration_rows_and_one_dictionary_at_work() -> None:
    """Two sets of calibration rows and the held-out ones all the time; a second dictionary adds what it keeps."""
    config = TrainConfig(READ, 4096, 32.0, calibration_rows=1000, batch_size=100)
    one, two = (plan([config] * count, {READ: 640}) for count in (1, 2))
    kept = memory_of(config, {READ: 640})
    rows = 4 * 640 * (1000 + 1000 + 8192)
    assert one.phases["training"] == kept.weights + kept.moments + rows + 4 * 640 * 100 + kept.step
    assert two.phases["training"] - one.phases["training"] == kept.weights + kept.moments
    assert two.phases["exporting"] - one.phases["exporting"] == kept.weights + kept.moments + kept.finished
    assert one.total == max(one.phases.values()) == one.phases[one.fullest]
    assert inspect.signature(HeldOut).parameters["rows"].default == HELD_OUT
    few = plan([config], {READ: 640}, held_out=500)
    assert one.phases["training"] - few.phases["training"] == 4 * 640 * (500 + 8192 - 500)


def test_only_a_device_of_its_own_is_relieved_by_the_host() -> None:
    config, away = clt(), clt(offload=True)
    assert plan([away], widths(away)).total == plan([config], widths(config)).total
    decoders = 4 * 1024 * 640 * (18 * 19 // 2)
    memory = memory_of(away, widths(away), device=GPU)
    assert memory.host == 2 * decoders
    assert memory.kept == memory.weights + memory.moments - 2 * decoders


def test_what_does_not_fit_gets_proposals() -> None:
    config = clt()
    found = plan([config], widths(config))
    assert fits(found, found.total)
    assert not fits(found, found.total - 1)
    assert proposals([config], widths(config), found.total) == []
    assert names(proposals([config], widths(config), int(found.total * 0.95))) == [
        "bf16 moments",
        "latents over 4 processes",
    ]
    assert plan([config], widths(config), 4).total <= 0.95 * found.total < plan([config], widths(config), 2).total
    assert "tied decoders" in proposals([clt(d_sae=1023)], widths(config), 1000)[0]
    several = [TrainConfig(Site("resid_post", i), d_sae=4096, target_l0=32.0) for i in range(4)]
    at = {config.site: 640 for config in several}
    one = plan(several[:1], at).total
    assert "fewer dictionaries" in proposals(several, at, int(one * 1.2))[-1]


def names(text: list[str]) -> list[str]:
    return [line.split(":")[0] for line in text]


def test_changes_are_proposed_in_pairs_where_none_is_enough() -> None:
    config, at = clt(), widths(clt())
    alone = plan([config], at, device=GPU).total
    halved = plan([clt(moments="bfloat16")], at, device=GPU).total
    away = plan([clt(offload=True)], at, device=GPU).total
    both = plan([clt(offload=True, moments="bfloat16")], at, device=GPU).total
    assert both < away < halved < alone
    assert names(proposals([config], at, halved, 1, device=GPU)) == ["bf16 moments", "decoders offloaded"]
    assert names(proposals([config], at, both, 1, device=GPU)) == ["bf16 moments and decoders offloaded"]
    assert not any("offloaded" in line for line in proposals([config], at, int(0.6 * alone)))


def test_a_run_that_will_not_fit_is_warned_of() -> None:
    config = clt()
    found = plan([config], widths(config))
    assert warning(found, found.total) is None
    text = warning(found, 10**9)
    assert text is not None
    assert "1.00 GB are free" in text
    assert found.fullest in text


def test_a_site_without_rows_is_named_with_those_there_are() -> None:
    config = TrainConfig(Site("resid_post", 9), 256, 8.0)
    with pytest.raises(InputError, match=r"no rows of resid_post\.9; choose among mlp_in\.0, mlp_out\.0"):
        plan([config], {READ: 64, WRITTEN: 64})


def test_a_recipe_is_planned_from_the_widths_of_its_entries() -> None:
    entries = [
        Entry("a", clt(), 10, width=640, width_out=512),
        Entry("b", TrainConfig(Site("resid_post", 2), 256, 8.0), 10, width=96, width_out=96),
    ]
    found = widths_of(entries)
    assert found[Site("mlp_in", 17)] == 640
    assert found[Site("mlp_out", 17)] == 512
    assert found[Site("resid_post", 2)] == 96
    assert plan([entries[1].config], found).flops == 2.0 * 2000 * 2048 * 96 * 256


def test_the_table_speaks_of_operations_time_and_the_fullest_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_view, "product_speed", lambda device: 2e9)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    monkeypatch.setattr(train_view, "_memory", lambda: ("this machine", 2 * 10**9))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(train_view.plan_table([clt()], widths(clt())))
    text = console.export_text()
    assert "work         96.6 TFLOP in the encoders' products" in text
    assert "time         more than 13.4 h, which these products take at 2.00 GFLOP/s" in text
    assert "4.22 GB at most, while exporting" in text
    assert "2.00 GB on this machine: it does not fit" in text
    assert "offloaded" not in text


def test_time_is_that_of_the_products_at_the_speed_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that says 0.5 s of every product: two operations for each of 256 x 640 x 4096 multiplications."""
    ticks = itertools.count(0.0, 0.5)
    monkeypatch.setattr(planner.time, "perf_counter", lambda: next(ticks))
    assert product_speed(torch.device("cpu")) == 2 * 256 * 640 * 4096 / 0.5
    found = plan([clt()], widths(clt()))
    assert found.seconds(1e9) == 2.0 * 2000 * 2048 * 18 * 640 * 1024 / 1e9
    assert work_text(found.flops) == "96.6 TFLOP"
