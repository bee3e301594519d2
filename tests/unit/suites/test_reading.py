"""What a reading says, against direct computation."""

import json
import math

import pytest
import torch

from gemscope.core.errors import InputError
from gemscope.models.gemma import Gemma
from gemscope.models.pieces import shown
from gemscope.models.tokens import Role
from gemscope.suites import reading as module
from gemscope.suites.reading import read, read_chat
from gemscope.suites.suite import Suite

TEXT = "the capital of France is Paris and we like Lyon"


@pytest.fixture(scope="module")
def suite(tiny_suite):
    return Suite.open(tiny_suite)


@pytest.fixture(scope="module")
def model(suite):
    return Gemma.load(suite.model, check=False)


def test_the_latents_are_those_that_write_most_and_are_seldom_on(suite, model):
    got = read(model, suite, TEXT, layer=2, top=4)
    tokens = model.tokens(TEXT)
    acts = suite.dictionary(suite.sites[2]).encode(model.capture(tokens, ["resid_post.2"])["resid_post.2"][0])
    report = suite.evaluation(suite.sites[2]).concepts
    fidelity, norms = suite.evaluation(suite.sites[2]).fidelity, suite.dictionary(suite.sites[2]).W_dec.norm(dim=1)
    assert got.site == suite.sites[2]
    for i, position in enumerate(got.positions):
        assert (position.position, position.piece, position.role) == (i, tokens.pieces[i], tokens.roles[i])
        if position.role != Role.CONTENT:
            assert position.latents == ()
            assert position.active == 0
            continue
        assert position.active == int((acts[i] > 0).sum())
        assert len(position.latents) == min(4, position.active)
        said = [
            (float(acts[i, j]) * float(norms[j]) * -math.log((fidelity.firings[j] + 1) / (fidelity.rows + 2)), j)
            for j in acts[i].nonzero()[:, 0].tolist()
        ]
        assert [latent.latent for latent in position.latents] == [j for _, j in sorted(said, reverse=True)[:4]]
        for latent in position.latents:
            assert latent.activation == pytest.approx(float(acts[i, latent.latent]), rel=1e-5)
            assert latent.strength == pytest.approx(latent.activation / report.latent_max[latent.latent], rel=1e-5)


def test_promoted_tokens_follow_the_final_norm_and_the_unembedding(suite, model):
    got = read(model, suite, TEXT, layer=1, promoted=3)
    W_dec = suite.dictionary(suite.sites[1]).W_dec.double()
    for latent in {latent.latent: latent for p in got.positions for latent in p.latents}.values():
        weights = (1 + model.model.model.norm.weight.double()) * W_dec[latent.latent]
        order = (model.model.lm_head.weight.double() @ weights).argsort(descending=True).tolist()
        words = list(dict.fromkeys(shown(model.tokenizer.convert_ids_to_tokens(i)) for i in order[:40]))
        assert list(latent.promotes) == words[:3]


def test_a_latent_has_the_name_that_the_evaluation_gave_it(suite, model):
    report = suite.evaluation(suite.sites[0]).concepts
    for position in read(model, suite, TEXT, layer=0).positions:
        for latent in position.latents:
            assert latent.concept == report.latent_concept[latent.latent]
            assert latent.concept_share == report.latent_share[latent.latent]


def test_the_default_layer_finds_the_most_concepts(suite, model):
    found = {site: suite.evaluation(site).concepts.found for site in suite.sites}
    best = suite.best_site()
    assert found[best] == max(found.values())
    tied = [site for site in suite.sites if found[site] == found[best]]
    assert suite.evaluation(best).fidelity.fvu == min(suite.evaluation(site).fidelity.fvu for site in tied)
    assert read(model, suite, TEXT).site == best


def test_a_chat_is_read_with_the_models_own_answer(suite, model):
    got = read_chat(model, suite, "hello world", layer=1)
    (answer,) = model.generate(model.chat("hello world"), max_new_tokens=module.ANSWER_TOKENS)
    assert got.answer == answer.text
    assert [p.token for p in got.positions] == answer.tokens.ids.tolist()
    spoken = [p for p in got.positions if p.role == Role.CONTENT]
    assert len(spoken) == int(answer.tokens.content_mask.sum())
    assert not any(p.latents for p in got.positions if p.role != Role.CONTENT)


def test_a_reading_is_plain_json(suite, model):
    value = json.loads(json.dumps(read(model, suite, TEXT, layer=3).as_dict()))
    assert value["site"] == "resid_post.3"
    assert value["text"] == TEXT
    assert isinstance(value["positions"][1]["latents"][0]["promotes"][0], str)


def test_a_text_of_one_token_has_no_fvu(suite, model):
    assert read(model, suite, "the").fvu is None
    x = torch.randn(3, 4)
    assert module._fvu(x, x) == 0.0


def test_a_layer_without_a_dictionary_is_named_with_those_that_have_one(suite, model):
    with pytest.raises(InputError, match=r"no dictionary at layer 9; its layers are 0, 1, 2, 3"):
        read(model, suite, TEXT, layer=9)
