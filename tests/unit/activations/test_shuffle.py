"""The shuffle, of a store and of a stream on the fly, against the statistics of a random permutation."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gemscope.activations.order import LIVE_ROWS, LIVE_TEXTS, LIVE_UNITS, Reading
from gemscope.activations.plan import HarvestConfig
from gemscope.activations.sources import Documents
from gemscope.activations.store import Store
from gemscope.activations.streaming import LiveActivations
from unit.activations import shuffling, small

LIMIT = 5.0
SITE = "resid_post.0"
CONFIG = HarvestConfig((SITE,), context=64, bucket_rows=6000, unit_rows=5000, batch_tokens=8192)


@pytest.fixture(scope="module")
def text():
    """The worst order: all short texts first."""
    items = [item for item in small.corpus().items if isinstance(item, str) and len(item.split()) > 5] * 20
    return Documents(tuple(sorted(items, key=lambda item: len(item.split()))))


@pytest.fixture(scope="module")
def store(tmp_path_factory, text):
    return Store.open(small.store(tmp_path_factory.mktemp("s") / "s", CONFIG, text))


def test_rows_of_a_bucket_lie_as_a_random_permutation_would_put_them(store):
    for record in store.manifest["units"]:
        whole, at = store.origin(record["unit"]).doc.numpy(), 0
        for rows in record["buckets"]:
            doc = whole[at : at + rows]
            assert abs(shuffling.spread(doc)) < LIMIT
            assert abs(shuffling.neighbours(doc)) < LIMIT
            assert shuffling.spread(np.sort(doc)) > 10 * LIMIT
            assert shuffling.neighbours(np.sort(doc)) > 10 * LIMIT
            at += rows


def drawn(stream) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(documents, norms) of each batch."""
    docs, norms = [], []
    for batch in stream:
        docs.append(stream.origin.doc.numpy())
        norms.append(next(iter(batch.values())).float().norm(dim=1).numpy())
    return [x for x in docs if len(x) == len(docs[0])], [x for x in norms if len(x) == len(norms[0])]


class Unshuffled:
    """In the place of numpy's generator."""

    permutation = staticmethod(np.arange)


def well_mixed(docs, norms, limit=LIMIT):
    return (
        abs(shuffling.batch_means([x.astype(float) for x in docs])) < limit
        and abs(shuffling.batch_means(norms)) < limit
        and abs(shuffling.neighbours(np.concatenate(docs))) < limit
    )


def test_batches_of_a_store_are_random_samples(store):
    for seed in range(3):
        assert well_mixed(*drawn(store.stream([SITE], 256, seed, epochs=1, origin=True)))


def test_the_order_of_reading_does_not_undo_that_of_writing(tmp_path, text):
    """One bucket, one pool, one seed."""
    one = replace(CONFIG, tokens=2000, bucket_rows=10**6, unit_rows=10**6, seed=0)
    single = Store.open(small.store(tmp_path / "s", one, text))
    assert single.plan.units == 1
    docs, norms = drawn(single.stream([SITE], 64, 0, epochs=1, origin=True))
    assert well_mixed(docs, norms)


def test_batches_of_pools_smaller_than_the_store_are_random_samples_too(store):
    reading = Reading(block_rows=16, open_shards=8, pool_rows=8000)
    assert 2 < len(store.shards) <= 8
    docs, norms = drawn(store.stream([SITE], 64, 0, epochs=1, origin=True, reading=reading))
    assert well_mixed(docs, norms)


def pools_of(doc: np.ndarray) -> list[np.ndarray]:
    """Cut where no document has rows on both sides."""
    last = {int(one): at for at, one in enumerate(doc)}
    ends = np.maximum.accumulate([last[int(one)] for one in doc])
    return np.split(doc, np.flatnonzero(ends[:-1] == np.arange(len(doc) - 1)) + 1)


def test_batches_on_the_fly_are_random_samples(text):
    """Whole documents are in a pool; there their rows are scattered as a random permutation would."""
    live = LiveActivations.of(small.model(), text, CONFIG, pool_rows=8000)
    assert 2 < live.plan.units <= 8
    docs, norms = drawn(live.stream([SITE], 64, 1, epochs=1))
    assert abs(shuffling.batch_means([x.astype(float) for x in docs])) < LIMIT
    assert abs(shuffling.batch_means(norms)) < LIMIT
    pools = [doc for doc in pools_of(np.concatenate(docs)) if len(doc) > 1000]
    assert len(pools) == live.plan.units
    for doc in pools:
        assert abs(shuffling.spread(doc)) < LIMIT
        assert abs(shuffling.neighbours(doc)) < LIMIT
        assert shuffling.spread(np.sort(doc)) > 10 * LIMIT


@pytest.mark.parametrize("left_out", [(LIVE_UNITS, LIVE_TEXTS), (LIVE_ROWS,)])
def test_a_stream_on_the_fly_that_was_not_shuffled_fails(monkeypatch, text, left_out):
    """Without mixing the documents, or without mixing the rows of a pool."""
    live = LiveActivations.of(small.model(), text, CONFIG, pool_rows=8000)
    random = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Unshuffled if seed[-1] in left_out else random(seed))
    docs, _ = drawn(live.stream([SITE], 64, 1, epochs=1))
    assert shuffling.batch_means([x.astype(float) for x in docs]) > 10 * LIMIT


def test_a_store_that_was_not_shuffled_fails(monkeypatch, tmp_path, text):
    random = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda *_: Unshuffled)
    plain = Store.open(small.store(tmp_path / "s", CONFIG, text))
    monkeypatch.setattr(np.random, "default_rng", random)
    doc = plain.origin(0).doc.numpy()
    assert shuffling.spread(doc) > 10 * LIMIT
    assert shuffling.neighbours(doc) > 10 * LIMIT
    # pools alone do not make up for it, nor would shuffled shards that are read one after the other
    reading = Reading(block_rows=512, open_shards=8, pool_rows=4000)
    assert not well_mixed(*drawn(plain.stream([SITE], 64, 0, epochs=1, origin=True, reading=reading)))
    monkeypatch.setattr("gemscope.activations.pools.row_order", lambda rows, *_: np.arange(rows))
    assert not well_mixed(*drawn(plain.stream([SITE], 64, 0, epochs=1, origin=True)))


def test_every_row_comes_once_and_belongs_to_its_token(store, text):
    live = LiveActivations.of(small.model(), text, replace(CONFIG, dtype="float32"), pool_rows=8000)
    table = {}
    for shard in store.shards:
        origin, acts = store.origin(shard.unit), store.shard(SITE, shard.unit).float()
        keys = zip(origin.doc.tolist(), origin.pos.tolist(), strict=True)
        table |= dict(zip(keys, zip(origin.token.tolist(), acts, strict=True), strict=True))
    seen = []
    stream = live.stream([SITE], 500, epochs=1)
    for batch in stream:
        (x,) = batch.values()
        keys = list(zip(stream.origin.doc.tolist(), stream.origin.pos.tolist(), strict=True))
        seen += keys
        for i in range(0, len(keys), 100):
            token, row = table[keys[i]]
            assert token == stream.origin.token[i]
            torch.testing.assert_close(x[i], row, rtol=2e-2, atol=2e-2)
    assert sorted(seen) == sorted(table)


def test_a_batch_that_is_kept_keeps_nothing_else(store, text):
    live = LiveActivations.of(small.model(), text, CONFIG, pool_rows=8000)
    for stream in (store.stream([SITE], 256, epochs=1, origin=True), live.stream([SITE], 256, epochs=1)):
        for batch in stream:
            origin = stream.origin
            for x in (*batch.values(), origin.doc, origin.pos, origin.token):
                assert x.untyped_storage().nbytes() == x.nbytes
