"""Harvests on Ray: the bytes of a local run, whatever happens to the workers."""

import os
import signal
import threading
import time

import pytest

from gemscope.activations.cluster import ModelSpec, RayConfig, harvest_on_ray
from gemscope.activations.harvesting import harvest_to
from gemscope.activations.plan import HarvestConfig
from gemscope.core.errors import InputError
from gemscope.models.gemma import Gemma
from unit.activations import small

CONFIG = HarvestConfig(("resid_post.0", "mlp_act.2"), context=64, bucket_rows=400, unit_rows=300, batch_tokens=256)


def test_without_ray_the_remedy_is_named(tmp_path, monkeypatch):
    import importlib

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"pip install 'gemscope\[ray\]'"):
        harvest_on_ray(
            tmp_path / "s", ModelSpec("none"), small.model(), small.corpus(), CONFIG, RayConfig(), on_estimate=None
        )


@pytest.fixture
def local(tiny_folder, tmp_path):
    gemma = Gemma.load(tiny_folder, check=False)
    harvest_to(tmp_path / "local", gemma, small.corpus(), CONFIG)
    return gemma


@pytest.mark.slow
def test_two_workers_give_the_bytes_of_one_run(tiny_folder, tmp_path, local):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    seen = []
    spec, where = ModelSpec(str(tiny_folder)), RayConfig(workers=2)
    harvest_on_ray(tmp_path / "ray", spec, local, small.corpus(), CONFIG, where, progress=seen.append)
    assert small.content(tmp_path / "ray") == small.content(tmp_path / "local")
    assert seen[-1].units == seen[-1].units_total > 3


@pytest.mark.slow
def test_a_worker_that_is_killed_midway_changes_nothing(tiny_folder, tmp_path, local):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    killed = []

    def kill() -> None:
        """Kill -9 the first worker process that has written something."""
        while not killed:
            time.sleep(0.01)
            if list((tmp_path / "ray").glob("units/*.json")):
                for entry in os.listdir("/proc"):
                    if entry.isdecimal() and _is_worker(int(entry)):
                        os.kill(int(entry), signal.SIGKILL)
                        killed.append(int(entry))
                        return

    threading.Thread(target=kill, daemon=True).start()
    spec, where = ModelSpec(str(tiny_folder)), RayConfig(workers=2)
    harvest_on_ray(tmp_path / "ray", spec, local, small.corpus(), CONFIG, where)
    assert killed
    assert small.content(tmp_path / "ray") == small.content(tmp_path / "local")


def _is_worker(pid: int) -> bool:
    """A process below this one that calls itself a UnitWorker."""
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            name = file.read()
        parent = pid
        while parent > 1 and parent != os.getpid():
            with open(f"/proc/{parent}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError):
        return False
    return parent == os.getpid() and name.startswith("ray::UnitWorker")
