"""What dictionaries of several layers promote: every output goes through the projection of its own layer."""

import pytest
import torch

from gemscope.artifacts.config import DictionaryConfig, Loaded
from gemscope.core.sites import Site
from gemscope.features.effects import nearest, promoted
from unit.dictionaries.zoo import random_dictionary
from unit.models.tiny_gemma import gemma

LAYERS = (0, 2)
HEADS = tuple(Site("z", layer) for layer in LAYERS)
LATENTS = 5


@pytest.fixture(scope="module")
def tiny():
    return gemma(dtype=torch.float64)


def _loaded(kind, writes, reads=None, d=32):
    one = random_dictionary(kind, d_in=d, d_out=d, d_sae=LATENTS, n=len(writes))
    return Loaded(one, DictionaryConfig.of(one, reads or writes, writes, model="tiny", dtype="float32"))


def _clt():
    return _loaded("clt", HEADS, tuple(Site("mlp_act", layer) for layer in LAYERS))


def _adds(model, loaded, latent, out):
    """What output ``out`` of a latent adds to all logits: its heads through the layer's own modules, norms' scale 1."""
    layer, own = divmod(latent, LATENTS)
    if layer > out:
        return torch.zeros(model.shape.vocab_size).double()
    block = model.decoder.trunk.layers[LAYERS[out]]
    added = block.self_attn.o_proj(loaded.dictionary.W_dec[layer][out - layer, own])
    gain = (1 + block.post_attention_layernorm.weight) * (1 + model.decoder.final.weight)
    return model.unembedding() @ (added * gain)


def _is(found, effects):
    """The most and least promoted tokens of each latent are those of ``effects`` [latents, vocab]."""
    for ranked, largest in zip(found, (True, False), strict=True):
        best = effects.topk(4, largest=largest)
        torch.testing.assert_close(ranked.values, best.values.float(), rtol=1e-4, atol=1e-5)
        assert torch.equal(ranked.ids.long(), best.indices)


def test_a_crosscoder_of_heads_promotes_through_the_last_layer(tiny):
    loaded = _loaded("crosscoder", HEADS)
    _is(promoted(tiny, loaded, 4), torch.stack([_adds(tiny, loaded, latent, 1) for latent in range(2 * LATENTS)]))


def test_a_clt_of_heads_adds_up_what_each_layer_promotes(tiny):
    loaded = _clt()
    both = [sum(_adds(tiny, loaded, latent, out) for out in range(2)) for latent in range(2 * LATENTS)]
    _is(promoted(tiny, loaded, 4), torch.stack(both))


@pytest.mark.parametrize("out", [0, 1])
def test_one_output_promotes_through_its_own_layer(tiny, out):
    loaded = _clt()
    written = range((out + 1) * LATENTS)
    found = promoted(tiny, loaded, 4, out)
    found = [type(one)(one.ids[: len(written)], one.values[: len(written)]) for one in found]
    _is(found, torch.stack([_adds(tiny, loaded, latent, out) for latent in written]))


def test_what_does_not_end_in_the_stream_promotes_nothing(tiny):
    loaded = _loaded("crosscoder", (Site("resid_post", 0), Site("mlp_in", 1)), d=24)
    assert promoted(tiny, loaded, 4) is None
    assert promoted(tiny, loaded, 4, 0) is not None


def test_heads_are_compared_with_heads_of_the_layer_they_are_written_to():
    crosscoder, clt = _loaded("crosscoder", HEADS), _clt()
    first, last = (_loaded("sae", (site,)) for site in HEADS)

    def compared(one, other):
        return bool((nearest(one, {0: other}, 2, same=one is other)[0].ids >= 0).any())

    assert compared(crosscoder, last)
    assert not compared(crosscoder, first)
    assert compared(clt, clt)
    assert not any(compared(clt, other) for other in (first, last, crosscoder))
