"""The shuffle, of a store and of a stream on the fly, against the statistics of a random permutation."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gemscope.activations.order import Reading
from gemscope.activations.plan import HarvestConfig
from gemscope.activations.sources import Documents
from gemscope.activations.store import Store
from gemscope.activations.streaming import LiveActivations
from unit.activations import shuffling, small

LIMIT = 5.0
SITE = "resid_post.0"
CONFIG = HarvestConfig((SITE,), context=64, bucket_rows=3000, unit_rows=2500, batch_tokens=2048)


@pytest.fixture(scope="module")
def text():
    """The worst order: all short texts first."""
    items = [item for item in small.corpus().items if isinstance(item, str) and item] * 12
    return Documents(tuple(sorted(items, key=lambda item: len(item.split()))))


@pytest.fixture(scope="module")
def store(tmp_path_factory, text):
    return Store.open(small.store(tmp_path_factory.mktemp("s") / "s", CONFIG, text))


def test_rows_of_a_bucket_lie_as_a_random_permutation_would_put_them(store):
    for shard in store.shards:
        doc = store.origin(shard.unit).doc.numpy()
        assert abs(shuffling.spread(doc)) < LIMIT
        assert abs(shuffling.neighbours(doc)) < LIMIT
        assert shuffling.spread(np.sort(doc)) > 10 * LIMIT
        assert shuffling.neighbours(np.sort(doc)) > 10 * LIMIT


def drawn(stream) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(documents, norms) of each batch."""
    docs, norms = [], []
    for batch in stream:
        docs.append(stream.origin.doc.numpy())
        norms.append(next(iter(batch.values())).float().norm(dim=1).numpy())
    return [x for x in docs if len(x) == len(docs[0])], [x for x in norms if len(x) == len(norms[0])]


def well_mixed(docs, norms, limit=LIMIT):
    return (
        abs(shuffling.batch_means([x.astype(float) for x in docs])) < limit
        and abs(shuffling.batch_means(norms)) < limit
        and abs(shuffling.neighbours(np.concatenate(docs))) < limit
    )


def test_batches_of_a_store_are_random_samples(store):
    for seed in range(3):
        assert well_mixed(*drawn(store.stream([SITE], 256, seed, epochs=1, origin=True)))


def test_batches_of_pools_smaller_than_the_store_are_nearly_random_samples(store):
    reading = Reading(block_rows=16, open_shards=8, pool_rows=4000)
    docs, norms = drawn(store.stream([SITE], 256, 0, epochs=1, origin=True, reading=reading))
    assert well_mixed(docs, norms, limit=2 * LIMIT)


def test_batches_on_the_fly_are_random_samples_too(text):
    live = LiveActivations.of(small.model(), text, CONFIG, pool_rows=4000)
    assert live.plan.units > 4
    docs, norms = drawn(live.stream([SITE], 256, 1, epochs=1))
    assert well_mixed(docs, norms, limit=2 * LIMIT)


def test_a_store_that_was_not_shuffled_fails(store, monkeypatch, tmp_path, text):
    class Unshuffled:
        def permutation(self, n):
            return np.arange(n)

    monkeypatch.setattr(np.random, "default_rng", lambda *_: Unshuffled())
    plain = Store.open(small.store(tmp_path / "s", CONFIG, text))
    doc = plain.origin(0).doc.numpy()
    assert shuffling.spread(doc) > 10 * LIMIT
    assert shuffling.neighbours(doc) > 10 * LIMIT
    docs, norms = drawn(plain.stream([SITE], 256, 0, epochs=1, origin=True))
    assert shuffling.batch_means([x.astype(float) for x in docs]) > 10 * LIMIT
    assert not well_mixed(docs, norms)
    assert not well_mixed(*drawn(LiveActivations.of(small.model(), text, CONFIG).stream([SITE], 256, epochs=1)))


def test_every_row_comes_once_and_belongs_to_its_token(store, text):
    live = LiveActivations.of(small.model(), text, replace(CONFIG, dtype="float32"), pool_rows=3000)
    table = {}
    for shard in store.shards:
        origin = store.origin(shard.unit)
        for row, key in enumerate(zip(origin.doc.tolist(), origin.pos.tolist(), strict=True)):
            table[key] = int(origin.token[row]), store.shard(SITE, shard.unit)[row].float()
    seen = []
    stream = live.stream([SITE], 500, epochs=1)
    for batch in stream:
        (x,) = batch.values()
        keys = list(zip(stream.origin.doc.tolist(), stream.origin.pos.tolist(), strict=True))
        seen += keys
        for i in range(0, len(keys), 50):
            token, row = table[keys[i]]
            assert token == stream.origin.token[i]
            torch.testing.assert_close(x[i], row, rtol=2e-2, atol=2e-2)
    assert sorted(seen) == sorted(table)
