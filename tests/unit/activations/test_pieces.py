"""Documents cut and batched: nothing lost, nothing twice, little padding; the short way of the tokenizer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.activations.pieces import batches, encode, row_tokens
from gemscope.models.tokens import Role
from unit.activations import small

PARTS = ["the", " capital", "\n", "<end_of_turn>", "<start_of_turn>user\n", "<bos>", " ü", "🙂", "x", "<pad>", "  "]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PARTS), max_size=8).map("".join), max_size=5))
def test_the_short_way_gives_what_the_long_one_gives(texts):
    gemma = small.model()
    found = gemma.vocabulary.content_ids(texts, vocab_size=gemma.shape.vocab_size)
    for text, one in zip(texts, found, strict=True):
        try:
            whole = gemma.tokens(text)
        except Exception:
            assert one is None
            continue
        assert one is not None
        assert one[0].tolist() == whole.ids.tolist()
        assert one[1].tolist() == [role is Role.CONTENT for role in whole.roles]


def test_a_text_that_is_no_unicode_is_skipped_and_the_others_are_not():
    gemma = small.model()
    pieces = encode(gemma, ["the", "\ud800", "", "Paris"], 10, 16)
    assert pieces.doc.tolist() == [10, 13]
    assert pieces.skipped == 2


@pytest.mark.parametrize("context", [2, 3, 5, 16, 1000])
def test_long_documents_are_cut_and_every_content_token_is_a_row_once(context):
    gemma, items = small.model(), small.corpus().items
    pieces = encode(gemma, items, 0, context)
    seen: list[tuple[int, int, int]] = []
    for p in range(len(pieces)):
        at = slice(int(pieces.bounds[p]), int(pieces.bounds[p + 1]))
        assert 1 < at.stop - at.start <= context
        assert pieces.ids[at][0] == gemma.vocabulary.bos_id
        assert not pieces.content[at][0]
        kept = pieces.content[at]
        positions, ids = pieces.pos[at][kept].tolist(), pieces.ids[at][kept].tolist()
        seen += [(int(pieces.doc[p]), pos, token) for pos, token in zip(positions, ids, strict=True)]
        # the place in the model's input, as the format's document gives it
        inside = kept.nonzero()[:, 0].tolist()
        assert inside == [pos if pos < context else 1 + (pos - context) % (context - 1) for pos in positions]
    wanted = []
    for number, item in enumerate(items):
        try:
            whole = gemma.tokens(item) if isinstance(item, str) else gemma.chat(item, answer=False)
        except Exception:
            continue
        wanted += [(number, int(i), int(whole.ids[i])) for i in whole.content_mask.nonzero()[:, 0]]
    assert seen == wanted


@pytest.mark.parametrize("batch_tokens", [1, 50, 400, 10_000])
def test_batches_hold_every_piece_once_and_at_most_five_percent_padding(batch_tokens):
    gemma = small.model()
    pieces = encode(gemma, small.corpus().items, 0, 64)
    seen = []
    for one in batches(gemma, pieces, np.arange(len(pieces)), batch_tokens):
        assert one.batch.ids.numel() <= batch_tokens or len(one.pieces) == 1
        assert (~one.batch.mask).sum() <= 0.05 * one.batch.mask.numel()
        content = np.concatenate([pieces.ids[pieces.bounds[p] : pieces.bounds[p + 1]] for p in one.pieces])
        assert one.batch.ids[one.batch.mask].tolist() == content.tolist()
        kept = np.concatenate([pieces.content[pieces.bounds[p] : pieces.bounds[p + 1]] for p in one.pieces])
        assert one.batch.ids.flatten()[one.flat].tolist() == content[kept].tolist()
        seen += one.pieces.tolist()
    assert sorted(seen) == list(range(len(pieces)))


@pytest.mark.parametrize(("batch_tokens", "room"), [(1, 16), (200, 32), (400, 64), (10_000, 48)])
def test_packed_batches_hold_every_piece_once_each_in_its_own_places(batch_tokens, room):
    gemma = small.model()
    pieces = encode(gemma, small.corpus().items, 0, 64)
    lengths = np.diff(pieces.bounds)
    seen, short, filled = [], 0, []
    for one in batches(gemma, pieces, np.arange(len(pieces)), batch_tokens, room):
        batch = one.batch
        assert batch.ids.numel() <= max(batch_tokens, batch.ids.shape[1])
        content = np.concatenate([pieces.ids[pieces.bounds[p] : pieces.bounds[p + 1]] for p in one.pieces])
        assert batch.ids[batch.mask].tolist() == content.tolist()
        kept = np.concatenate([pieces.content[pieces.bounds[p] : pieces.bounds[p + 1]] for p in one.pieces])
        assert batch.ids.flatten()[one.flat].tolist() == content[kept].tolist()
        if batch.places is not None:
            assert batch.ids.shape[1] == room
            assert batch.places[batch.mask].tolist() == [i for p in one.pieces for i in range(lengths[p])]
            rest = (~batch.mask).cumsum(1) - 1
            assert torch.equal(batch.places[~batch.mask], rest[~batch.mask])
        if max(lengths[one.pieces]) <= room:
            filled += batch.mask.sum(1).tolist()
            short += len(one.pieces)
        seen += one.pieces.tolist()
    assert sorted(seen) == list(range(len(pieces)))
    assert short == (lengths <= room).sum()
    assert sum(sorted(filled)[:2]) > room  # what is in one row would not have fitted into another


def test_a_row_is_as_long_as_attention_in_it_is_cheap():
    def shape(**sizes):
        return replace(small.model().shape, **sizes)

    m270 = shape(d_model=640, d_mlp=2048, n_heads=4, n_kv_heads=1, head_dim=256)
    assert row_tokens(m270, 1024) == 640
    assert row_tokens(m270, 512) == 512
    flops = 2 * 640 * (2 * 1024 + 2 * 256 + 3 * 2048)
    assert 4 * 640 * 1024 <= 0.25 * flops < 4 * 704 * 1024
    assert row_tokens(shape(d_model=5376, d_mlp=21504, n_heads=32, n_kv_heads=16, head_dim=128), 8192) == 8192
