"""Steering changes exactly what it says, where it says, and leaves the rest of the model as it is."""

import pytest
import torch

from gemscope.artifacts.config import DictionaryConfig, Loaded
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.features.steering import Steer, interventions, selection, steer
from gemscope.models.chat import Turn
from gemscope.models.interventions import Edit, Replace
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


def several(activation=None, layers=(1, 1)):
    """Two SAEs, d and e, with other weights."""
    given = () if activation is None else (activation,)
    found = {}
    for seed, (name, layer) in enumerate(zip("de", layers, strict=True)):
        sae = random_dictionary("sae", *given, seed=seed, d_in=24, d_sae=10, dtype=torch.float32)
        found[name] = Loaded(sae, DictionaryConfig.of(sae, Site("resid_post", layer), model="tiny"))
    return found


def acts_of(sae, x):
    """[pos, d_sae], in float64."""
    pre = x.double() @ sae.W_enc.double() + sae.b_enc.double()
    if sae.activation.kind == "jumprelu":
        return pre * (pre > sae.threshold.double())
    return (pre * (pre >= pre.topk(4, dim=1).values[:, -1:])).relu()


def by_sum(found, steers, x):
    """x + the sum over the latents of (a' - a) d, with every a of the same x [pos, d_in]."""
    total = x.double()
    for one in steers:
        sae = found[one.dictionary].dictionary
        act = acts_of(sae, x)[:, one.latent]
        level = one.strength * one.unit
        wanted = {"add": act + level, "clamp": torch.full_like(act, level), "ablate": torch.zeros_like(act)}[one.mode]
        total = total + (wanted - act)[:, None] * sae.W_dec[one.latent].double()
    return total.float()


def most_active(found, x, count):
    acts = {name: acts_of(one.dictionary, x[1:]).sum(0) for name, one in found.items()}
    return [(name, latent) for name in acts for latent in acts[name].topk(count).indices.tolist()]


@pytest.mark.parametrize("activation", [Activation("jumprelu"), Activation("topk", 4)])
@pytest.mark.parametrize("modes", [("ablate",), ("clamp",), ("ablate", "clamp", "add")])
def test_several_latents_at_one_site_change_the_sum_of_what_they_write_in_any_order(model, activation, modes):
    found, tokens, site = several(activation), model.tokens(TEXT), Site("resid_post", 1)
    plain = model.capture(tokens, [site])[site][0]
    active = most_active(found, plain, 3)
    steers = [Steer(name, i, modes[n % len(modes)], 2.0, 3.0) for n, (name, i) in enumerate(active)]
    for some in (steers, steers[::-1], steers[:2], steers[1::-1]):
        changed = model.capture(tokens, [site], interventions=interventions(found, some, None))[site][0]
        torch.testing.assert_close(changed, by_sum(found, some, plain), atol=1e-4, rtol=1e-4)


def test_a_latent_of_a_later_site_is_read_from_what_an_earlier_one_left(model):
    found, tokens = several(layers=(1, 2)), model.tokens(TEXT)
    first, second = Site("resid_post", 1), Site("resid_post", 2)
    plain = model.capture(tokens, [first, second])
    steers = [Steer("d", i, "ablate") for i in (0, 1, 2)] + [Steer("e", i, "clamp", 2.0) for i in (3, 4)]
    between = by_sum(found, steers[:3], plain[first][0])
    after = model.capture(tokens, [second], interventions=[Replace(first, between)])[second][0]
    for some in (steers, steers[::-1]):
        changed = model.capture(tokens, [first, second], interventions=interventions(found, some, None))
        torch.testing.assert_close(changed[first][0], between, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(changed[second][0], by_sum(found, steers[3:], after), atol=1e-3, rtol=1e-3)


def test_several_latents_are_ablated_through_a_whole_generation(model):
    found, tokens, site = several(), model.tokens(TEXT), Site("resid_post", 1)
    plain = model.capture(tokens, [site])[site][0]
    steers = [Steer(name, i, "ablate") for name, i in most_active(found, plain, 2)]
    done = [steer(model, found, TEXT, some, max_new_tokens=4) for some in (steers, steers[::-1])]
    assert done[0].steered.text == done[1].steered.text

    def without(x):
        return by_sum(found, steers, x[0])[None]

    ids = []
    for score in done[0].steered.tokens:
        so_far = model.tokens_of([*tokens.ids.tolist(), *ids])
        change = Edit(site, without, positions=slice(1, None))
        scores = model.logits(so_far, interventions=[change])[0, -1].log_softmax(-1)
        assert score.logprob == pytest.approx(float(scores.max()), abs=1e-4)
        ids.append(int(scores.argmax()))
    plainly = model.logits(tokens)[0, -1].log_softmax(-1)
    assert abs(float(plainly.max()) - done[0].steered.tokens[0].logprob) > 1e-2
    assert model.tokens_of([*tokens.ids.tolist(), *ids]).pieces[len(tokens) :] == tuple(
        score.piece for score in done[0].steered.tokens
    )


def test_a_latent_that_competes_with_later_layers_can_only_be_added(model):
    found = loaded("crosscoder", Activation("topk", 4))
    with pytest.raises(InputError, match="steer it with add"):
        interventions(found, [Steer("d", 3, "ablate")], None)
    assert len(interventions(found, [Steer("d", 3, "add")], None)) == 4


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
        (Steer("e", 1, "add", 0.0), "no dictionary 'e'"),
    ):
        with pytest.raises(InputError, match=message):
            steer(model, found, TEXT, [bad])
    with pytest.raises(InputError, match="d/3 is given twice"):
        steer(model, found, TEXT, [Steer("d", 3, "ablate"), Steer("d", 4), Steer("d", 3, "clamp")])
    with pytest.raises(InputError, match="is no number"):
        Steer("d", 1, "add", float("nan"))
