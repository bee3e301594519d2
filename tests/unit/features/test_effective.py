"""What is promised is the final norm's arithmetic; what is tried is what happens, the largest first."""

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
from gemscope.features.steering import Steer, interventions
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


def next_tokens(model, changes=()):
    """Probabilities after every content token of each prompt, read one prompt at a time."""
    parts = []
    for text in PROMPTS:
        tokens = model.tokens(text)
        logits = model.logits(tokens, interventions=changes)[0]
        parts.append(logits[tokens.content_mask].double().softmax(-1))
    return torch.cat(parts)


def test_the_best_feature_is_the_one_that_raises_the_tokens_most(made):
    model, built, loaded = made
    peaks = built.latents("sae").records["peak"]
    found = effective.best_to_steer(model, built, loaded, TOKENS, PROMPTS, count=400)
    assert {one.steer.latent for one in found} == {i for i in range(20) if peaks[i] > 0}
    assert {one.steer.dictionary for one in found} == {"sae"}
    after = {}
    for one in found:
        steer = Steer.of(built, f"sae/{one.steer.latent}", strength=effective.STRENGTH)
        assert one.steer == steer
        after[one.steer.latent] = float(
            next_tokens(model, interventions(loaded, [steer], None))[:, TOKENS].sum(1).mean()
        )
        assert one.after == pytest.approx(after[one.steer.latent], rel=1e-4)
        assert one.before == pytest.approx(float(next_tokens(model)[:, TOKENS].sum(1).mean()), rel=1e-4)
        assert one.factor == pytest.approx(one.after / one.before)
    assert [one.after for one in found] == sorted((one.after for one in found), reverse=True)
    assert len(effective.best_to_steer(model, built, loaded, TOKENS, PROMPTS, count=4)) == 4


def test_a_token_is_searched_for_by_its_spelling(made):
    model, built, loaded = made
    token = int(model.tokens(TEXTS[0]).ids[1])
    piece = built.database.pieces([token])[token][0]
    hits = effective.by_effect(built, model, loaded, piece.removeprefix("▁"), PROMPTS, top=3)
    word = piece.strip().removeprefix("▁")
    ids = built.database.ids_of([word, f"▁{word}", f" {word}"])
    assert token in ids
    found = effective.best_to_steer(model, built, loaded, ids, PROMPTS, count=6)
    assert [hit.id for hit in hits] == [f"sae/{one.steer.latent}" for one in found[:3]]
    assert [hit.score for hit in hits] == [one.factor for one in found[:3]]


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
    batch = model.batch([model.tokens(text) for text in PROMPTS])
    groups = [TOKENS, [7]]
    found = effective.promised(model, built, loaded, groups, batch)
    assert set(found) == {"sae"}
    streams = []
    for text in PROMPTS:
        tokens = model.tokens(text)
        streams.append(model.capture(tokens, ["final_in"])["final_in"][0][tokens.content_mask].double())
    size = torch.cat(streams).square().mean(1).sqrt().mean()
    mean = next_tokens(model).mean(0).log()
    table = model.unembedding().double() * model.final_gain().double()
    rows = loaded["sae"].dictionary.W_dec.detach().double()
    peaks = torch.from_numpy(built.latents("sae").records["peak"].copy()).double()
    shares = (mean + 2 * peaks[:, None] * (rows @ table.T) / size).softmax(1)
    expected = torch.stack([shares[:, ids].sum(1) for ids in groups], dim=1)
    torch.testing.assert_close(found["sae"].double(), expected, rtol=1e-3, atol=1e-6)
    ids = effective.most_promising({"sae": found["sae"][:, 0]}, 5)
    assert ids == [f"sae/{i}" for i in expected[:, 0].topk(5).indices.tolist()]


def test_without_prompts_or_tokens_the_remedy_is_named(made):
    model, built, loaded = made
    with pytest.raises(InputError, match="at least one prompt"):
        effective.best_to_steer(model, built, loaded, TOKENS, [])
    with pytest.raises(InputError, match="writes to the residual stream"):
        effective.best_to_steer(model, built, {"crosscoder": loaded["crosscoder"]}, TOKENS, PROMPTS)
