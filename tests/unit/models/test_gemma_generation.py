"""Generation: with a cache as without, alone as in a batch, plain as transformers does it, and with
interventions."""

import pytest
import torch

from gemscope.core.errors import ContextLengthError, InputError
from gemscope.models.freeze import FreezeNorms, FreezePatterns
from gemscope.models.gemma import Gemma
from gemscope.models.generation import Generation
from gemscope.models.interventions import Ablate, Add, Edit, Intervention, ProjectOut, Replace, Scale
from unit.models.tiny_gemma import KINDS, TEXTS, Kind, gemma

NEW = 8


def _items(g: Gemma) -> list:
    return [g.tokens(text) for text in TEXTS]


def _ids(generations: list[Generation]) -> list[list[int]]:
    return [generation.ids.tolist() for generation in generations]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_with_and_without_cache_alone_and_in_a_batch_is_the_same(kind: Kind) -> None:
    g = gemma(kind)
    together = _ids(g.generate(_items(g), max_new_tokens=NEW))
    assert max(map(len, together)) == NEW > g.shape.sliding_window
    assert len({token for ids in together for token in ids}) > 5
    assert together == _ids(g.generate(_items(g), max_new_tokens=NEW, cache=False))
    assert together == [_ids(g.generate(item, max_new_tokens=NEW))[0] for item in _items(g)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_transformers_own_generate(kind: Kind) -> None:
    g = gemma(kind)
    tokens = g.tokens(TEXTS[0])
    ids = tokens.ids[None]
    theirs = g.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=[1, 106]
    )[0, len(tokens) :]
    ours = g.generate(tokens, max_new_tokens=NEW)[0].ids
    assert ours.tolist() == [token for token in theirs.tolist() if token not in (1, 106)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_new_token_is_the_likeliest_after_the_tokens_before_it(kind: Kind) -> None:
    g = gemma(kind)
    for item in g.generate(_items(g), max_new_tokens=NEW):
        n = len(item.prompt)
        logits = g.logits(item.tokens)[0]
        assert logits[n - 1 : -1].argmax(-1).tolist() == item.ids.tolist()
        assert item.tokens.text == item.prompt.text + item.text
        assert item.tokens.ids.tolist() == [*item.prompt.ids.tolist(), *item.ids.tolist()]
        assert item.text == g.tokenizer.decode(item.ids)


def _interventions(g: Gemma) -> dict[str, list[Intervention]]:
    v = torch.randn(24, generator=torch.Generator().manual_seed(5))
    batch = g.batch(_items(g), "left")
    reference = g.capture(batch, [*g.every_layer("pattern"), *FreezeNorms.sites(4)])
    whole = torch.randn(*batch.ids.shape, 24, generator=torch.Generator().manual_seed(6))
    return {
        "steer everywhere": [Add("resid_post.1", v, 3.0)],
        "steer the prompt": [Add("resid_post.1", v, 3.0, steps="prefill")],
        "steer new tokens": [Add("resid_post.1", v, 3.0, steps="new")],
        "steer steps": [Add("resid_mid.2", v, 3.0, steps=[0, 2, 3])],
        "last": [Add("resid_post.1", v, 3.0, positions="last")],
        "content": [Scale("mlp_out.1", -2.0, positions="content")],
        "indices": [Ablate("mlp_out.0", positions=[1, -1, 17])],
        "slice": [ProjectOut("resid_pre.2", v, positions=slice(3, None))],
        "mask": [Scale("z.1", -3.0, positions=batch.mask.clone(), heads=[1, 2])],
        "whole prompt": [Replace("resid_post.0", whole)],
        "pattern": [Ablate("pattern.2", heads=[0, 3]), Scale("pattern.0", 0.3, positions="last")],
        "frozen": [FreezePatterns(reference), FreezeNorms(reference)],
        "first key": [Edit("pattern.0", lambda p: torch.cat([0 * p[..., :6], p[..., 6:]], -1))],
    }


@pytest.mark.parametrize("kind", ["gemma3", "gemma2"])
@pytest.mark.parametrize("name", list(_interventions(gemma())))
def test_interventions_act_the_same_with_and_without_cache(kind: Kind, name: str) -> None:
    g = gemma(kind)
    edits, batch = _interventions(g)[name], g.batch(_items(g), "left")
    cached = g.generate(batch, max_new_tokens=NEW, interventions=edits)
    assert _ids(cached) == _ids(g.generate(batch, max_new_tokens=NEW, interventions=edits, cache=False))
    if name != "frozen":
        assert _ids(cached) != _ids(g.generate(batch, max_new_tokens=NEW))


def test_steps_are_those_at_which_a_token_is_first_read() -> None:
    g = gemma()
    seen: list[tuple[int, int]] = []
    prompt = g.tokens(TEXTS[1])

    def note(x: torch.Tensor) -> torch.Tensor:
        seen.append((x.shape[1], len(seen)))
        return x

    g.generate(prompt, max_new_tokens=4, interventions=[Edit("resid_post.0", note, steps="new")])
    assert seen == [(1, 0), (1, 1), (1, 2)]


def test_it_stops_at_end_of_text_and_end_of_turn_each_item_by_itself() -> None:
    g = gemma()
    rows = g.unembedding()
    for stop in (1, 106):
        stop_now = 1e3 * rows[stop]
        ends = [Replace("final_norm", stop_now, steps=[3])]
        found = g.generate(_items(g), max_new_tokens=NEW, interventions=ends)
        assert [item.finish for item in found] == ["stop"] * 3
        plain = _ids(g.generate(_items(g), max_new_tokens=3))
        assert _ids(found) == plain
    mask = torch.zeros(3, max(map(len, _items(g))), dtype=torch.bool)
    mask[1, -1] = True
    one = [Replace("final_norm", 1e3 * rows[106], positions=mask)]
    found = g.generate(_items(g), max_new_tokens=NEW, interventions=one)
    assert [item.finish for item in found] == ["length", "stop", "length"]
    assert (found[1].text, found[1].ids.tolist()) == ("", [])
    assert found[1].tokens.text == TEXTS[1]
    assert _ids([found[0], found[2]]) == _ids(g.generate([_items(g)[0], _items(g)[2]], max_new_tokens=NEW))


def test_the_configured_end_tokens_count_too() -> None:
    g = gemma()
    assert g.stop_ids == {1, 106}
    g.model.generation_config.eos_token_id = [1, 300]
    assert g.stop_ids == {1, 106, 300}


def test_sampling_depends_on_the_seed_and_the_item_not_on_the_batch() -> None:
    g = gemma()
    first = g.generate(_items(g), max_new_tokens=NEW, temperature=1.5, seed=7)
    assert _ids(first) == _ids(g.generate(_items(g), max_new_tokens=NEW, temperature=1.5, seed=7))
    assert _ids(first) != _ids(g.generate(_items(g), max_new_tokens=NEW, temperature=1.5, seed=8))
    alone = g.generate(_items(g)[2], max_new_tokens=NEW, temperature=1.5, seed=9)
    assert _ids(alone)[0] == _ids(first)[2]
    torch.manual_seed(0)
    unseeded = _ids(g.generate(_items(g), max_new_tokens=NEW, temperature=1.5))
    torch.manual_seed(0)
    assert unseeded == _ids(g.generate(_items(g), max_new_tokens=NEW, temperature=1.5))
    cold = g.generate(_items(g), max_new_tokens=NEW, temperature=1e-4, seed=1)
    assert _ids(cold) == _ids(g.generate(_items(g), max_new_tokens=NEW))


def test_samples_follow_the_softmax_of_the_logits() -> None:
    g = gemma()
    prompt = g.tokens("hello world")
    chances = torch.softmax(g.logits(prompt)[0, -1] / 0.2, -1)
    n = 300
    drawn = g.generate([prompt] * n, max_new_tokens=1, temperature=0.2, seed=0)
    ids = [item.ids.tolist() for item in drawn]
    top = int(chances.argmax())
    share, p = sum(i == [top] for i in ids) / n, float(chances[top])
    assert 0.05 < p < 0.95
    assert abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_stream_gives_the_same_tokens_one_by_one() -> None:
    g = gemma()
    prompt = g.tokens(TEXTS[0])
    for options in ({}, {"temperature": 1.2, "seed": 3}):
        whole = g.generate(prompt, max_new_tokens=NEW, **options)[0]
        assert list(g.stream(prompt, max_new_tokens=NEW, **options)) == whole.ids.tolist()
    ends = [Replace("final_norm", 1e3 * g.unembedding()[106], steps=[2])]
    assert len(list(g.stream(prompt, max_new_tokens=NEW, interventions=ends))) == 2


def test_what_does_not_fit_is_refused() -> None:
    g = gemma()
    prompt = g.tokens("hello world")
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        g.generate(prompt, max_new_tokens=0)
    with pytest.raises(InputError, match="temperature -1"):
        g.generate(prompt, max_new_tokens=1, temperature=-1.0)
    with pytest.raises(ContextLengthError, match="3 tokens and 126 new"):
        g.generate(prompt, max_new_tokens=126)
    assert len(g.generate(prompt, max_new_tokens=125, cache=True)) == 1
