"""An index on Ray: the bytes of a local run, whatever happens to the workers."""

import pytest
import torch
from typer.testing import CliRunner

from gemscope.activations.cluster import RayConfig
from gemscope.activations.plan import HarvestConfig
from gemscope.activations.store import Store
from gemscope.artifacts import native
from gemscope.artifacts.config import DictionaryConfig, Loaded
from gemscope.cli.main import app
from gemscope.core.sites import Site
from gemscope.features.blocks import StoreRows
from gemscope.features.cluster import CountWorker, index_on_ray
from gemscope.features.config import IndexConfig
from gemscope.features.index import FeatureIndex, index
from gemscope.features.passing import check_plan, counted_units, plan_of
from unit.activations import small
from unit.activations.killing import killing
from unit.dictionaries.zoo import random_dictionary

SITE = Site("resid_post", 0)
CONFIG = IndexConfig(top=4, groups=3, per_group=2, sample=9, window=3, nearest=2, partners=3)


@pytest.fixture
def parts(tmp_path):
    sae = random_dictionary("sae", d_in=24, d_sae=20, dtype=torch.float32)
    loaded = {"a": Loaded(sae, DictionaryConfig.of(sae, SITE, model="tiny"))}
    rows = StoreRows(Store.open(small.store(tmp_path / "store")))
    assert rows.units > 3
    assert index(tmp_path / "local", rows, loaded, CONFIG, gemma=small.model()) is not None
    return rows, loaded


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.npy"))}


def same(one, other):
    assert content(one) == content(other)
    mine, theirs = FeatureIndex.open(one), FeatureIndex.open(other)
    assert list(mine.database.every_label()) == list(theirs.database.every_label())
    return True


def test_workers_share_units_and_one_that_starts_again_goes_on(parts, tmp_path):
    rows, loaded = parts
    folder = tmp_path / "shared"
    folder.mkdir()
    check_plan(folder, plan_of(rows, loaded, CONFIG))
    arguments = (rows, loaded, CONFIG, str(folder), 2, torch.get_num_threads())
    first, second = CountWorker(0, *arguments), CountWorker(1, *arguments)
    first.work(0)
    second.work(1)
    first.work(3)
    again = CountWorker(0, *arguments)
    assert counted_units(folder) == {0, 1, 3}
    for unit in range(rows.units):
        assert again.work(unit) == unit
    assert counted_units(folder) == set(range(rows.units))
    assert index(folder, rows, loaded, CONFIG, gemma=small.model()) is not None
    assert same(folder, tmp_path / "local")


@pytest.mark.slow
def test_two_workers_of_ray_give_the_bytes_of_one_run(parts, tmp_path):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    rows, loaded = parts
    seen = []
    made = index_on_ray(
        tmp_path / "ray",
        rows,
        loaded,
        RayConfig(workers=2),
        CONFIG,
        gemma=small.model(),
        progress=lambda *at: seen.append(at),
    )
    assert same(made.folder, tmp_path / "local")
    assert len(seen) == rows.units
    assert seen[-1] == (rows.rows, rows.rows)


@pytest.mark.slow
def test_a_worker_of_the_command_that_is_killed_midway_changes_nothing(tiny_folder, tmp_path):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    config = HarvestConfig(("resid_post.0",), context=64, bucket_rows=100, unit_rows=100, batch_tokens=256)
    store = small.store(tmp_path / "store", config, small.corpus(600))
    sae = random_dictionary("sae", d_in=24, d_sae=20, dtype=torch.float32)
    native.save(tmp_path / "sae", sae, DictionaryConfig.of(sae, SITE, model="tiny"))
    words = ["index", "--store", store, "--dictionary", tmp_path / "sae", "--model", tiny_folder, "--out"]
    whole, folder = tmp_path / "whole", tmp_path / "ray"

    def call(*more):
        done = CliRunner().invoke(app, [str(word) for word in more])
        assert done.exit_code == 0, (done.output, done.exception)

    call(*words, whole)
    units, seen = StoreRows(Store.open(store)).units, []

    def begun() -> bool:
        seen.append(len(list((folder / "counted").glob("*.safetensors"))) and len(counted_units(folder)))
        return seen[-1] > 0

    killed = killing("CountWorker", begun)
    call(*words, folder, "--ray", "--workers", 2)
    assert killed
    assert seen[-1] < units
    assert same(folder, whole)
