"""A run that is killed at any moment goes on to the bit-identical loss curve; Ctrl-C and SIGTERM save first."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gemscope.core.errors import FormatError, InputError
from gemscope.core.sites import Site
from gemscope.training import checkpoint
from gemscope.training.data import BatchReader, SeekableSource
from gemscope.training.log import JsonLines, read_log
from gemscope.training.outcome import Keeping, Trained
from gemscope.training.trainer import train
from unit.training.killed_run import STEPS, configs, source
from unit.training.worlds import SITE, MemorySource

ROOT = Path(__file__).parents[3]


def begin(folder: Path, pause: float = 0.0) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("killed_run.py")
    return subprocess.Popen([sys.executable, str(script), str(folder), str(pause)], env=environment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert begin(folder).wait(600) == 0
    return folder


def wait_for(folder: Path, lines: int) -> None:
    for _ in range(15000):
        log = folder / "log.jsonl"
        if log.is_file() and log.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.02)
    raise AssertionError("the run did not get going")


def killed_and_resumed(folder: Path, moments: Sequence[int], number: int) -> list[int]:
    codes: list[int] = []
    for at in moments:
        process = begin(folder, 0.03)
        wait_for(folder, at)
        process.send_signal(number)
        codes.append(process.wait(300))
    assert begin(folder).wait(600) == 0
    return codes


def check_same(folder: Path, whole: Path) -> None:
    assert len(read_log(whole / "log.jsonl")) == STEPS
    assert (folder / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert (folder / "done").read_bytes() == (whole / "done").read_bytes()


def test_kill_9_at_three_random_steps(whole: Path, tmp_path: Path) -> None:
    moments = sorted(random.sample(range(3, STEPS - 5), 3))
    assert killed_and_resumed(tmp_path, moments, signal.SIGKILL) == [-signal.SIGKILL] * 3
    check_same(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_kill_9_at_many_random_steps(whole: Path, tmp_path: Path, seed: int) -> None:
    moments = sorted(random.Random(seed).sample(range(1, STEPS - 3), 5))
    killed_and_resumed(tmp_path, moments, signal.SIGKILL)
    check_same(tmp_path, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_saves_and_ends(whole: Path, tmp_path: Path, number: int, code: int) -> None:
    process = begin(tmp_path, 0.03)
    wait_for(tmp_path, 10)
    process.send_signal(number)
    assert process.wait(300) == code
    described = [{"class": type(c).__name__, **c.as_dict()} for c in configs()]
    found = checkpoint.load(tmp_path / "checkpoint", described)
    assert found is not None
    assert found.step == read_log(tmp_path / "log.jsonl")[-1]["step"] >= 10  # nothing done is lost
    assert begin(tmp_path).wait(600) == 0
    check_same(tmp_path, whole)


def bits(done: list[Trained]) -> list[torch.Tensor]:
    return [tensor for one in done for tensor in one.dictionary.parameters()]


def test_every_checkpoint_exports_dictionaries_for_raw_activations(tmp_path: Path) -> None:
    """What is exported at a checkpoint is what training saw, in raw units: its FVU is that of the training step."""
    seen: dict[int, list[Trained]] = {}
    keep = Keeping(tmp_path, every=20, export=lambda step, one: seen.setdefault(step, []).append(one))
    data = source()
    steady = [replace(c, first_l0_factor=1.0) for c in configs()]
    final = train(data, steady, keep=keep)
    assert list(seen) == [20, 40, 60]
    x = data.data[SITE]
    for done in seen.values():
        one = done[0].dictionary
        fvu = (one(x) - x).square().sum() / (x - x.mean(0)).square().sum()
        assert float(fvu) == pytest.approx(done[0].summary.fvu, abs=0.15)
        assert float((one.encode(x) > 0).sum(1).float().mean()) == pytest.approx(4.0, rel=0.15)
    assert all(torch.equal(a, b) for a, b in zip(bits(seen[60]), bits(final), strict=True))
    again = train(data, steady, keep=keep)  # all is done: nothing is trained, the same comes back
    assert all(torch.equal(a, b) for a, b in zip(bits(again), bits(final), strict=True))


def test_a_checkpoint_of_another_configuration_or_damaged_is_refused(tmp_path: Path) -> None:
    keep = Keeping(tmp_path)
    train(source(), [replace(c, steps=3) for c in configs()], keep=keep)
    with pytest.raises(InputError, match="another configuration"):
        train(source(), configs(), keep=keep)
    (tmp_path / "checkpoint" / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(FormatError, match="damaged"):
        train(source(), [replace(c, steps=3) for c in configs()], keep=keep)


def test_random_states_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    import numpy as np

    state = checkpoint.Checkpoint(1, [], {}, {"epoch": 0, "batch": 1}, [{"a": (1, None, [0.1])}], 0.0, [])
    checkpoint.save(tmp_path / "c", state)
    drawn = float(np.random.rand()), torch.rand(3).tolist()  # Python's own generator is used by the type checks here
    found = checkpoint.load(tmp_path / "c", [])
    assert found == state
    assert (float(np.random.rand()), torch.rand(3).tolist()) == drawn


def test_a_cut_off_line_is_dropped(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        log.write(step, {"a": {"loss": 0.1 * step}})
    log.path.write_text(log.path.read_text() + '{"step": 4, "a"')
    assert [line["step"] for line in read_log(log.path)] == [1, 2, 3]
    log.rewind(2)
    assert [line["step"] for line in read_log(log.path)] == [1, 2]


@dataclass(frozen=True)
class _Where:
    number: int = 0

    def as_dict(self) -> dict[str, int]:
        return {"number": self.number}

    @classmethod
    def of_dict(cls, value: Any) -> "_Where":
        return cls(value["number"])


class _Stream:
    def __init__(self, data: "_Store", sites: Sequence[Site], size: int, seed: int, start: _Where) -> None:
        self._all = [b for e in range(9) for b in data.batches(sites, size, seed, e)]
        self.position = start

    def __next__(self) -> dict[Site, torch.Tensor]:
        batch = self._all[self.position.number]
        self.position = _Where(self.position.number + 1)
        return batch

    def __iter__(self) -> Iterator[dict[Site, torch.Tensor]]:
        return self


class _Store(MemorySource):
    def stream(self, sites: Sequence[Site], batch_size: int, seed: int = 0, *, start: Any = None) -> _Stream:
        return _Stream(self, sites, batch_size, seed, start or _Where())


@pytest.mark.parametrize("kind", [MemorySource, _Store])
def test_a_reader_goes_on_where_another_was(kind: type[MemorySource]) -> None:
    data = kind({SITE: torch.arange(100.0)[:, None]})
    assert isinstance(data, SeekableSource) == (kind is _Store)
    reader = BatchReader(data, [SITE], 30, 0)
    seen = [next(reader)[SITE] for _ in range(4)]
    assert [len(x) for x in seen] == [30] * 4
    where = reader.position()
    rest = [next(reader)[SITE] for _ in range(4)]
    other = BatchReader(data, [SITE], 30, 0)
    other.seek(where)
    assert all(torch.equal(next(other)[SITE], x) for x in rest)


@pytest.mark.parametrize("kind", [MemorySource, _Store])
def test_a_source_with_fewer_rows_than_it_thought_is_refused(kind: type[MemorySource]) -> None:
    data = kind({SITE: torch.arange(100.0)[:, None]})
    reader = BatchReader(data, [SITE], 30, 0)
    data.data[SITE] = data.data[SITE][:20]
    reader.seek(reader.position())
    with pytest.raises(InputError, match="an epoch has fewer rows than one batch of 30"):
        next(reader)
