"""Damage is found and named; stores are described, merged and removed."""

import json
import shutil

import pytest
import torch

from gemscope.activations import locks, upkeep
from gemscope.activations.harvesting import Slice
from gemscope.activations.sources import Documents
from gemscope.activations.store import Store
from gemscope.core.errors import FormatError, InputError
from unit.activations import small


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small.store(tmp_path_factory.mktemp("stores") / "s")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "s")


def test_a_whole_store_has_no_problems(whole):
    calls = []
    assert upkeep.verify(whole, lambda *now: calls.append(now)) == []
    assert calls[-1][0] == calls[-1][1] > 0


@pytest.mark.parametrize("name", ["acts/resid_post.2/000001", "rows/000000", "statistics/000002"])
@pytest.mark.parametrize("where", [3, 40, 250, 256, 300, -1])
def test_one_flipped_bit_anywhere_is_found_and_named(folder, name, where):
    path = folder / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[where] ^= 4
    path.write_bytes(data)
    (problem,) = upkeep.verify(folder)
    assert str(path) in problem
    assert "damaged" in problem


def test_a_flipped_bit_in_the_json_files_and_statistics_is_found(folder):
    for name in ("manifest.json", "units/000001.json", "statistics.safetensors", "plan.json"):
        path = folder / name
        whole = path.read_bytes()
        for where in (len(whole) // 3, len(whole) - 9):
            data = bytearray(whole)
            data[where] ^= 1
            path.write_bytes(data)
            try:
                assert upkeep.verify(folder) != [], (name, where)
            except FormatError:
                assert name == "plan.json"
            path.write_bytes(whole)


def test_a_truncated_a_long_and_a_missing_file_are_found_at_open(folder):
    path = folder / "acts" / "mlp_act.1" / "000001.safetensors"
    data = path.read_bytes()
    for bad, word in ((data[:-7], "truncated"), (data + b"x", "too long"), (None, "missing")):
        path.unlink() if bad is None else path.write_bytes(bad)
        with pytest.raises(FormatError) as refused:
            Store.open(folder)
        for found in (upkeep.verify(folder)[0], str(refused.value)):
            assert str(path) in found
            assert word in found
        path.write_bytes(data)
    (folder / "units" / "000001.json").unlink()
    assert "unit 1" in upkeep.verify(folder)[0]


def test_a_file_that_shrinks_while_it_is_read_is_an_error(folder):
    store = Store.open(folder)
    path = folder / "acts" / "mlp_act.1" / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(FormatError, match="truncated while open"):
        list(store.stream(["mlp_act.1"], 100, epochs=1))


def test_info_says_what_is_there(whole, tmp_path):
    found = upkeep.info(whole)
    store = Store.open(whole)
    assert (found.rows, found.units, found.units_planned) == (store.rows, store.plan.units, store.plan.units)
    assert found.sites == {str(site): store.width(site) for site in store.sites}
    assert found.skipped_documents == 2
    assert json.loads(json.dumps(found.as_dict())) == found.as_dict()
    part = upkeep.info(small.store(tmp_path / "part", share=Slice(0, 2)))
    assert part.units < part.units_planned
    assert part.mean_norm == {}
    with pytest.raises(FormatError):
        upkeep.info(tmp_path)


def test_merged_stores_hold_the_rows_of_both_with_documents_numbered_on(whole, tmp_path):
    other = small.store(tmp_path / "b", source=Documents(small.corpus().items[20:60]))
    upkeep.merge([whole, other], tmp_path / "both")
    assert upkeep.verify(tmp_path / "both") == []
    a, b, both = (Store.open(path) for path in (whole, other, tmp_path / "both"))
    assert both.rows == a.rows + b.rows
    assert both.plan.documents == a.plan.documents + b.plan.documents
    first = len(a.plan.config["source"]) and a.plan.units
    assert torch.equal(both.shard("mlp_act.1", first), b.shard("mlp_act.1", 0))
    assert torch.equal(both.origin(first).doc, b.origin(0).doc + a.plan.documents)
    wanted = (a.statistics("mlp_act.1").total + b.statistics("mlp_act.1").total) / both.rows
    torch.testing.assert_close(torch.from_numpy(both.statistics("mlp_act.1").mean), torch.from_numpy(wanted))
    assert sum(len(x[both.sites[0]]) for x in both.batches(both.sites[:1], 100)) == both.rows
    upkeep.remove(other)
    assert upkeep.verify(tmp_path / "both") == []
    with pytest.raises(InputError, match="not empty"):
        upkeep.merge([whole], tmp_path / "both")


def test_stores_that_do_not_fit_are_not_merged(whole, tmp_path):
    from dataclasses import replace

    other = small.store(tmp_path / "b", replace(small.CONFIG, sites=("resid_post.0",)))
    with pytest.raises(InputError, match="sites is another"):
        upkeep.merge([whole, other], tmp_path / "both")
    part = small.store(tmp_path / "part", share=Slice(0, 2))
    with pytest.raises(FormatError, match="not finished"):
        upkeep.merge([whole, part], tmp_path / "both")


def test_only_a_store_that_nobody_writes_is_removed(folder, tmp_path):
    with locks.writing(folder, 0, 1), pytest.raises(InputError, match="is writing"):
        upkeep.remove(folder)
    assert upkeep.remove(folder) > 1000
    assert not folder.exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(FormatError):
        upkeep.remove(tmp_path / "mine")
    assert (tmp_path / "mine").exists()
