"""The lens on the built-in model, where the truth is known: a capital is read off the name of its country."""

import pytest
import torch

from gemscope.lens.difference import attend_edit
from gemscope.lens.direct import attribute
from gemscope.lens.logit_lens import logit_lens
from gemscope.microworld.concepts import COUNTRIES
from gemscope.models.gemma import Gemma
from gemscope.models.interventions import Ablate

FACTS = [(c.name, c.capital) for c in COUNTRIES[:12]]


@pytest.fixture(scope="module")
def gemma():
    return Gemma.load("microworld-it", check=False)


def test_the_head_that_writes_a_capital_reads_the_country_and_without_it_the_capital_is_lost(gemma):
    lost = 0
    for (country, capital), (_, other) in zip(FACTS, [*FACTS[1:], FACTS[0]], strict=True):
        text = f"The capital of {country} is"
        found = attribute(gemma, text, target=" " + capital, other=" " + other)
        assert found.logit > 0
        assert found.logit == pytest.approx(sum(value for _, value in found.components), abs=1e-9)
        assert abs(found.rounding) < 1e-4
        layer, head = divmod(int(found.attention.argmax()), found.attention.shape[1])
        ((key, _),) = found.read_from(layer, head, 1)
        start, stop = found.tokens.offsets[key]
        assert found.tokens.text[start:stop].strip() in country
        without = gemma.logits(found.tokens, interventions=[Ablate(f"z.{layer}", heads=[head], positions="last")])
        lost += int(without[0, -1].argmax()) != found.target.token
    assert lost >= 0.75 * len(FACTS)


def test_the_capital_emerges_before_the_last_layer_and_stays(gemma):
    for country, capital in FACTS:
        found = logit_lens(gemma, f"The capital of {country} is", target=" " + capital)
        assert found.emerges_at(-1) != "never"
        assert float(found.target_prob[-1, -1]) > 0.9


def test_another_country_moves_nothing_before_it_and_turns_the_effect_of_reading_it(gemma):
    moved = attend_edit(gemma, "The capital of France is", "France=Japan", null_samples=0)
    assert bool((moved.difference[:, :, : moved.alignment.changed] == 0).all())
    assert torch.allclose(moved.difference.sum(-1), torch.zeros(()), atol=1e-5)
    effect = attend_edit(
        gemma,
        "The capital of France is",
        "France=Japan",
        kind="effect",
        target=" Paris",
        other=" Tokyo",
        null_samples=0,
    )
    (most,) = effect.moved(1)
    assert most.key == effect.alignment.changed
    assert most.before > 0 > most.after
