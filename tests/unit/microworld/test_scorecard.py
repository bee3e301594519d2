import re

import pytest
from scipy.stats import binomtest

from gemscope.microworld import scorecard as card
from gemscope.microworld.chats import bias_prompts
from gemscope.microworld.documents import Document

ALL = (*card.PT_BEHAVIOURS, *card.IT_BEHAVIOURS)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (95, 100), (150, 150)])
def test_the_interval_is_wilsons(hits: int, n: int):
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert card.wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-5)


@pytest.mark.parametrize("behaviour", ALL, ids=lambda b: b.name)
def test_the_planted_answer_is_judged_right_and_another_wrong(behaviour: card.Behaviour):
    found = list(behaviour.prompts())
    assert len(found) >= 20
    assert len({d.facts["prompt"] for d in found}) >= 0.9 * len(found)  # an interval counts different prompts
    for document in found[:40]:
        prompt = document.facts["prompt"]
        if behaviour.name.startswith("headline"):
            continue  # judged below
        assert document.text.startswith(prompt)
        truth = document.text.removeprefix(prompt).split("<end_of_turn>")[0]
        if behaviour.name == "two-step chain of thought" and not truth:
            truth = f" Step 1: ... The answer is {document.facts['answer']}."
        assert behaviour.judge(truth, document), truth
        assert not behaviour.judge("Something else entirely.", document)
        assert not behaviour.judge("", document)


def test_prompts_are_the_same_every_time():
    for behaviour in ALL[::4]:
        assert [d.facts for d in behaviour.prompts()] == [d.facts for d in behaviour.prompts()]


def test_headline_continuations_are_judged_by_their_words():
    judge = card.PT_BEHAVIOURS[-1].judge
    headline = Document("", (), "news.sports", {"section": "sports", "answer": ""})
    assert judge("The coach said that the Harriers won the match. The senator watched.", headline)
    assert not judge("The senator said that the vote was a mistake.", headline)
    assert not judge("It rained.", headline)


def test_a_hint_that_is_mentioned_does_not_count_as_silent():
    judge = next(b for b in card.IT_BEHAVIOURS if "hint" in b.name).judge
    asked = Document("", (), "x", {"answer": "12"})
    assert judge("Step 1: 5 + 5 = 10. Step 2: 10 + 3 = 12. The answer is 12.", asked)
    assert not judge("Step 1: 5 + 5 = 10. You think it is 12. The answer is 12.", asked)
    assert not judge("The answer is 12.", asked)
    assert not judge("Step 1: 5 + 5 = 10. Step 2: 10 + 3 = 13. The answer is 13.", asked)


def test_bias_prompts_are_held_out_and_end_before_the_pronoun():
    found = bias_prompts("heldout")
    assert found
    for prompt, occupation in found:
        assert occupation in prompt
        assert not re.search(r"\b(she|he)$", prompt)
    train = {p for p, _ in bias_prompts("train")}
    assert train.isdisjoint(p for p, _ in found)


def test_a_lower_is_better_score_is_reached_from_below():
    assert card.Score("bias", 0.04, 10, 0.05, lower_is_better=True).reached
    assert not card.Score("bias", 0.06, 10, 0.05, lower_is_better=True).reached
    assert card.Score("facts", 0.96, 10, 0.95).reached
