"""The benchmark: a small world is recovered, runs are kept and taken up again, means and targets are right."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gemscope.benchmark import worlds
from gemscope.benchmark.recorded import RECORDED
from gemscope.benchmark.worlds import Run, add_run, benchmark, config_of, lines, read_runs
from gemscope.core.errors import FormatError, InputError
from gemscope.evaluation.worlds.codes import CodesConfig
from gemscope.evaluation.worlds.tiers import TIERS, Tier
from gemscope.evaluation.worlds.world import WorldConfig
from gemscope.training.multilayer import MultiLayerConfig

TINY = Tier(
    "tiny",
    "24 features in 32 dimensions",
    WorldConfig(CodesConfig(24, most=0.1, least=0.06), 32),
    d_sae=24,
    l0=1.75,
    rows=700 * 1024,
    seconds=10.0,
    prefixes=(12,),
)


def test_a_small_world_is_recovered() -> None:
    found = worlds.run(TINY, "matryoshka", 0)
    assert found.rows == 700 * 1024
    assert found.score["mcc"] > 0.9
    assert found.score["mcc_floor"] < 0.4
    assert found.score["detection"]["f1"] > 0.8
    assert found.score["detection"]["f1_floor"] < 0.1
    assert found.cpu_seconds > 0


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TIERS, "tiny", TINY)  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("tiny")
def test_finished_runs_are_not_made_again(tmp_path: Path) -> None:
    file, said = tmp_path / "runs.jsonl", list[tuple[str, bool]]()

    def progress(name: str, now: Any) -> None:
        if now is None or now.step == now.total:
            said.append((name, now is None))

    first = benchmark(["tiny"], [0, 1], ["jumprelu"], file=file, rows=4096, progress=progress)
    with file.open("a") as cut:
        cut.write('{"tier": "tiny", "meth')
    again = benchmark(["tiny"], [0, 1, 2], ["jumprelu"], file=file, rows=4096, progress=progress)
    assert said == [(f"tiny jumprelu {seed}", kept) for seed, kept in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0))]
    assert again[:2] == first
    assert read_runs(file) == again
    assert first[0].score["mcc"] != first[1].score["mcc"]


def _run(mcc: float, f1: float, seed: int, trainer: str = "gemscope", rows: int | None = None) -> Run:
    score = {"mcc": mcc, "detection": {"f1": f1}, "encoder_mcc": None}
    return Run("nano", "batchtopk", seed, rows or TIERS["nano"].rows, 20.0, 10.0 + seed, score, {}, trainer)


def test_lines_are_means_over_seeds_held_against_the_target() -> None:
    ours, theirs = lines([_run(0.70, 0.66, 0), _run(0.76, 0.68, 1), _run(0.69, 0.61, 0, "SAELens 6.54.12")])
    assert (ours.trainer, ours.seeds, ours.met) == ("gemscope", (0, 1), True)
    assert ours.means["mcc"] == pytest.approx(0.73)
    assert ours.deviations["mcc"] == pytest.approx(0.03)
    assert ours.means["cpu_seconds"] == 10.5
    assert "encoder_mcc" not in ours.means
    assert (theirs.trainer, theirs.met) == ("SAELens 6.54.12", False)
    (short,) = lines([_run(0.9, 0.9, 0, rows=4096)])
    assert short.met is None


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    add_run(file, _run(0.7, 0.6, 0))
    assert read_runs(file) == [_run(0.7, 0.6, 0)]
    file.write_text('{"step": 1}\n' + json.dumps(asdict(_run(0.7, 0.6, 0))) + "\n")
    with pytest.raises(FormatError, match="line 1"):
        read_runs(file)


@pytest.mark.parametrize("name", TIERS)
def test_every_world_has_a_config_for_each_method(name: str) -> None:
    one = TIERS[name]
    for method in one.methods:
        config = config_of(one, method, 3)
        assert (config.d_sae, config.target_l0, config.seed, config.kind) == (one.d_sae, one.l0, 3, one.world.kind)
        assert bool(config.prefixes) == (method == "matryoshka")
        assert isinstance(config, MultiLayerConfig) == (one.world.layers > 1)
    assert set(one.targets) <= set(one.methods)
    if not one.prefixes:
        with pytest.raises(InputError, match="not for 'matryoshka'"):
            config_of(one, "matryoshka", 0)


def test_recorded_peers_belong_to_worlds() -> None:
    assert {peer.tier for peer in RECORDED} <= set(TIERS)
