"""Steering changes exactly what it says, where it says, and leaves the rest of the model as it is."""

import pytest
import torch

from gemscope.artifacts.config import DictionaryConfig, Loaded
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.features.steering import Steer, interventions, selection, steer
from gemscope.models.chat import Turn
from unit.dictionaries.zoo import random_dictionary
from unit.models.tiny_gemma import gemma

TEXT = "the capital of France is"


@pytest.fixture(scope="module")
def model():
    return gemma("gemma3")


def loaded(kind="sae", activation=None, n=4):
    given = () if activation is None else (activation,)
    one = random_dictionary(kind, *given, d_in=24, d_out=24, d_sae=10, n=n, dtype=torch.float32)
    if kind == "sae":
        reads = writes = Site("resid_post", 1)
    elif kind == "crosscoder":
        reads = writes = [Site("resid_post", layer) for layer in range(n)]
    elif kind == "clt":
        reads, writes = ([Site(s, layer) for layer in range(n)] for s in ("mlp_in", "mlp_out"))
    else:
        reads, writes = Site("mlp_in", 2), Site("mlp_out", 2)
    return {"d": Loaded(one, DictionaryConfig.of(one, reads, writes, model="tiny"))}


def test_add_adds_the_direction_at_the_chosen_positions_only(model):
    found = loaded()
    sae = found["d"].dictionary
    tokens = model.tokens(TEXT)
    site = Site("resid_post", 1)
    plain = model.capture(tokens, [site])[site][0]
    changed = model.capture(
        tokens, [site], interventions=interventions(found, [Steer("d", 3, "add", 2.0, 1.5)], [1, 4])
    )
    difference = changed[site][0] - plain
    expected = torch.zeros_like(plain)
    expected[[1, 4]] = 3.0 * sae.W_dec[3]
    torch.testing.assert_close(difference, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", [Activation("jumprelu"), Activation("topk", 4)])
def test_clamp_and_ablate_keep_the_error_term(model, activation):
    found = loaded(activation=activation)
    sae = found["d"].dictionary
    tokens, site = model.tokens(TEXT), Site("resid_post", 1)
    plain = model.capture(tokens, [site])[site][0]
    acts = sae.encode(plain)
    latent = int(acts[1:].sum(0).argmax())
    for mode, wanted in (("clamp", 6.0), ("ablate", 0.0)):
        changes = interventions(found, [Steer("d", latent, mode, 3.0, 2.0)], None)
        changed = model.capture(tokens, [site], interventions=changes)[site][0]
        expected = plain + (wanted - acts[:, latent])[:, None] * sae.W_dec[latent]
        torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["transcoder", "clt"])
def test_what_reads_elsewhere_is_steered_where_it_writes(model, kind):
    found = loaded(kind)
    one, config = found["d"].dictionary, found["d"].config
    tokens = model.tokens(TEXT)
    reads, writes = config.reads, config.writes
    plain = model.capture(tokens, [*reads, *writes])
    x = plain[reads[0]][0] if kind == "transcoder" else torch.stack([plain[s][0] for s in reads], dim=1)
    latent = 3 if kind == "transcoder" else 13
    act = one.encode(x).flatten(1)[:, latent]
    changed = model.capture(
        tokens, [*writes], interventions=interventions(found, [Steer("d", latent, "clamp", 2.0)], None)
    )
    first = writes[0] if kind == "transcoder" else writes[1]
    row = one.W_dec[latent] if kind == "transcoder" else one.W_dec[1][0, 3]
    expected = plain[first][0] + (2.0 - act)[:, None] * row
    torch.testing.assert_close(changed[first][0], expected, atol=1e-4, rtol=1e-4)
    if kind == "clt":
        assert torch.equal(changed[writes[0]], plain[writes[0]])


@pytest.mark.parametrize("chat", [False, True])
def test_greedy_with_strength_0_is_the_plain_model(model, chat):
    found = loaded()
    prompt = [Turn("user", "we like Paris")] if chat else TEXT
    done = steer(model, found, prompt, [Steer("d", 3, "add", 0.0, 5.0)], max_new_tokens=6)
    tokens = model.chat("we like Paris") if chat else model.tokens(TEXT)
    (plain,) = model.generate(tokens, max_new_tokens=6)
    assert done.steered == done.default
    assert done.default.text == plain.text


def test_each_side_has_its_own_probabilities_and_the_steered_text_its_steered_ones(model):
    found = loaded()
    tokens = model.tokens(TEXT)
    steers = [Steer("d", 3, "add", 3.0, 4.0), Steer("d", 5, "clamp", 1.0, 4.0)]
    done = steer(model, found, TEXT, steers, max_new_tokens=5)
    assert done.steered.text != done.default.text
    positions, steps = selection(tokens, "all")
    assert (positions, steps) == (list(range(1, len(tokens))), "all")
    ids = []
    for number in range(len(done.steered.tokens)):
        so_far = model.tokens_of([*tokens.ids.tolist(), *ids])
        changes = interventions(found, steers, list(range(1, len(so_far))))
        logits = model.logits(so_far, interventions=changes)[0, -1].log_softmax(-1)
        ids.append(int(logits.argmax()))
        score = done.steered.tokens[number]
        assert score.logprob == pytest.approx(float(logits.max()), abs=1e-4)
        assert score.best[0] == (score.piece, score.logprob)
    plain = model.generate(tokens, max_new_tokens=5)[0]
    scores = model.logits(plain.tokens)[0].log_softmax(-1)
    for number, one in enumerate(done.default.tokens):
        at = len(tokens) - 1 + number
        assert one.logprob == pytest.approx(float(scores[at, plain.ids[number]]), abs=1e-5)


def test_where(model):
    tokens = model.chat("we like Paris")
    content = tokens.content_mask.nonzero()[:, 0].tolist()
    assert selection(tokens, "all") == (content, "all")
    assert selection(tokens, "prompt") == (content, "prefill")
    assert selection(tokens, "all", special=True) == (list(range(1, len(tokens))), "all")
    assert selection(tokens, "generated") == ([len(tokens) - 1], "all")
    assert selection(tokens, [-1, 2]) == ([2, len(tokens) - 1], "prefill")
    with pytest.raises(InputError, match="position 99"):
        selection(tokens, [99])


def test_sampling_is_the_same_on_both_sides_with_one_seed(model):
    found = loaded()
    done = steer(model, found, TEXT, [Steer("d", 3, "add", 0.0)], max_new_tokens=8, temperature=1.0, seed=4)
    assert done.default.text == done.steered.text


def test_mistakes_are_named(model):
    found = loaded()
    for bad, message in (
        (Steer("d", 99), "latents 0 to 9"),
        (Steer("e", 1), "no dictionary 'e'"),
    ):
        with pytest.raises(InputError, match=message):
            steer(model, found, TEXT, [bad])
    with pytest.raises(InputError, match="is no number"):
        Steer("d", 1, "add", float("nan"))
