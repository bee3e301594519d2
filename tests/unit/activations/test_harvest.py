"""Harvested rows against single, unpadded captures; which positions are rows."""

import pytest
import torch

from gemscope.activations.harvest import harvest
from gemscope.activations.positions import bucketed, content_mask
from gemscope.core.errors import InputError, SiteError
from gemscope.models.tokens import Role
from unit.models import tiny_gemma

TEXTS = [*tiny_gemma.TEXTS, "Paris", "we like the long words of the world today", "Lyon and Paris"]
CHAT = "<start_of_turn>user\nhello world<end_of_turn>\n<start_of_turn>model\nLyon<end_of_turn>\n"


@pytest.fixture(scope="module")
def model():
    return tiny_gemma.gemma("gemma3")


def documents(model):
    return [model.tokens(text) for text in [*TEXTS, CHAT]]


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_every_row_is_the_capture_of_its_document_alone(model, batch_tokens):
    items, sites = documents(model), ["resid_post.1", "mlp_act.3", "embed"]
    rows = harvest(model, items, sites, batch_tokens=batch_tokens, dtype=torch.float32)
    at = 0
    for number, item in enumerate(items):
        alone = model.capture(item, sites)
        for position in item.content_mask.nonzero()[:, 0].tolist():
            assert (rows.doc[at], rows.pos[at], rows.token[at]) == (number, position, item.ids[position])
            for site in sites:
                torch.testing.assert_close(rows[site][at], alone[site][0, position], rtol=1e-4, atol=1e-4)
            at += 1
    assert at == rows.rows


def test_special_template_and_padding_positions_are_no_rows(model):
    items = documents(model)
    rows = harvest(model, items, ["resid_post.0"])
    roles = [items[doc].roles[pos] for doc, pos in zip(rows.doc.tolist(), rows.pos.tolist(), strict=True)]
    assert set(roles) == {Role.CONTENT}
    assert rows.rows == sum(role is Role.CONTENT for item in items for role in item.roles)
    chat = rows.select(rows.doc == len(items) - 1)
    assert "".join(items[-1].pieces[pos] for pos in chat.pos.tolist()) == "hello▁worldLyon"
    assert "content" in rows.about["positions"]
    assert rows.about["documents"] == len(items)
    assert rows["resid_post.0"].dtype == torch.bfloat16


def test_the_content_mask_follows_the_padding_side(model):
    items = documents(model)
    for side in ("right", "left"):
        batch = model.batch(items, side=side)
        mask = content_mask(batch)
        for row, item in enumerate(items):
            assert mask[row][batch.mask[row]].tolist() == item.content_mask.tolist()
            assert not mask[row][~batch.mask[row]].any()


def test_batches_hold_every_document_once_and_little_padding(model):
    items = [model.tokens("the " * (1 + (7 * i) % 23)) for i in range(60)]
    seen, padding, total = [], 0, 0
    for chosen, batch in bucketed(model, items, 100):
        assert batch.ids.numel() <= 100
        assert [items[i] for i in chosen] == list(batch.items)
        seen += chosen
        padding, total = padding + int((~batch.mask).sum()), total + batch.mask.numel()
    assert sorted(seen) == list(range(60))
    assert padding / total < 0.1


def test_progress_counts_rows_up_to_all_of_them(model):
    calls = []
    rows = harvest(model, documents(model), ["resid_post.0"], batch_tokens=30, progress=lambda *now: calls.append(now))
    assert calls[-1] == (rows.rows, rows.rows)
    assert [c[0] for c in calls] == sorted({c[0] for c in calls})


def test_nothing_to_harvest_and_unknown_layers_are_refused(model):
    with pytest.raises(InputError, match="nothing to harvest"):
        harvest(model, [], ["resid_post.0"])
    with pytest.raises(InputError, match="nothing to harvest"):
        harvest(model, documents(model), [])
    with pytest.raises(SiteError, match="99"):
        harvest(model, documents(model), ["resid_post.99"])
