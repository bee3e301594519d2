"""The three units of attention: against the captured pattern, the sum of what is written, and a finite difference."""

import json

import numpy as np
import pytest
import torch

from gemscope.core.errors import InputError, SiteError
from gemscope.core.sites import Site
from gemscope.lens import attention
from gemscope.lens.attention import attend
from gemscope.lens.inputs import find_target, padded
from gemscope.lens.writing import head_values, output_weights, post_norm, value_norms
from gemscope.models.interventions import Scale
from unit.models.tiny_gemma import gemma

TEXT = "the capital of France is Paris and we like Lyon"


@pytest.fixture(scope="module")
def tiny():
    return gemma()


@pytest.fixture(scope="module")
def fine():
    return gemma(dtype=torch.float64)


def test_weights_are_the_models_own_patterns(tiny):
    maps = attend(tiny, TEXT)
    seen = tiny.capture(tiny.tokens(TEXT), tiny.every_layer("pattern"))
    assert torch.equal(maps.values, torch.stack([seen.item(0, site) for site in seen.acts]))
    assert torch.allclose(maps.values.sum(-1), torch.ones(maps.values.shape[:-1]), atol=1e-6)
    assert [about.window for about in maps.layers] == [5, 5, None, 5]
    assert maps.layers[0].kv_group == (0, 0, 1, 1)


def test_some_layers_only(tiny):
    maps = attend(tiny, TEXT, layers=[2, 0])
    whole = attend(tiny, TEXT)
    assert torch.allclose(maps.values, whole.values[[2, 0]], atol=1e-6)
    assert torch.equal(maps.head(0, 3), maps.values[1, 3])
    with pytest.raises(InputError, match="layers that were are 2, 0"):
        maps.head(1, 0)
    with pytest.raises(InputError, match="heads 0 to 3"):
        maps.head(0, 4)
    with pytest.raises(SiteError, match="layers 0 to 3"):
        attend(tiny, TEXT, layers=[4])


@pytest.mark.parametrize("kind", ["gemma3", "gemma2"])
def test_what_heads_write_adds_up_to_attn_out_and_its_norms_are_the_map(kind):
    model = gemma(kind, dtype=torch.float64)
    tokens, layer = model.tokens(TEXT), 2
    seen = model.capture(tokens, [Site(name, layer) for name in ("pattern", "v", "attn_out_raw", "attn_out")])
    pattern, v = seen.item(0, f"pattern.{layer}"), seen.item(0, f"v.{layer}")
    factor, gain = post_norm(model, layer, seen.item(0, f"attn_out_raw.{layer}"))
    values = torch.einsum("khd,hdm->hkm", head_values(model, v), output_weights(model, layer))
    vectors = pattern[..., None] * values[:, None] * factor[None, :, None] * gain
    assert torch.allclose(vectors.sum((0, 2)), seen.item(0, f"attn_out.{layer}"), atol=1e-5)
    maps = attend(model, tokens, kind="written", layers=[layer])
    assert torch.allclose(maps.values[0].double(), vectors.norm(dim=-1), atol=1e-5)
    assert torch.allclose(value_norms(model, layer, v), (values * gain).norm(dim=-1), atol=1e-9)


def test_an_effect_is_the_derivative_of_the_logit(fine):
    """Reading everything (1 + s) times as strongly at one query of one head: the sum of its row of effects."""
    maps = attend(fine, TEXT, kind="effect", target="Paris", other="Lyon")
    token, other = maps.target.token, maps.target.other
    step = 1e-4
    for layer, head, query in ((0, 1, 3), (1, 0, 9), (2, 3, 10), (3, 2, 10)):
        logits = [
            fine.logits(fine.tokens(TEXT), interventions=[Scale(f"z.{layer}", 1 + s, positions=[query], heads=[head])])[
                0, -1
            ]
            for s in (step, -step)
        ]
        up, down = (x[token] - x[other] for x in logits)
        assert float(maps.values[layer, head, query].sum()) == pytest.approx(float(up - down) / (2 * step), abs=2e-3)


def test_padding_changes_nothing_to_the_bit_and_its_length_is_what_was_asked(tiny):
    tokens = tiny.tokens(TEXT)
    batch = padded(tiny, tokens, 17)
    assert batch.ids.shape == (1, 17)
    values = attention.read_maps(tiny, batch, range(4), "weight")
    assert values.shape[-2:] == (len(tokens), len(tokens))
    assert torch.allclose(values, attend(tiny, TEXT).values, atol=1e-6)


def test_targets(tiny):
    logits = torch.zeros(tiny.shape.vocab_size)
    both = [(tiny.tokens(" " + word), tiny.tokens(word)) for word in ("of", "is", "in", "the", "hello")]
    word, spaced, bare = next((b.text, int(a.ids[1]), int(b.ids[1])) for a, b in both if len(a) == len(b) == 2)
    logits[bare] = 1
    assert find_target(tiny, logits, word).token == bare
    assert find_target(tiny, logits, " " + word).token == spaced
    logits[spaced] = 2
    assert find_target(tiny, logits, word).token == spaced
    assert find_target(tiny, logits, None).token == spaced
    for wrong, reason in (("xylophone", "give a word that is one token"), ("", "is empty")):
        with pytest.raises(InputError, match=reason):
            find_target(tiny, logits, wrong)
    with pytest.raises(InputError, match="the same token"):
        find_target(tiny, logits, word, word)


def test_what_cannot_be_read_is_refused(tiny, monkeypatch):
    with pytest.raises(InputError, match="ask for the unit effect"):
        attend(tiny, TEXT, target="Paris")
    with pytest.raises(InputError, match="at least one"):
        attend(tiny, TEXT, layers=[])
    monkeypatch.setattr(attention, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="shorten the text or choose layers"):
        attend(tiny, TEXT)


def test_strongest_keys_and_edges(tiny):
    maps = attend(tiny, TEXT)
    for query, keys in enumerate(maps.strongest(2, 1, 2)):
        row = maps.head(2, 1)[query]
        assert [value for _, value in keys] == pytest.approx(row.topk(min(2, query + 1)).values.tolist())
    best = maps.edges(3)
    assert [value for *_, value in best] == pytest.approx(maps.values.flatten().topk(3).values.tolist())


@pytest.mark.parametrize("ending", ["json", "npz", "svg", "png", "pdf", "html"])
def test_a_result_can_be_saved(tiny, tmp_path, ending):
    maps = attend(tiny, TEXT)
    path = maps.save(tmp_path / f"maps.{ending}")
    data = path.read_bytes()
    if ending == "json":
        value = json.loads(data)
        assert value["tokens"]["text"] == TEXT
        assert value["provenance"]["versions"]["gemscope"]
    elif ending == "npz":
        with np.load(path, allow_pickle=False) as file:
            assert np.array_equal(file["values"], maps.values.numpy())
            assert json.loads(str(file["about"]))["model"] == "tiny-gemma3"
    elif ending in ("svg", "html"):
        assert b"<svg" in data
        assert b"<script" not in data
        assert b"src=" not in data
        again = maps.save(tmp_path / f"again.{ending}").read_bytes()
        assert again == data
    assert len(data) > 1000
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_another_ending_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="end the name in"):
        attend(tiny, TEXT).save(tmp_path / "maps.txt")


def test_it_prints_within_80_columns(tiny):
    maps = attend(tiny, TEXT, kind="effect")
    for text in (str(maps), maps.head_text(2, 1)):
        assert max(map(len, text.splitlines())) <= 80
    assert "(0 1) (2 3)" in str(maps)
    assert "local 5" in str(maps)
