"""Planted heads are found first; every metric against loops over the pattern."""

import math

import pytest
import torch

from gemscope.core.errors import InputError
from gemscope.lens import heads
from gemscope.lens.attention import attend
from gemscope.lens.heads import METRICS, Pair, after_earlier, find_heads, repeated
from unit.lens.planted import INDUCTION, PREVIOUS, planted
from unit.models.tiny_gemma import gemma

TEXT = "the capital of France is Paris and the capital of Lyon is Paris today"


@pytest.fixture(scope="module")
def model():
    return planted()


@pytest.fixture(scope="module")
def tiny():
    return gemma()


def test_planted_heads_are_found_first_on_words_read_twice(model):
    scores = find_heads(model)
    for metric, head in (("previous", PREVIOUS), ("induction", INDUCTION)):
        first, second = scores.ranked(metric)[:2]
        assert first[:2] == head
        assert first[2] > 0.9
        assert second[2] < 0.5


def test_planted_heads_are_found_first_in_a_text(model):
    scores = find_heads(model, TEXT)
    assert scores.ranked("previous")[0][:2] == PREVIOUS
    assert scores.ranked("induction")[0][:2] == INDUCTION


def test_without_its_previous_token_head_the_induction_head_is_gone(model):
    broken = planted()
    broken.decoder.layer(0).get_submodule("self_attn.o_proj").get_parameter("weight").zero_()
    assert dict((head[:2], head[2]) for head in find_heads(broken).ranked("induction"))[INDUCTION] < 0.5


def _by_hand(metric: str, row: list[float], query: int, ids: list[int]) -> float | None:
    if metric == "induction":
        keys = [k for k in range(1, query) if ids[k - 1] == ids[query]]
        return sum(row[k] for k in keys) if keys else None
    return {
        "previous": row[query - 1],
        "first": row[0],
        "self": row[query],
        "entropy": -sum(p * math.log(p) for p in row if p > 0),
        "distance": sum(p * (query - k) for k, p in enumerate(row)),
    }[metric]


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_is_what_it_says(tiny, metric):
    texts = [TEXT, "hello world and hello Lyon"]
    scores = find_heads(tiny, texts)
    found: dict[tuple[int, int], list[float]] = {}
    for text in texts:
        maps = attend(tiny, text)
        ids = maps.tokens.ids.tolist()
        for layer, maps_of in enumerate(maps.values.double().tolist()):
            for head, rows in enumerate(maps_of):
                values = [_by_hand(metric, rows[q], q, ids) for q in range(1, len(ids))]
                found.setdefault((layer, head), []).extend(x for x in values if x is not None)
    assert scores.queries[scores.metrics.index(metric)] == len(found[0, 0])
    for layer, head, value in scores.ranked(metric):
        assert value == pytest.approx(sum(found[layer, head]) / len(found[layer, head]), abs=1e-5)


def test_induction_keys_follow_an_earlier_occurrence_and_never_the_query_itself():
    ids = torch.tensor([9, 5, 6, 5, 5])
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[3, 2] = True
    expected[4, 2] = True
    assert bool(after_earlier(ids)[4, 4]) is False
    assert torch.equal(after_earlier(ids), expected)


def test_a_pair_of_concepts(tiny):
    tokens = tiny.tokens(TEXT)
    city = torch.tensor([piece.strip("▁") in ("Paris", "Lyon") for piece in tokens.pieces])
    country = torch.tensor([piece.strip("▁") == "France" for piece in tokens.pieces])
    scores = find_heads(tiny, tokens, pairs=lambda _: [Pair("city→country", city, country)])
    values = attend(tiny, tokens).values
    queries = [q for q in range(len(tokens)) if city[q] and country[:q].any()]
    expected = values[:, :, queries][..., country].sum(-1).mean(-1)
    assert torch.allclose(scores.of("city→country"), expected, atol=1e-6)
    assert scores.queries[-1] == len(queries) == 3


def test_a_metric_without_queries_is_absent_not_zero(tiny):
    scores = find_heads(tiny, "hello world")
    assert scores.ranked("induction") == []
    assert "no such query" in str(scores)
    assert all(head["induction"] is None for head in scores.as_dict()["heads"])


def test_words_read_twice(tiny):
    items = repeated(tiny, length=7, n=3, seed=1)
    for item in items:
        ids = item.ids.tolist()
        assert ids[0] == tiny.vocabulary.bos_id
        assert ids[1:8] == ids[8:]
        assert len(set(ids[1:8])) == 7
    assert [item.ids.tolist() for item in repeated(tiny, 7, 3, 1)] == [item.ids.tolist() for item in items]


def test_a_vocabulary_with_too_few_words_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(heads, "words", lambda _: [500, 501])
    with pytest.raises(InputError, match="2 words where 3 different ones are needed"):
        repeated(tiny, length=3)


def test_an_unknown_metric_names_the_metrics(tiny):
    with pytest.raises(InputError, match="use one of previous, induction"):
        find_heads(tiny, "hello world").of("nonsense")
