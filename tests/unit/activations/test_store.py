"""Reading a store: the same rows for all sites, an order that is a function of seed and epoch, exact resume."""

import gc
import json
import shutil
import threading
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from gemscope.activations.harvest import harvest
from gemscope.activations.order import Position, Reading, epoch_order
from gemscope.activations.sources import Documents
from gemscope.activations.store import Store
from gemscope.activations.streaming import LiveActivations
from gemscope.core.errors import FormatError, InputError
from gemscope.core.sites import Site
from gemscope.training.config import TrainConfig
from gemscope.training.data import SeekableSource
from gemscope.training.outcome import Keeping
from gemscope.training.trainer import train
from unit.activations import small

READING = Reading(block_rows=32, open_shards=2, pool_rows=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.store(tmp_path_factory.mktemp("stores") / "s")


@pytest.fixture(scope="module")
def store(folder):
    return Store.open(folder)


def rows_of(store: Store, site: str) -> dict[tuple[int, int], torch.Tensor]:
    table = {}
    for shard in store.shards:
        origin = store.origin(shard.unit)
        acts = store.shard(site, shard.unit)
        table |= dict(zip(zip(origin.doc.tolist(), origin.pos.tolist(), strict=True), acts, strict=True))
    return table


@pytest.mark.parametrize("batch_size", [1, 37, 100_000])
def test_every_row_once_an_epoch_aligned_over_sites(store, batch_size):
    if batch_size == 1:
        store = store.split(0.05)[1]
    tables = {site: rows_of(store, str(site)) for site in store.sites}
    seen = []
    stream = store.stream(store.sites, batch_size, 5, epochs=1, reading=READING, origin=True)
    for batch in stream:
        assert list(batch) == store.sites
        keys = list(zip(stream.origin.doc.tolist(), stream.origin.pos.tolist(), strict=True))
        for site in store.sites:
            assert batch[site].dtype == torch.bfloat16
            assert torch.equal(batch[site], torch.stack([tables[site][key] for key in keys]))
        seen += keys
    assert len(seen) == len(set(seen)) == store.rows
    assert stream.position == Position(1)


def flat(stream, sites):
    return [[batch[site] for site in sites] for batch in stream]


@pytest.mark.parametrize("threads", [1, 4])
def test_resume_at_any_place_gives_the_identical_rest(store, threads):
    sites = [Site("resid_post", 2), Site("mlp_act", 1)]
    whole = store.stream(sites, 70, 9, epochs=2, reading=READING, threads=1)
    batches, places = [], [whole.position]
    for batch in whole:
        batches.append([batch[site] for site in sites])
        places.append(whole.position)
    assert all(a < b for a, b in pairwise(places))
    random = np.random.default_rng(0)
    for at in random.choice(len(batches), 12, replace=False):
        start = Position.of_dict(json.loads(json.dumps(places[at].as_dict())))
        rest = flat(
            store.stream(sites, 70, 9, start=start, epochs=2 - start.epoch, reading=READING, threads=threads), sites
        )
        assert len(rest) == len(batches) - at
        assert all(
            torch.equal(a, b) for x, y in zip(rest, batches[at:], strict=True) for a, b in zip(x, y, strict=True)
        )


def test_a_stream_on_the_fly_resumes_too():
    live = LiveActivations.of(small.model(), small.corpus(), small.CONFIG, pool_rows=500)
    sites = live.sites[:1]
    whole = live.stream(sites, 64, 2, epochs=2)
    batches, places = [], [whole.position]
    for batch in whole:
        batches.append(batch[sites[0]])
        places.append(whole.position)
    for at in (1, 7, len(batches) - 3):
        rest = list(live.stream(sites, 64, 2, start=places[at], epochs=2 - places[at].epoch))
        assert len(rest) == len(batches) - at
        assert all(torch.equal(a[sites[0]], b) for a, b in zip(rest, batches[at:], strict=True))


def test_the_order_depends_on_seed_and_epoch_only(store):
    def first(**options):
        return next(store.stream(["resid_post.0"], 64, **options))[Site("resid_post", 0)]

    assert torch.equal(first(seed=1), first(seed=1, threads=2))
    assert not torch.equal(first(seed=1), first(seed=2))
    assert not torch.equal(first(seed=1), first(seed=1, start=Position(1)))


def test_an_order_holds_every_block_once_and_pools_of_about_the_same_size():
    rows = [1000, 7, 64, 513]
    kept = [np.minimum(np.arange(0, n, 64) + 64, n) - np.arange(0, n, 64) for n in rows]
    order = epoch_order(rows, kept, Reading(64, 2, 300), 0, 0)
    assert order.pools == -(-sum(rows) // 300)
    seen = []
    for pool in range(order.pools):
        runs = order.runs(pool)
        assert 200 < (runs.stop - runs.start).sum() < 364
        for shard, start, stop in zip(runs.shard, runs.start, runs.stop, strict=True):
            seen += [(shard, row) for row in range(start, stop)]
    assert sorted(seen) == [(shard, row) for shard, n in enumerate(rows) for row in range(n)]


def test_a_split_is_by_document_and_that_of_a_set_of_the_same_documents(store):
    train_side, held = store.split(0.3, seed=4)
    docs = {}
    for name, side in (("train", train_side), ("held", held)):
        stream = side.stream(["resid_post.0"], 50, epochs=1, reading=READING, origin=True)
        docs[name] = [doc for _ in stream for doc in stream.origin.doc.tolist()]
        assert len(docs[name]) == side.rows
    assert not set(docs["train"]) & set(docs["held"])
    assert len(docs["train"]) + len(docs["held"]) == store.rows
    assert 0.1 < held.rows / store.rows < 0.5
    texts = [item if isinstance(item, str) and item else "the" for item in small.corpus().items]
    rows = harvest(small.model(), [small.model().tokens(text) for text in texts], ["resid_post.0"])
    in_memory = rows.split(0.3, seed=4)[1]
    assert set(docs["held"]) <= set(in_memory.doc.tolist())
    assert not set(docs["train"]) & set(in_memory.doc.tolist())
    live = LiveActivations.of(small.model(), small.corpus(), small.CONFIG).split(0.3, seed=4)[1]
    stream = live.stream(["resid_post.0"], 50, epochs=1)
    assert {doc for _ in stream for doc in stream.origin.doc.tolist()} == set(docs["held"])
    again = train_side.split(0.5, seed=5)
    assert again[0].rows + again[1].rows == train_side.rows
    with pytest.raises(InputError, match="outside"):
        store.split(0.0)


def test_the_trainer_reads_a_store_and_a_stream_as_it_reads_a_set(store):
    live = LiveActivations.of(small.model(), small.corpus(), small.CONFIG)
    config = TrainConfig(Site("resid_post", 2), d_sae=32, target_l0=4.0, steps=6, batch_size=256, calibration_rows=512)
    for source in (store, live):
        assert isinstance(source, SeekableSource)
        assert source.about["model"] == small.model().name
        (one,), (other,) = train(source, [config]), train(source, [config])
        assert one.summary.fvu < 1.5
        assert torch.equal(one.dictionary.W_enc, other.dictionary.W_enc)
        assert one.summary.epochs == pytest.approx(6 * 256 / source.rows)


def test_several_threads_read_one_store_at_once(store):
    results: dict[int, list[torch.Tensor]] = {}

    def read(number: int) -> None:
        stream = store.stream(["mlp_act.1"], 128, 3, epochs=1, reading=READING)
        results[number] = [batch[Site("mlp_act", 1)] for batch in stream]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[number], strict=True))


@pytest.mark.parametrize("how", ["close", "drop", "cycle", "own thread"])
def test_a_stream_that_is_left_in_the_middle_lets_go(store, how):
    """Wherever it is dropped: also by the garbage collector, in a thread that serves the stream."""
    gc.collect()
    before = threading.active_count()
    streams = [store.stream(["mlp_act.1"], 10, reading=READING)]
    for _ in range(5):
        next(streams[0])
    if how == "close":
        streams[0].close()
    elif how == "cycle":
        streams[0].myself = streams[0]
    if how == "own thread":
        workers = streams[0]._steps.gi_frame.f_locals["self"].reader._workers
        workers.submit(streams.clear).result(timeout=30)
        del workers
    streams.clear()
    gc.collect()
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_what_is_not_there_is_refused(store, tmp_path):
    with pytest.raises(InputError, match=r"no activations of resid_post\.1"):
        store.stream(["resid_post.1"], 8)
    with pytest.raises(InputError, match="below 1"):
        store.stream(["resid_post.0"], 0)
    with pytest.raises(InputError, match="threads"):
        store.stream(["resid_post.0"], 8, threads=0)
    with pytest.raises(InputError, match="no rows of unit 99"):
        store.shard("resid_post.0", 99)
    with pytest.raises(FormatError):
        Store.open(tmp_path)
    with pytest.raises(FormatError, match="no position"):
        Position.of_dict({"epoch": 1})


def test_a_store_without_a_row_gives_no_batch(tmp_path):
    empty = Store.open(small.store(tmp_path / "s", replace(small.CONFIG, tokens=1), Documents(("the", ""))))
    held = empty.split(1e-9)[1]
    assert held.rows == 0
    assert list(held.batches(held.sites, 8)) == []


def test_training_goes_on_wherever_the_same_rows_are(folder, tmp_path):
    """In a folder that was moved, behind a URL, from a model that is run meanwhile; a live run knows its texts."""
    config = TrainConfig(Site("resid_post", 2), d_sae=32, target_l0=4.0, steps=4, batch_size=64, calibration_rows=100)

    def bits(rows, keep):
        train_rows, held = rows.split(0.3)
        (done,) = train(train_rows, [config], keep=keep, heldout=held)
        return list(done.dictionary.parameters())

    keep, moved = Keeping(tmp_path / "run"), tmp_path / "moved"
    first = bits(Store.open(folder), keep)
    shutil.copytree(folder, moved)
    for place in (moved, f"file://{moved}"):
        assert all(map(torch.equal, bits(Store.open(place, cache=tmp_path / "cache"), keep), first))
    with pytest.raises(InputError, match="other rows and held-out rows"):
        train(Store.open(folder).split(0.2)[0], [config], keep=keep)

    def live(words: int) -> LiveActivations:
        return LiveActivations.of(small.model(), small.corpus(words), small.CONFIG)

    keep = Keeping(tmp_path / "live")
    assert all(map(torch.equal, bits(live(150), keep), bits(live(150), keep)))
    with pytest.raises(InputError, match="other rows and held-out rows"):
        bits(live(149), keep)
