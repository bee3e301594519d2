"""Two gloo processes equal one: every gradient to 1e-6, trained weights to 1e-5, latents sharded, rows sharded, every
activation; and checkpoints that change the number of processes on the way.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distributed.sharded_gradients import CASES, gradients
from distributed.sharded_run import configs, source, weights
from gemscope.core.errors import InputError
from gemscope.core.files import read_tensors
from gemscope.training.log import read_log
from gemscope.training.outcome import Keeping
from gemscope.training.sharding import ALONE, start
from gemscope.training.trainer import train

ROOT = Path(__file__).parents[2]


def torchrun(script: str, *arguments: object, processes: int = 2) -> None:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(Path(__file__).with_name(script)), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, weights(train(source(), configs(), keep=Keeping(folder, every=15), report_every=1))


def check(folder: Path, alone: tuple[Path, dict[str, torch.Tensor]]) -> None:
    found, expected = read_tensors(folder / "weights.safetensors"), alone[1]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-7, name
    for one, other in zip(read_log(folder / "log.jsonl"), read_log(alone[0] / "log.jsonl"), strict=True):
        for name in list(one)[1:]:
            assert one[name]["loss"] == pytest.approx(other[name]["loss"], rel=1e-5)
            assert one[name]["l0"] == pytest.approx(other[name]["l0"], rel=1e-3)


@pytest.fixture(scope="module")
def sharded_gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    torchrun("sharded_gradients.py", folder)
    return folder


@pytest.mark.parametrize("latents", [2, 1], ids=["latents sharded", "rows sharded"])
@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_that_of_one_process(case: str, latents: int, sharded_gradients: Path) -> None:
    """In float64, AuxK and dead latents included."""
    found = read_tensors(sharded_gradients / f"{latents}.safetensors")
    expected = gradients(case)
    assert {name for name in found if name.startswith(f"{case}.")} == set(expected)
    for name, tensor in expected.items():
        assert tensor.norm() > 0, name
        assert (found[name] - tensor).norm() <= 1e-6 * tensor.norm(), name


@pytest.mark.parametrize("latents", [2, 1], ids=["latents sharded", "rows sharded"])
def test_two_processes_equal_one(latents: int, alone: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    torchrun("sharded_run.py", tmp_path, latents, 15)
    check(tmp_path, alone)


def test_a_checkpoint_goes_on_at_another_number_of_processes(
    alone: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    class Interrupted(Exception):
        pass

    def stop(step: int, _: object) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        train(source(), configs(), keep=Keeping(tmp_path, every=15, export=stop), report_every=1)
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 15
    torchrun("sharded_run.py", tmp_path, 2, 15)
    check(tmp_path, alone)


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    """Before anything was reported, and where a checkpoint is due anyway."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    script = str(Path(__file__).with_name("stopped_run.py"))
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    processes: list[subprocess.Popen[bytes]] = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **place}
        processes.append(subprocess.Popen([sys.executable, script, str(tmp_path)], env=environment))
    try:
        assert [process.wait(300) for process in processes] == [128 + signal.SIGTERM] * 2
    finally:
        for process in processes:
            process.kill()
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 3


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="divisor of 4"):
        start(3)
