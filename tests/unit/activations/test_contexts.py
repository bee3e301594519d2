"""Batches of whole contexts: whose rows they hold, what the model was given for them, and going on at any place."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from gemscope.activations.contexts import FINAL, LiveContexts
from gemscope.activations.order import Position
from gemscope.activations.sources import Documents
from gemscope.activations.streaming import LiveActivations
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.models.tokens import Tokens
from gemscope.training.data import SeekableSource
from unit.activations import small

SITES = [Site("resid_post", 2), Site("mlp_act", 1)]
SIZE = 60


def texts_for(context: int) -> Documents:
    """What is read as it is: chats are not cut, for a part of one does not say whose its first tokens are."""
    return Documents(tuple(one for one in small.corpus().items[:60] if isinstance(one, str) or context > 16))


def source(context: int = 16, **changes) -> LiveContexts:
    config = replace(small.CONFIG, context=context, **changes)
    return LiveContexts(LiveActivations.of(small.model(), texts_for(context), config, pool_rows=200))


def given_texts(stream) -> list[Tokens]:
    """The contexts of the last batch, put together again from the rectangles that the model was given."""
    return [
        small.model().tokens_of(ids[mask])
        for one in stream.given
        for ids, mask in zip(one.batch.ids, one.batch.mask, strict=True)
    ]


@pytest.mark.parametrize("context", [16, 96])
def test_a_batch_is_all_content_rows_of_its_contexts_in_order(context):
    """Against a pass over each context alone, which ends where the batch is full."""
    stream = source(context).stream(SITES, SIZE, 1)
    for _ in range(3):
        batch, texts = next(stream), given_texts(stream)
        assert all(len(text) <= context for text in texts)
        assert all(text.ids[0] == small.model().vocabulary.bos_id for text in texts)
        alone = [small.model().capture(text, [*SITES, FINAL]) for text in texts]
        for site in SITES:
            assert len(batch[site]) == SIZE
            assert_close(
                batch[site], [seen[site][0][text.content_mask] for seen, text in zip(alone, texts, strict=True)]
            )
        final = torch.cat([one.final for one in stream.given])
        assert_close(final, [seen[FINAL][0][text.content_mask] for seen, text in zip(alone, texts, strict=True)])


def assert_close(found, expected):
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("context", [16, 96])
def test_every_context_comes_once_an_epoch_and_only_the_last_of_a_batch_is_cut(context):
    """The contexts a harvest would make, up to their last content token, in another order every epoch."""
    data, orders = source(context), []
    for epoch in range(2):
        left = [one for text in texts_for(context).items for one in contexts_of(text, context)]
        stream = data.stream(SITES[:1], SIZE, 1, start=Position(epoch), epochs=1)
        sizes, cut, whole = [], [], []
        for batch in stream:
            sizes.append(len(batch[SITES[0]]))
            for ids in [tuple(text.ids.tolist()) for text in given_texts(stream)]:
                if ids in left:
                    left.remove(ids)
                    whole.append(ids)
                else:
                    cut.append(ids)
        assert sizes == [*(len(sizes) - 1) * [SIZE], sizes[-1]]
        assert len(sizes) >= len(cut) == len(left) > 0
        assert all(any(one[: len(ids)] == ids for one in left) for ids in cut)
        orders.append(whole)
    assert orders[0] != orders[1]


def contexts_of(text, context) -> list[tuple[int, ...]]:
    """Those of a document of the corpus: so many tokens, then one less behind a <bos> at a time."""
    model = small.model()
    try:
        ids = (model.tokens(text) if isinstance(text, str) else model.chat(text, answer=False)).ids.tolist()
    except InputError:
        return []
    rest = range(context, len(ids), context - 1)
    cuts = [ids[:context], *([ids[0], *ids[at : at + context - 1]] for at in rest)]
    content = [model.tokens_of(one).content_mask for one in cuts]
    return [tuple(one[: int(where.nonzero()[-1]) + 1]) for one, where in zip(cuts, content, strict=True) if where.any()]


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_of_contexts_goes_on_at_any_place(packing):
    data = source(packing=packing)
    whole = data.stream(SITES, SIZE, 2, epochs=2)
    batches, places = [], [whole.position]
    for batch in whole:
        batches.append(batch)
        places.append(Position.of_dict(whole.position.as_dict()))
    assert places[-1] == Position(2)
    for at in (1, len(batches) // 2 - 1, len(batches) - 1):
        stream = data.stream(SITES, SIZE, 2, start=places[at], epochs=2 - places[at].epoch)
        rest = list(islice(stream, 3))
        assert len(rest) == min(3, len(batches) - at)
        assert all(torch.equal(a[s], b[s]) for a, b in zip(rest, batches[at:], strict=False) for s in SITES)
    assert not torch.equal(next(data.stream(SITES, SIZE, 3))[SITES[0]], batches[0][SITES[0]])


def test_its_split_is_by_document():
    train, held = source().split(0.3, seed=4)
    same, _ = source().live.split(0.3, seed=4)
    stream = held.stream(SITES[:1], 50, epochs=1)
    held_documents = {doc for _ in stream for doc in stream.origin.doc.tolist()}
    assert held_documents
    assert not any(train.live.wanted(doc) for doc in held_documents)
    assert train.rows == same.rows
    assert isinstance(train, SeekableSource)


def test_what_it_cannot_do_is_said():
    with pytest.raises(InputError, match="drop_outliers"):
        source(drop_outliers=True)
    with pytest.raises(InputError, match="below 1"):
        source().stream(SITES, 0)
    with pytest.raises(InputError, match="another stream"):
        next(source().stream(SITES, 8, start=Position(0, 0, 10_000)))
    with pytest.raises(InputError, match="no activations of"):
        source().stream(["resid_post.1"], 8)
