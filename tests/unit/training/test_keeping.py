"""What a run keeps: checkpoints at any step, of these rows and these first weights only, whole after any kill."""

import io
import json
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gemscope.cli.train_view import trained_table
from gemscope.core import files
from gemscope.core.errors import InputError
from gemscope.core.files import read_tensors
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.single import SingleLayer
from gemscope.training import checkpoint, trainer
from gemscope.training.config import TrainConfig
from gemscope.training.log import read_log
from gemscope.training.outcome import Keeping, Progress, Trained
from gemscope.training.run import RunOptions, run
from gemscope.training.sharding import Mesh
from gemscope.training.stopping import Stop
from gemscope.training.trainer import train
from unit.training.worlds import SITE, MemorySource, superposition

QUICK = TrainConfig(SITE, d_sae=24, target_l0=4.0, steps=12, batch_size=64, calibration_rows=128)


class Killed(BaseException):
    """Ends a run where a kill would."""


def source(seed: int = 0, rows: int = 800) -> MemorySource:
    return MemorySource({SITE: superposition(rows, d=12, seed=seed)[0]})


def bits(done: list[Trained]) -> list[torch.Tensor]:
    return [tensor for one in done for tensor in one.dictionary.parameters()]


def same(first: list[Trained], second: list[Trained]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(first), bits(second), strict=True))


def kill_at(step: int) -> Callable[[Progress], None]:
    def progress(now: Progress) -> None:
        if now.step == step:
            raise Killed

    return progress


def step_of(folder: Path) -> int:
    return json.loads((folder / "checkpoint" / "state.json").read_text())["step"]


def test_checkpoints_and_measures_come_before_the_first_report(tmp_path: Path) -> None:
    """A report is due at step 20 only; what is kept holds the numbers of its own step all the same."""
    seen: dict[int, Trained] = {}
    reports: dict[int, Progress] = {}
    keep = Keeping(tmp_path, every=3, export=seen.__setitem__, evaluate_every=2)

    def evaluate(config: TrainConfig, dictionary: Dictionary) -> dict[str, Any]:
        return {"l0": 1.0}

    done = train(source(), [QUICK], keep=keep, evaluate=evaluate)
    assert list(seen) == [3, 6, 9, 12]
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [2, 4, 6, 8, 10, 12]
    train(source(), [QUICK], progress=lambda now: reports.__setitem__(now.step, now), report_every=1)
    for step, one in seen.items():
        assert (one.summary.loss, one.summary.l0) == (reports[step].loss[0], reports[step].l0[0])
    assert same(done, [seen[12]])


def test_a_signal_in_the_first_step_saves_it(tmp_path: Path) -> None:
    class Interrupting(MemorySource):
        def batches(self, *given: Any) -> Iterator[Any]:
            for number, batch in enumerate(super().batches(*given)):
                if number == 2:  # not reached by the calibration rows, two batches
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    with pytest.raises(SystemExit) as stopped:
        train(Interrupting(source().data), [QUICK], keep=Keeping(tmp_path))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert step_of(tmp_path) == 3
    assert same(train(source(), [QUICK], keep=Keeping(tmp_path)), train(source(), [QUICK]))


def test_other_rows_or_first_weights_are_refused(tmp_path: Path) -> None:
    keep, start = Keeping(tmp_path), train(source(), [replace(QUICK, seed=5)])[0].dictionary
    changed = train(source(), [replace(QUICK, seed=6)])[0].dictionary
    given: dict[str, Any] = {"start": {0: start}, "heldout": source(7)}
    done = train(source(), [QUICK], keep=keep, **given)
    assert same(train(source(), [QUICK], keep=keep, **given), done)
    for data, other, name in (
        (source(1), {}, "rows"),
        (source(rows=801), {}, "rows"),
        (source(), {"heldout": source(8)}, "held-out rows"),
        (source(), {"start": {0: changed}}, "first weights"),
        (source(), {"start": None}, "first weights"),
    ):
        with pytest.raises(InputError, match=f"a run with other {name};"):
            train(data, [QUICK], keep=keep, **{**given, **other})


def test_rows_with_a_name_of_their_own_are_known_by_it(tmp_path: Path) -> None:
    """Such as those of a model that is run while training: in other threads their last bits differ."""

    class Named(MemorySource):
        identity = "the same"

    keep = Keeping(tmp_path)
    train(Named(source().data), [QUICK], keep=keep)
    train(Named({SITE: source().data[SITE] * 1.0001}), [QUICK], keep=keep)
    Named.identity = "another"
    with pytest.raises(InputError, match="other rows"):
        train(Named(source().data), [QUICK], keep=keep)


def test_a_checkpoint_from_before_rows_were_told_apart_goes_on(tmp_path: Path) -> None:
    keep = Keeping(tmp_path)
    done = train(source(), [QUICK], keep=keep)
    value = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
    del value["inputs"]
    (tmp_path / "checkpoint" / "state.json").write_text(json.dumps(value))
    assert same(train(source(), [QUICK], keep=keep), done)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_run_killed_while_it_replaces_its_checkpoint_goes_on(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the old one is moved away, between the two renames, and before the old one is removed."""
    keep, whole = Keeping(tmp_path, every=5), train(source(), [QUICK])
    with pytest.raises(Killed):
        train(source(), [QUICK], keep=keep, progress=kill_at(7), report_every=1)
    assert step_of(tmp_path) == 5
    killed_while_replacing(monkeypatch, tmp_path / "checkpoint", renames)
    with pytest.raises(Killed):
        train(source(), [QUICK], keep=keep)
    monkeypatch.undo()
    assert (tmp_path / "checkpoint").exists() == (renames != 1)
    assert len(list(tmp_path.glob(".checkpoint.*"))) == (2 if renames == 1 else 1)
    first: list[int] = []
    done = train(source(), [QUICK], keep=keep, progress=lambda now: first.append(now.step), report_every=1)
    assert first[0] == (11 if renames == 2 else 6)
    assert same(done, whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "log.jsonl"]


def killed_while_replacing(monkeypatch: pytest.MonkeyPatch, folder: Path, renames: int) -> None:
    """End a write of ``folder`` after so many of its renames, and clean nothing up, as a kill does not."""
    left, rename = [renames], Path.rename

    def renamed(self: Path, target: Path) -> Path:
        if folder not in (self, target):
            return rename(self, target)
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return rename(self, target)

    def removed(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors and left[0] == 0:
            raise Killed

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(files.shutil, "rmtree", removed)


def test_a_run_sweeps_what_a_kill_left_of_its_dictionaries(tmp_path: Path) -> None:
    name = trainer.names_of([QUICK])[0]
    left = [tmp_path / "dictionaries" / f".{name}.abcd1234.{end}" for end in ("tmp", "old")]
    (tmp_path / "dictionaries" / ".mine.tmp").mkdir(parents=True)
    for folder in left:
        folder.mkdir()
    (tmp_path / ".report.html.abcd1234.tmp").write_text("half")
    run(source(), source(9), [QUICK], RunOptions(tmp_path, "m", evaluate_every=None))
    assert sorted(p.name for p in (tmp_path / "dictionaries").iterdir()) == [".mine.tmp", name]
    assert not list(tmp_path.glob(".*"))


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    """A row of NaN in the sixth batch; once mended, the run goes on from before it."""
    good, bad = source(), source()
    order = torch.randperm(bad.rows, generator=torch.Generator().manual_seed(0))
    bad.data[SITE][order[5 * 64]] = float("nan")
    keep = Keeping(tmp_path, every=1)
    for _ in range(2):
        with pytest.raises(InputError, match=r"resid_post\.1 diverged.*after 6 steps"):
            train(bad, [QUICK], keep=keep)
        assert step_of(tmp_path) == 5
    tensors = read_tensors(tmp_path / "checkpoint" / "state.safetensors").values()
    assert all(bool(t.isfinite().all()) for t in tensors)
    assert same(train(good, [QUICK], keep=keep), train(good, [QUICK]))


def test_a_loss_that_hides_its_weights_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an encoder of NaN gives is above no threshold, so that the loss stays finite."""
    made: list[Any] = []
    make = trainer.make_learner

    def making(*given: Any) -> Any:
        made.append(make(*given))
        return made[-1]

    monkeypatch.setattr(trainer, "make_learner", making)

    def spoil(now: Progress) -> None:
        assert now.step == 4
        made[0].weights["E"].data[3] = float("nan")

    with pytest.raises(InputError, match=r"resid_post\.1 diverged: its weights\.E is not finite after 4 steps"):
        train(source(), [QUICK], keep=Keeping(tmp_path, every=4), progress=spoil, report_every=4)
    assert not (tmp_path / "checkpoint").exists()


def test_processes_agree_on_a_signal_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at those where a checkpoint is due: whoever skipped one agreement would wait for the others for ever."""
    asked: list[int] = []

    def agreed(mesh: Mesh, stop: Stop) -> int | None:
        asked.append(1)
        return None

    monkeypatch.setattr(trainer, "_agreed", agreed)
    train(source(), [QUICK], keep=Keeping(tmp_path, every=2))
    assert len(asked) == QUICK.steps + 1


def test_a_batch_is_the_same_for_every_process() -> None:
    with pytest.raises(InputError, match="63 rows cannot be spread evenly over 2 processes"):
        train(source(), [replace(QUICK, batch_size=63)], mesh=Mesh(data=2))


def test_no_row_held_out_is_said(tmp_path: Path) -> None:
    nothing = MemorySource({SITE: source().data[SITE][:0]})
    with pytest.raises(InputError, match="no document fell on this side of the split"):
        run(source(), nothing, [QUICK], RunOptions(tmp_path, "m"))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_written_from_where_its_tensors_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what shares memory with another is copied."""
    x = torch.arange(12.0).view(3, 4)
    state = {"whole": torch.rand(5), "rows": x, "part": x[1], "turned": x.T}
    given: dict[str, torch.Tensor] = {}
    write = checkpoint.write_tensors

    def writing(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        given.update(tensors)
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", writing)
    checkpoint.save(tmp_path / "c", checkpoint.Checkpoint(1, [], {}, {}, [state], 0.0, []))
    assert [given[f"0.{n}"].data_ptr() == state[n].data_ptr() for n in state] == [True, True, False, False]
    found = checkpoint.load(tmp_path / "c", [], {})
    assert found is not None
    assert all(torch.equal(found.learners[0][n], t) for n, t in state.items())


def test_one_dictionary_at_a_time_is_exported(tmp_path: Path) -> None:
    before: list[weakref.ref[Dictionary]] = []

    def export(step: int, one: Trained) -> None:
        assert all(dictionary() is None for dictionary in before)
        before.append(weakref.ref(one.dictionary))

    train(source(), [QUICK, replace(QUICK, seed=1)], keep=Keeping(tmp_path, every=6, export=export))
    assert len(before) == 4


def test_terms_and_warnings_are_kept_and_shown_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terms of the log sum up to its loss; the L0 in training is that of the thresholds before they were set."""
    monkeypatch.setattr(trainer.SingleLayerLearner, "warnings", lambda self: ("THE KNOB IS AT ITS END",))
    held = source(9)
    (done,) = run(source(), held, [replace(QUICK, steps=40)], RunOptions(tmp_path, "m", evaluate_every=None))
    lines = [line[done.name] for line in read_log(tmp_path / "log.jsonl")]
    assert [line["warnings"] for line in lines] == 2 * [["THE KNOB IS AT ITS END"]]
    for line in lines:
        assert {"error", "sparsity"} <= line["terms"].keys()
        assert sum(line["terms"].values()) == pytest.approx(line["loss"], rel=1e-5)

    console = Console(file=io.StringIO(), width=200)
    console.print(trained_table([done], tmp_path))
    shown = console.file.getvalue()
    assert shown.count(f"{done.name}: THE KNOB IS AT ITS END") == 1
    (row,) = [line.split() for line in shown.splitlines() if line.startswith(f"{done.name} ")]
    dictionary = done.dictionary
    assert isinstance(dictionary, SingleLayer)
    assert dictionary.threshold is not None
    x = held.data[SITE][torch.randperm(held.rows, generator=torch.Generator().manual_seed(0))][: QUICK.calibration_rows]
    pre_acts = x @ dictionary.W_enc + dictionary.b_enc
    before = dictionary.threshold / done.summary.threshold_factor
    assert done.summary.l0_train == pytest.approx(float((pre_acts > before).sum(1).float().mean()), abs=0.05)
    assert abs(done.summary.threshold_factor - 1) > 0.01
    assert row[1:4] == [f"{done.summary.l0_train:.1f}", f"{(done.evaluation or {})['l0']:.1f}", "4"]
