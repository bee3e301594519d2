"""Padding, prefixes and mixed lengths change nothing at the tokens themselves."""

import pytest
import torch

from gemscope.core.errors import SiteError
from gemscope.core.sites import Site
from gemscope.models import forward
from gemscope.models.tokens import Batch, Tokens
from unit.models.tiny_gemma import KINDS, TEXTS, Kind, gemma

NAMES = ("resid_pre", "q", "z", "resid_mid", "mlp_act", "mlp_out", "resid_post", "pattern")


def _sites(names: tuple[str, ...] = NAMES) -> list[Site]:
    return [Site(name, layer) for layer in range(4) for name in names]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side_gives_the_activations_of_single_runs(kind: Kind, side: str) -> None:
    g = gemma(kind)
    items = [g.tokens(text) for text in TEXTS]
    assert min(map(len, items)) < g.shape.sliding_window < max(map(len, items))
    together = g.capture(g.batch(items, side), _sites(), logits=True)
    for i, item in enumerate(items):
        alone = g.capture(item, _sites(), logits=True)
        for site in _sites():
            got = together.item(i, site)
            assert got.shape == alone[site][0].shape
            assert torch.allclose(got, alone[site][0], atol=2e-5), (site, i)
        start = int(together.batch.first[i])
        logits = together.logits[i, start : start + len(item)]
        assert torch.allclose(logits, alone.logits[0], atol=1e-4)
    assert all(bool(value.isfinite().all()) for value in together.acts.values())


@pytest.mark.parametrize("side", ["right", "left"])
def test_fused_attention_under_padding_too(side: str) -> None:
    g = gemma()
    items = [g.tokens(text) for text in TEXTS]
    together = g.capture(g.batch(items, side), ["resid_post.3"])
    for i, item in enumerate(items):
        alone = g.capture(item, ["resid_post.3"])["resid_post.3"][0]
        assert torch.allclose(together.item(i, "resid_post.3"), alone, atol=2e-5)
    assert bool(together["resid_post.3"].isfinite().all())


def test_right_padding_needs_no_mask_so_the_fused_causal_kernel_still_runs() -> None:
    g = gemma(sliding_window=64)
    masks: list[object] = []
    g.decoder.layer(2).get_submodule("self_attn").register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    items = [g.tokens(text) for text in TEXTS]
    g.capture(items, ["resid_post.2"])
    assert masks == [None]


def test_positions_are_counted_from_each_texts_first_token() -> None:
    """Rotary embeddings see differences only, so nothing but precision would show a shift."""
    g = gemma()
    seen: list[list[list[int]]] = []
    g.decoder.layer(0).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"].tolist()), with_kwargs=True
    )
    items = [g.tokens("hello world and"), g.tokens("hello")]
    g.capture(g.batch(items, "left"), ["resid_post.0"])
    g.generate(items, max_new_tokens=2)
    prompt = [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert seen == [prompt, prompt, [[4], [2]]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_has_the_same_activations_as_within_the_whole_text(kind: Kind) -> None:
    g = gemma(kind)
    whole = g.tokens(TEXTS[0])
    full = g.capture(whole, _sites())
    for n in (1, 4, 7):
        part = g.capture(g.tokens_of(whole.ids[:n]), _sites())
        for site in _sites():
            truth = full[site][:, :, :n, :n] if site.name == "pattern" else full[site][:, :n]
            assert torch.allclose(part[site], truth, atol=2e-5), site


@pytest.mark.parametrize("kind", KINDS)
def test_a_local_layer_forgets_what_left_its_window(kind: Kind) -> None:
    """Changing the first token changes nothing in layer 0 from position window on."""
    g = gemma(kind)
    one, other = g.tokens("hello world and we like words"), g.tokens("world world and we like words")
    a, b = (g.capture(t, ["attn_out.0", "attn_out.2"]) for t in (one, other))
    changed = (a["attn_out.0"] - b["attn_out.0"]).abs().amax(-1)[0] > 1e-6
    window = g.shape.sliding_window
    assert changed.tolist() == [1 <= i < 1 + window for i in range(len(one))]
    assert bool(((a["attn_out.2"] - b["attn_out.2"]).abs().amax(-1)[0, 1:] > 1e-6).all())


def test_rows_are_the_tokens_of_all_items_in_order() -> None:
    g = gemma()
    items = [g.tokens(text) for text in TEXTS]
    for side in ("right", "left"):
        capture = g.capture(g.batch(items, side), ["resid_post.1", "pattern.0"])
        truth = torch.cat([capture.item(i, "resid_post.1") for i in range(3)])
        assert torch.equal(capture.rows("resid_post.1"), truth)
        with pytest.raises(SiteError):
            capture.rows("pattern.0")
        assert "resid_post.1" in capture
        assert "resid_post.2" not in capture


def test_one_token_sequences_list_and_batch_are_the_same_input() -> None:
    g = gemma()
    tokens = g.tokens("hello world")
    runs = [
        g.logits(tokens),
        g.logits([tokens]),
        g.logits(g.batch([tokens])),
        g.logits(g.batch([tokens], "left")),
    ]
    assert all(torch.equal(runs[0], run) for run in runs)


def test_bf16_stays_bf16() -> None:
    g = gemma(dtype=torch.bfloat16, check=True)
    capture = g.capture(g.tokens(TEXTS[0]), ["resid_post.3", "pattern.0"], logits=True)
    assert {v.dtype for v in (*capture.acts.values(), capture.logits)} == {torch.bfloat16}
    assert g.final_gain().dtype == torch.float32


def _packed(g, rows: list[list[Tokens]], restart: bool = True) -> Batch:
    """Several texts a row, one after the other, as ``activations.pieces`` lays them out."""
    width = max(sum(map(len, row)) for row in rows)
    ids, places = torch.full((len(rows), width), g.vocabulary.pad_id), torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        flat = torch.cat([item.ids for item in row])
        ids[i, : len(flat)], mask[i, : len(flat)] = flat, True
        where = [torch.arange(len(item)) for item in row] + [torch.arange(width - len(flat))]
        places[i] = torch.cat(where) if restart else torch.arange(width)
    return Batch(ids, mask, (), "right", places)


def _largest_difference(g, rows: list[list[Tokens]], batch: Batch) -> float:
    together, largest = g.capture(batch, _sites(NAMES[:-1])), 0.0
    for i, row in enumerate(rows):
        at = 0
        for item in row:
            alone = g.capture(item, _sites(NAMES[:-1]))
            for site in _sites(NAMES[:-1]):
                found = together[site][i, at : at + len(item)]
                largest = max(largest, (found - alone[site][0]).abs().max().item())
            at += len(item)
    return largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_texts_that_share_a_row_have_the_activations_of_single_runs(kind: Kind, attention: str, monkeypatch) -> None:
    if kind == "gemma2" and attention == "sdpa":
        pytest.skip("no fused attention with capped scores")
    g = gemma(kind)
    g.decoder.config._attn_implementation = attention
    one, two, three = (g.tokens(text) for text in TEXTS)
    short = g.tokens_of([2])
    assert len(two) < g.shape.sliding_window < min(len(one), len(three))
    rows = [[one, two, three], [short, short, one, three], [three], [two, two, two, short]]
    assert _largest_difference(g, rows, _packed(g, rows)) < 1e-4
    # what would be wrong is seen: positions that run on (and no blocks with them), then no blocks alone
    assert _largest_difference(g, rows, _packed(g, rows, restart=False)) > 0.1
    batch = _packed(g, rows)
    # a mask of padding is no reason for transformers to look for blocks
    inputs = {"input_ids": batch.ids, "position_ids": batch.places, "attention_mask": torch.ones_like(batch.ids)}
    usual = forward._inputs
    monkeypatch.setattr(forward, "_inputs", lambda this: inputs if this.moment.batch is batch else usual(this))
    assert _largest_difference(g, rows, batch) > 0.1


def test_patterns_of_texts_that_share_a_row_are_blocks() -> None:
    g = gemma()
    items = [g.tokens(text) for text in TEXTS[:2]]
    found = g.capture(_packed(g, [items]), _sites(("pattern",)))
    cut = len(items[0])
    for layer in range(4):
        pattern = found[Site("pattern", layer)][0]
        assert not pattern[:, cut:, :cut].any()
        assert torch.allclose(
            pattern[:, cut:, cut:],
            g.capture(items[1], [Site("pattern", layer)]).acts[Site("pattern", layer)][0],
            atol=1e-5,
        )
