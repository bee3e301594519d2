"""What is promised is arithmetic or a gradient; what is tried is what happens, the largest first."""

from dataclasses import replace

import pytest
import torch

from gemscope.artifacts.config import DictionaryConfig, Loaded
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.features import effective
from gemscope.features.blocks import LiveRows
from gemscope.features.config import IndexConfig
from gemscope.features.index import index
from gemscope.features.steering import Steer, interventions, selection
from unit.dictionaries.zoo import random_dictionary
from unit.models.tiny_gemma import TEXTS, gemma

PROMPTS = TEXTS[:3]
TOKENS = [5, 9]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An index of an SAE of the stream and of a crosscoder, which is no candidate."""
    model = gemma("gemma3")
    sae = random_dictionary("sae", d_in=24, d_sae=20, dtype=torch.float32)
    both = random_dictionary("crosscoder", d_in=24, d_sae=5, n=2, dtype=torch.float32)
    sites = (Site("resid_post", 0), Site("resid_post", 2))
    loaded = {
        "sae": Loaded(sae, DictionaryConfig.of(sae, Site("resid_post", 1), model="tiny")),
        "crosscoder": Loaded(both, DictionaryConfig.of(both, sites, model="tiny")),
    }
    rows = LiveRows(model, [model.tokens(text) for text in TEXTS])
    config = IndexConfig(top=3, groups=2, per_group=2, sample=8, window=2, promoted=6, nearest=3)
    return model, index(tmp_path_factory.mktemp("made") / "i", rows, loaded, config, gemma=model), loaded


def next_tokens(model, loaded=None, steer=None):
    """Probabilities after each prompt, read one prompt at a time, steered where ``steer`` steers."""
    parts = []
    for text in PROMPTS:
        tokens = model.tokens(text)
        positions, _ = selection(tokens, "prompt")
        changes = () if steer is None else interventions(loaded, [steer], positions, "prefill")
        parts.append(model.logits(tokens, interventions=changes)[0, -1].double().softmax(-1))
    return torch.stack(parts)


def share(model, loaded=None, steer=None):
    return float(next_tokens(model, loaded, steer)[:, TOKENS].sum(1).mean())


def test_the_best_feature_is_the_one_that_raises_the_tokens_most(made):
    model, built, loaded = made
    peaks = built.latents("sae").records["peak"]
    found = effective.best_to_steer(
        model, built, loaded, TOKENS, PROMPTS, each=400, count=400, strengths=(1.0, 4.0, 2.0)
    )
    assert {one.steer.latent for one in found} == {i for i in range(20) if peaks[i] > 0}
    assert {one.steer.dictionary for one in found} == {"sae"}
    for one in found:
        steers = [Steer.of(built, f"sae/{one.steer.latent}", strength=strength) for strength in (1.0, 2.0, 4.0)]
        after = {steer: share(model, loaded, steer) for steer in steers}
        assert after[one.steer] == pytest.approx(max(after.values()), rel=1e-4)
        assert one.after == pytest.approx(after[one.steer], rel=1e-4)
        assert one.before == pytest.approx(share(model), rel=1e-4)
        assert one.factor == pytest.approx(one.after / one.before)
    assert [one.after for one in found] == sorted((one.after for one in found), reverse=True)
    middle = sorted(found, key=lambda one: -share(model, loaded, replace(one.steer, strength=2.0)))
    four = effective.best_to_steer(model, built, loaded, TOKENS, PROMPTS, each=400, count=4, strengths=(1.0, 4.0, 2.0))
    assert {one.steer.latent for one in four} == {one.steer.latent for one in middle[:4]}


def test_a_token_is_searched_for_by_its_spelling(made):
    model, built, loaded = made
    token = int(model.tokens(TEXTS[0]).ids[1])
    piece = built.pieces.of([token])[token]
    hits = effective.by_effect(built, model, loaded, piece.removeprefix("▁"), PROMPTS, top=3)
    word = piece.strip().removeprefix("▁")
    ids = built.pieces.ids_of([word, f"▁{word}", f" {word}"])
    assert token in ids
    found = effective.best_to_steer(model, built, loaded, ids, PROMPTS, count=3)
    assert len(hits) == 3
    assert [hit.id for hit in hits] == [f"sae/{one.steer.latent}" for one in found]
    assert [hit.score for hit in hits] == [one.factor for one in found]
    assert [hit.strength for hit in hits] == [one.steer.strength for one in found]


def test_nothing_added_changes_nothing(made):
    model, built, loaded = made
    latent = int(built.latents("sae").records["peak"].argmax())
    batch = model.batch([model.tokens(text) for text in PROMPTS])
    none = replace(Steer.of(built, f"sae/{latent}"), strength=0.0)
    (one,) = effective.tried(model, loaded, [none], TOKENS, batch)
    assert one.before == one.after


def test_what_is_promised_is_the_mean_prediction_with_the_direction_added(made, monkeypatch):
    monkeypatch.setattr(effective, "_BLOCK", 1)
    model, built, loaded = made
    batch = model.batch([model.tokens(text) for text in PROMPTS], "left")
    found = effective.promised(model, built, loaded, TOKENS, batch)
    assert set(found) == {"sae"}
    streams = [model.capture(model.tokens(text), ["final_in"])["final_in"][0, -1].double() for text in PROMPTS]
    size = torch.stack(streams).square().mean(1).sqrt().mean()
    table = model.unembedding().double() * model.final_gain().double()
    rows = loaded["sae"].dictionary.W_dec.detach().double()
    peaks = torch.from_numpy(built.latents("sae").records["peak"].copy()).double()
    moved = next_tokens(model).mean(0).log() + 2 * peaks[:, None] * (rows @ table.T) / size
    torch.testing.assert_close(
        found["sae"].double(), moved.softmax(1)[:, TOKENS].sum(1), rtol=1e-3, atol=1e-6, check_dtype=False
    )


def test_slopes_are_what_a_little_more_of_a_latent_does(made):
    model, built, loaded = made
    batch = model.batch([model.tokens(text) for text in PROMPTS])
    found = effective.slopes(model, built, loaded, TOKENS, batch)
    assert set(found) == {"sae"}
    peaks = built.latents("sae").records["peak"]
    for latent in range(20):
        if peaks[latent] == 0:
            assert found["sae"][latent] == 0
            continue
        steer = Steer.of(built, f"sae/{latent}")
        up, down = (
            next_tokens(model, loaded, replace(steer, strength=step))[:, TOKENS].sum(1).log().mean()
            for step in (0.0005, -0.0005)
        )
        assert float(found["sae"][latent]) == pytest.approx(float(up - down) / 0.001, rel=0.02, abs=5e-3)


def test_the_shortlist_has_the_best_of_both_ways_that_were_ever_active(made):
    model, built, loaded = made
    batch = model.batch([model.tokens(text) for text in PROMPTS])
    alive = torch.from_numpy(built.latents("sae").records["peak"] > 0)
    wanted = []
    for way in (effective.promised, effective.slopes):
        values = way(model, built, loaded, TOKENS, batch)["sae"].masked_fill(~alive, -torch.inf)
        wanted += values.topk(3).indices.tolist()
    found = effective.shortlist(model, built, loaded, TOKENS, batch, each=3)
    assert found == [Steer.of(built, f"sae/{latent}") for latent in dict.fromkeys(wanted)]


def test_without_prompts_or_tokens_the_remedy_is_named(made):
    model, built, loaded = made
    with pytest.raises(InputError, match="at least one prompt"):
        effective.best_to_steer(model, built, loaded, TOKENS, [])
    with pytest.raises(InputError, match="writes to the residual stream"):
        effective.best_to_steer(model, built, {"crosscoder": loaded["crosscoder"]}, TOKENS, PROMPTS)
