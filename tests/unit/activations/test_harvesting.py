"""Harvests to disk: every row is what the model computes; the bytes do not depend on who did what and when."""

import errno
import os
import random
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from gemscope.activations import harvesting, locks, turns
from gemscope.activations.harvest import harvest
from gemscope.activations.harvesting import HarvestProgress, Slice, estimate, harvest_to
from gemscope.activations.plan import HarvestConfig, Plan
from gemscope.activations.shards import ShardWriter
from gemscope.activations.sources import Documents
from gemscope.activations.store import Store
from gemscope.activations.upkeep import verify
from gemscope.core import files
from gemscope.core.errors import FormatError, InputError, SiteError, StorageError
from unit.activations import small


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return small.store(tmp_path_factory.mktemp("stores") / "one")


@pytest.mark.parametrize("packing", [False, True])
def test_every_row_is_the_capture_of_its_piece_alone(tmp_path, packing):
    config = replace(small.CONFIG, dtype="float32", packing=packing)
    store = Store.open(small.store(tmp_path / "s", config))
    gemma, context = small.model(), config.context
    seen = set()
    for shard in store.shards:
        origin = store.origin(shard.unit)
        acts = {site: store.shard(site, shard.unit) for site in store.sites}
        for row in range(0, shard.rows, 23):
            doc, pos = int(origin.doc[row]), int(origin.pos[row])
            item = small.corpus().items[doc]
            whole = gemma.tokens(item) if isinstance(item, str) else gemma.chat(item, answer=False)
            assert whole.ids[pos] == origin.token[row]
            start = 1 if pos < context else context + (pos - context) // (context - 1) * (context - 1)
            stop = context if pos < context else start + context - 1
            alone = gemma.capture(gemma.tokens_of([2, *whole.ids[start:stop].tolist()]), store.sites)
            for site in store.sites:
                torch.testing.assert_close(acts[site][row], alone[site][0, pos - start + 1], rtol=1e-4, atol=1e-4)
        seen |= set(zip(origin.doc.tolist(), origin.pos.tolist(), strict=True))
    assert len(seen) == store.rows


def test_a_store_holds_the_rows_of_a_harvest_in_memory(undisturbed):
    store, gemma = Store.open(undisturbed), small.model()
    wide = replace(small.CONFIG, context=128)
    short = [i for i, item in enumerate(small.corpus().items) if isinstance(item, str) and 0 < len(item.split()) < 14]
    items = [gemma.tokens(small.corpus().items[i]) for i in short]
    rows = harvest(gemma, items, small.SITES)
    assert wide.context > 16
    table = {}
    for shard in store.shards:
        origin, acts = store.origin(shard.unit), store.shard("resid_post.2", shard.unit)
        table |= dict(zip(zip(origin.doc.tolist(), origin.pos.tolist(), strict=True), acts, strict=True))
    for row in range(0, rows.rows, 11):
        found = table[short[int(rows.doc[row])], int(rows.pos[row])]
        torch.testing.assert_close(found, rows["resid_post.2"][row], rtol=2e-2, atol=2e-2)


def test_statistics_are_those_of_the_rows(undisturbed):
    store = Store.open(undisturbed)
    for site in store.sites:
        rows = torch.cat([store.shard(site, shard.unit) for shard in store.shards]).double()
        found = store.statistics(site)
        torch.testing.assert_close(torch.from_numpy(found.mean), rows.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.from_numpy(found.second_moment), rows.square().mean(0), rtol=1e-5, atol=1e-6)
        assert found.mean_norm == pytest.approx(rows.norm(dim=1).mean().item(), rel=1e-5)
        assert found.mean_square_norm == pytest.approx(rows.square().sum(1).mean().item(), rel=1e-5)
        assert found.largest == pytest.approx(rows.norm(dim=1).max().item(), rel=1e-5)


def test_outliers_are_counted_and_left_out_at_all_sites_if_asked(tmp_path):
    config = replace(small.CONFIG, outlier_factor=1.3)
    every = Store.open(small.store(tmp_path / "all", config))
    fewer = Store.open(small.store(tmp_path / "few", replace(config, drop_outliers=True)))
    assert fewer.rows == every.rows - every.manifest["outliers"] < every.rows
    assert fewer.manifest["outliers"] == every.manifest["outliers"]
    limit = {site: 1.3 * one.median_norm for site, one in every.plan.sites.items()}
    for shard in every.shards:
        high = torch.zeros(shard.rows, dtype=torch.bool)
        for site in every.sites:
            high |= every.shard(site, shard.unit).float().norm(dim=1) > limit[site]
        for site in every.sites:
            assert torch.equal(every.shard(site, shard.unit)[~high], fewer.shard(site, shard.unit))
        assert torch.equal(every.origin(shard.unit).token[~high], fewer.origin(shard.unit).token)
    rows = torch.cat([fewer.shard("mlp_act.1", shard.unit) for shard in fewer.shards]).double()
    torch.testing.assert_close(torch.from_numpy(fewer.statistics("mlp_act.1").mean), rows.mean(0), rtol=1e-5, atol=1e-6)
    assert verify(tmp_path / "few") == []


def test_slices_in_any_order_give_the_same_bytes(tmp_path, undisturbed):
    for index in (2, 0, 1):
        small.store(tmp_path / "s", share=Slice(index, 3))
        if index == 0:
            with pytest.raises(FormatError, match="not finished"):
                Store.open(tmp_path / "s")
            assert 0 < Store.open(tmp_path / "s", partial=True).rows < Store.open(undisturbed).rows
    assert small.content(tmp_path / "s") == small.content(undisturbed)


def test_packed_harvests_have_the_same_rows_and_their_slices_the_same_bytes(tmp_path, undisturbed):
    config = replace(small.CONFIG, packing=True)
    packed = small.store(tmp_path / "whole", config)
    for index in (1, 0):
        small.store(tmp_path / "s", config, share=Slice(index, 2))
    assert small.content(tmp_path / "s") == small.content(packed)
    one, other = Store.open(packed), Store.open(undisturbed)
    for shard in other.shards:
        assert torch.equal(one.origin(shard.unit).token, other.origin(shard.unit).token)
        for site in other.sites:
            torch.testing.assert_close(one.shard(site, shard.unit), other.shard(site, shard.unit), rtol=2e-2, atol=2e-2)
    with pytest.raises(InputError, match="packing true there, false now"):
        small.store(packed)


def test_running_again_does_nothing_and_finishes_what_is_missing(tmp_path, undisturbed):
    folder = small.store(tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("acts/*/*")}
    small.store(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("acts/*/*")} == before
    (folder / "units" / "000001.json").unlink()
    (folder / "acts" / "mlp_act.1" / "000000.safetensors").unlink()
    os.truncate(folder / "rows" / "000002.safetensors", 500)
    (folder / "acts" / "resid_post.0" / ".000001.safetensors.abc.tmp").write_bytes(b"left by a killed run")
    small.store(folder)
    assert small.content(folder) == small.content(undisturbed)


def _killed_and_resumed(tmp_path, undisturbed, moments: int, seed: int) -> None:
    started = time.perf_counter()
    small.forked(lambda: small.store(tmp_path / "timed")).join()
    seconds = time.perf_counter() - started
    wanted, random_ = small.content(undisturbed), random.Random(seed)
    assert small.content(tmp_path / "timed") == wanted
    cut = 0
    for moment in range(moments):
        folder = tmp_path / f"killed-{moment}"
        process = small.forked(lambda folder=folder: small.store(folder))
        time.sleep(random_.uniform(0.02, 1) * seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        cut += not (folder / "manifest.json").is_file()
        again = small.forked(lambda folder=folder: small.store(folder))
        again.join()
        assert again.exitcode == 0
        assert small.content(folder) == wanted
    assert cut > moments // 3


def test_kill_9_at_random_moments_changes_nothing(tmp_path, undisturbed):
    _killed_and_resumed(tmp_path, undisturbed, 3, seed=0)


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments_changes_nothing(tmp_path, undisturbed):
    _killed_and_resumed(tmp_path, undisturbed, 20, seed=1)


@pytest.mark.parametrize("at", [2, 7, 10, 25])
def test_a_full_disk_leaves_no_half_unit_and_the_next_run_goes_on(tmp_path, undisturbed, monkeypatch, at):
    folder, append, calls = tmp_path / "s", ShardWriter.append, []

    def full(self, data):
        calls.append(len(data))
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, data)

    monkeypatch.setattr(ShardWriter, "append", full)
    with pytest.raises(StorageError, match="disk is full"):
        small.store(folder)
    monkeypatch.undo()
    assert not list(folder.rglob("*.tmp"))
    for record in (folder / "units").glob("*.json"):
        assert len(list(folder.rglob(f"{record.stem}.safetensors"))) == len(small.SITES) + 2
    assert len(list((folder / "units").glob("*.json"))) < Plan.read(folder).units
    small.store(folder)
    assert small.content(folder) == small.content(undisturbed)


def test_an_interrupt_leaves_no_half_unit_and_the_next_run_goes_on(tmp_path, undisturbed, monkeypatch):
    folder, filling, calls = tmp_path / "s", turns.Filling, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return filling(*args)

    monkeypatch.setattr(turns, "Filling", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small.store(folder)
    monkeypatch.undo()
    assert not list(folder.rglob("*.tmp"))
    assert 0 < len(list((folder / "units").glob("*.json"))) < Plan.read(folder).units
    small.store(folder)
    assert small.content(folder) == small.content(undisturbed)


def test_a_record_is_written_when_its_files_are_synced(tmp_path, monkeypatch):
    seen, sync = [], files._sync

    def noted(path):
        sync(path)
        seen.append(path.name)

    monkeypatch.setattr(files, "_sync", noted)
    plan = Plan.read(small.store(tmp_path / "s"))
    for unit in range(plan.units):
        data = [i for i, name in enumerate(seen) if name.startswith(f".{unit:06d}.safetensors.")]
        (record,) = (i for i, name in enumerate(seen) if name.startswith(f".{unit:06d}.json."))
        assert len(data) == len(small.SITES) + 2
        assert max(data) < record


def test_a_store_that_will_not_fit_is_refused_before_it_begins(tmp_path, monkeypatch):
    usage = harvesting.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(harvesting.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match="free some space"):
        small.store(tmp_path / "s")
    assert not (tmp_path / "s" / "acts").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        small.store(tmp_path / "file" / "store")
    with pytest.raises(StorageError, match="cannot write"):
        small.store(type(tmp_path)("/proc/gemscope-store"))


def test_two_harvests_into_one_folder_are_kept_apart(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    with locks.writing(folder, 0, 1):
        for share in (Slice(), Slice(0, 3)):
            with pytest.raises(InputError, match=rf"process {os.getpid()} on .* is writing"):
                small.store(folder, share=share)
        assert locks.is_locked(folder)
    with locks.writing(folder, 1, 3):
        with pytest.raises(InputError, match="is writing"):
            small.store(folder)
        with pytest.raises(InputError, match="is writing"):
            small.store(folder, share=Slice(1, 3))
        small.store(folder, share=Slice(0, 3))
    assert not locks.is_locked(folder)


def test_another_harvest_is_not_mixed_in(tmp_path):
    folder = small.store(tmp_path / "s")
    with pytest.raises(InputError, match=r"another harvest \(seed 3 there, 4 now\)"):
        small.store(folder, replace(small.CONFIG, seed=4))
    with pytest.raises(InputError, match=r"another harvest .*source"):
        small.store(folder, source=Documents(("other", "text")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        small.store(tmp_path / "full")


def test_a_source_that_shrank_is_noticed(tmp_path):
    class Shrinking(Documents):
        def read(self, start, stop):
            return iter(self.items[start : min(stop, 100)])

    with pytest.raises(InputError, match="the text has changed"):
        harvest_to(tmp_path / "s", small.model(), Shrinking(small.corpus().items), small.CONFIG)


def test_options_that_make_no_sense(tmp_path):
    for bad in ({"tokens": 0}, {"context": 1}, {"dtype": "int8"}, {"outlier_factor": 1.0}, {"bucket_rows": 0}):
        with pytest.raises(InputError):
            HarvestConfig(small.SITES, **bad)
    with pytest.raises(SiteError, match="99"):
        small.store(tmp_path / "s", HarvestConfig(("resid_post.99",)))
    with pytest.raises(SiteError):
        small.store(tmp_path / "s", HarvestConfig(("pattern.0",)))
    with pytest.raises(InputError, match="no site"):
        small.store(tmp_path / "s", HarvestConfig(()))
    with pytest.raises(InputError, match="nothing to harvest"):
        small.store(tmp_path / "s", source=Documents(("", "")))
    for text in ("3/3", "1", "a/b", "-1/2"):
        with pytest.raises(InputError, match="slice"):
            Slice.parse(text)
    assert Slice.parse("1/3") == Slice(1, 3)


def test_the_number_of_tokens_is_met_and_progress_ends_at_the_total(tmp_path):
    seen: list[HarvestProgress] = []
    config = replace(small.CONFIG, tokens=700)
    harvest_to(tmp_path / "s", small.model(), small.corpus(), config, progress=seen.append)
    store = Store.open(tmp_path / "s")
    assert 0.7 * 700 < store.rows < 1.3 * 700
    assert seen[-1].rows == seen[-1].rows_total == store.rows
    assert [one.rows for one in seen] == sorted(one.rows for one in seen)
    assert seen[-1].units == seen[-1].units_total == store.plan.units
    assert seen[-1].seconds_left == 0
    size = sum(len(data) for name, data in small.content(tmp_path / "s").items() if name.startswith(("acts", "rows")))
    assert seen[-1].bytes == pytest.approx(size, rel=0.1)
    assert estimate(small.model(), store.plan, tmp_path / "s").bytes_left == 0


def test_bytes_per_token_are_twice_the_width(tmp_path):
    store = Store.open(small.store(tmp_path / "s"))
    acts = [one.bytes for shard in store.shards for name, one in shard.files.items() if name.startswith("acts")]
    heads = 256 * len(acts)
    assert sum(acts) - heads == store.rows * 2 * sum(store.width(site) for site in store.sites)


def test_memory_does_not_grow_with_the_text(tmp_path):
    sites = tuple(f"{name}.{layer}" for name in ("resid_post", "mlp_act", "z") for layer in range(4))
    config = HarvestConfig(sites, context=64, bucket_rows=1000, unit_rows=800, batch_tokens=2048)
    items = [item for item in small.corpus().items if isinstance(item, str) and item] * 2

    def peak(times: int) -> tuple[int, int]:
        read, write = os.pipe()

        def work() -> None:
            harvest_to(tmp_path / f"warm{times}", small.model(), Documents(tuple(items)), config)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the libraries' own buffers are there now; count the peak anew
            before = _resident("VmRSS")
            harvest_to(tmp_path / f"s{times}", small.model(), Documents(tuple(items * times)), config)
            os.write(write, f"{_resident('VmHWM') - before}".encode())

        process = small.forked(work)
        process.join()
        assert process.exitcode == 0
        grown = int(os.read(read, 100))
        os.close(read)
        os.close(write)
        data = sum(p.stat().st_size for p in (tmp_path / f"s{times}").rglob("acts/*/*"))
        return grown, data

    (once, small_data), (eight, big_data) = peak(1), peak(8)
    assert big_data > 7 * small_data > 2e6
    bound = estimate(small.model(), Plan.read(tmp_path / "s8"), tmp_path / "s8").memory
    assert eight - once < 0.3 * big_data, (once, eight, big_data)
    assert eight < bound + 40e6, (eight, bound)


def _resident(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def test_a_bucket_never_outgrows_its_room():
    from gemscope.activations.pieces import encode
    from gemscope.activations.units import bucket_pieces

    pieces = encode(small.model(), small.corpus().items, 0, 16)
    for rows in (1, 10, 50, 333, 10**6):
        parts = list(bucket_pieces(pieces, rows))
        assert np.array_equal(np.concatenate(parts), np.arange(len(pieces)))
        assert max(int(pieces.rows[part].sum()) for part in parts) <= rows + 16


def test_the_interpreters_lock_is_handed_on_soon_while_harvesting_and_as_before_afterwards(tmp_path, monkeypatch):
    before, seen = sys.getswitchinterval(), []
    filling = turns.Filling
    monkeypatch.setattr(turns, "Filling", lambda *words: seen.append(sys.getswitchinterval()) or filling(*words))
    small.store(tmp_path / "s")
    assert seen
    assert max(seen) < before / 10
    assert sys.getswitchinterval() == before
