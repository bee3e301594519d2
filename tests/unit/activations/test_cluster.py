"""Harvests on Ray: the bytes of a local run, whatever happens to the workers."""

import pytest

from gemscope.activations.cluster import ModelSpec, RayConfig, harvest_on_ray
from gemscope.activations.harvesting import harvest_to
from gemscope.activations.plan import HarvestConfig
from gemscope.core.errors import InputError
from gemscope.models.gemma import Gemma
from unit.activations import small
from unit.activations.killing import killing

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
    killed = killing("UnitWorker", lambda: bool(list((tmp_path / "ray").glob("units/*.json"))))
    spec, where = ModelSpec(str(tiny_folder)), RayConfig(workers=2)
    harvest_on_ray(tmp_path / "ray", spec, local, small.corpus(), CONFIG, where)
    assert killed
    assert small.content(tmp_path / "ray") == small.content(tmp_path / "local")
