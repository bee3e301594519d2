"""Reports to TensorBoard, read back from its event files, and to Weights & Biases, as its client is called."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemscope.training.config import TrainConfig
from gemscope.training.log import Log, read_log
from gemscope.training.outcome import Keeping, Progress
from gemscope.training.tensorboard import TensorBoard
from gemscope.training.trainer import names_of, train
from gemscope.training.wandb import WeightsAndBiases
from unit.training.worlds import SITE, MemorySource, superposition

QUICK = TrainConfig(SITE, d_sae=24, target_l0=4.0, steps=12, batch_size=64, calibration_rows=128)
NAME = names_of([QUICK])[0]


class Killed(BaseException):
    pass


def go(folder: Path, log: Log, kill_at: int | None = None, config: TrainConfig = QUICK) -> None:
    """Checkpoints after every 5 updates; killed after ``kill_at``."""

    def progress(now: Progress) -> None:
        if now.step == kill_at:
            raise Killed

    keep = Keeping(folder, every=5, logs=(log,))
    train(MemorySource({SITE: superposition(800, d=12)[0]}), [config], keep=keep, progress=progress, report_every=1)


def expected(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line[NAME]["loss"]) for line in read_log(folder / "log.jsonl")]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the client was asked for: of each ``init`` its arguments, what was logged, and whether it was finished."""
    runs: list[dict[str, Any]] = []

    def init(**given: Any) -> SimpleNamespace:
        runs.append({"given": given, "logged": [], "finished": False})
        run = runs[-1]
        return SimpleNamespace(
            log=lambda values, step: run["logged"].append((step, values)), finish=lambda: run.update(finished=True)
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return runs


def test_a_run_that_goes_on_is_one_run_there(tmp_path: Path, wandb: list[dict[str, Any]]) -> None:
    def log() -> Log:
        return WeightsAndBiases("project", tmp_path / "wandb", {"a": 1}, "name")

    with pytest.raises(Killed):
        go(tmp_path, log(), 7)
    go(tmp_path, log())
    first, second = wandb
    assert first["given"] == second["given"]
    assert first["given"]["id"].isalnum()
    about = {"project": "project", "name": "name", "config": {"a": 1}, "dir": str(tmp_path / "wandb")}
    assert {**first["given"], **about, "resume": "allow", "mode": "offline"} == first["given"]
    logged = [[(step, values[f"{NAME}/loss"]) for step, values in run["logged"]] for run in wandb]
    assert logged == [expected(tmp_path)[:7], expected(tmp_path)[5:]]
    assert "terms/error" in {name.removeprefix(f"{NAME}/") for name in first["logged"][0][1]}
    assert second["finished"]


def test_a_run_begun_anew_is_another(tmp_path: Path, wandb: list[dict[str, Any]]) -> None:
    """Its steps are over there already, and would not be taken again."""
    for seed in (0, 1):
        with pytest.raises(Killed):
            go(tmp_path, WeightsAndBiases("p", tmp_path / "wandb", {}), 3, replace(QUICK, seed=seed))
    assert wandb[0]["given"]["id"] != wandb[1]["given"]["id"]


def test_the_events_of_a_run_that_goes_on_are_those_of_a_whole_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Killed):
        go(tmp_path, TensorBoard(tmp_path / "tensorboard"), 7)
    go(tmp_path, TensorBoard(tmp_path / "tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars(f"{NAME}/loss")]
    assert [step for step, _ in found] == list(range(1, 13))
    assert found == [(step, pytest.approx(loss)) for step, loss in expected(tmp_path)]
    assert f"{NAME}/terms/error" in events.Tags()["scalars"]
