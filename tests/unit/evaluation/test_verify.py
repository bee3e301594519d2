"""Right or refused: a dictionary that fits its place passes, and each wrong pairing is refused by its name.

The dictionaries are fitted by least squares, in float64, to one place of a tiny random model, so that they fit it and
no other place.
"""

from dataclasses import replace

import pytest
import torch

from gemscope.artifacts.config import DictionaryConfig, Loaded
from gemscope.core.errors import InputError, PairingError
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.multilayer import Crosscoder, CrossLayerTranscoder
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.transcoder import SkipTranscoder, Transcoder
from gemscope.evaluation.verify import verify
from unit.models import tiny_gemma

TEXTS = [
    "the capital of France is Paris and we like Lyon today",
    "hello world, long words in Lyon: we like the model and the user",
    "Paris is long and the world is in words; hello France, hello capital of the user",
    "today we like 12 + 7 = 19 and 3 + 4 = 7 in the capital",
    "über 🙂 the long model of the world (and Paris) is like hello",
]
RELU = Activation("relu")


@pytest.fixture(scope="module")
def model():
    return tiny_gemma.gemma("gemma3")


@pytest.fixture(scope="module")
def items(model):
    return [model.tokens(text) for text in TEXTS]


def rows(model, items, site) -> torch.Tensor:
    parts = [model.capture(item, [site]).item(0, site)[item.content_mask] for item in items]
    return torch.cat(parts).double()


def gainless(model, items, layer) -> torch.Tensor:
    x = rows(model, items, Site("resid_mid", layer))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.decoder.config.rms_norm_eps)


def linear(x: torch.Tensor, y: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
    """W_enc, b_enc, W_dec, b_dec with ReLU: the best map of that rank from x to y, as pairs of opposite latents."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    ridge = 1e-6 * centred.square().sum() * torch.eye(x.shape[1], dtype=x.dtype)
    W = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (y - mean_y))
    U, _, _ = torch.linalg.svd((centred @ W).T, full_matrices=False)
    V = U[:, :rank]
    read = W @ V
    W_enc = torch.cat([read, -read], 1)
    W_dec = torch.cat([V.T, -V.T], 0)
    return tuple(t.float() for t in (W_enc, -mean_x @ W_enc, W_dec, mean_y))


def features(x: torch.Tensor, y: torch.Tensor, d_sae: int = 40, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random ReLU latents of x and the decoder that explains most of y."""
    g = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(x.shape[1], d_sae, generator=g, dtype=x.dtype) / x.std()
    W_enc /= W_enc.shape[0] ** 0.5
    acts = torch.cat([torch.relu(x @ W_enc), torch.ones(len(x), 1, dtype=x.dtype)], 1)
    solved = torch.linalg.lstsq(acts, y).solution
    return tuple(t.float() for t in (W_enc, torch.zeros(d_sae, dtype=x.dtype), solved[:-1], solved[-1]))


def loaded(dictionary, reads, writes=None, **about) -> Loaded:
    return Loaded(dictionary, DictionaryConfig.of(dictionary, reads, writes, model="tiny-gemma3", **about))


def sae(model, items, site, x=None) -> SAE:
    x = rows(model, items, site) if x is None else x
    return SAE(*linear(x, x, 8), activation=RELU)


SAE_SITES = ["resid_post.1", "resid_pre.2", "resid_mid.2", "mlp_out.1", "attn_out.2", "z.1", "mlp_in.2", "mlp_act.1"]


@pytest.mark.parametrize("name", SAE_SITES)
def test_a_dictionary_that_fits_its_site_passes_and_beats_all_others(model, items, name):
    site = Site.parse(name)
    found = verify(model, loaded(sae(model, items, site), site), items)
    assert found.fvu < 0.5
    assert found.rows >= 16
    assert len(found.alternatives) >= 3
    assert found.alternatives[0].fvu > found.fvu
    assert found.as_dict()["reads"] == (name,)


def test_the_last_layer_is_not_hidden_states_minus_one(model, items):
    last = model.shape.n_layers - 1
    site = Site("resid_post", last)
    assert verify(model, loaded(sae(model, items, site), site), items).fvu < 0.5
    wrong = sae(model, items, site, rows(model, items, Site("final_norm")))
    with pytest.raises(PairingError, match=r"hidden_states\[-1\], which is after the final norm"):
        verify(model, loaded(wrong, site), items)


@pytest.mark.parametrize(
    ("made", "said"), [("resid_post.1", "resid_post.3"), ("mlp_out.3", "mlp_out.2"), ("z.0", "z.2")]
)
def test_the_wrong_layer_is_named(model, items, made, said):
    with pytest.raises(PairingError, match=f"belongs to layer {made[-1]}"):
        verify(model, loaded(sae(model, items, Site.parse(made)), Site.parse(said)), items)


def test_a_layer_far_away_is_found_too(model, items):
    last = model.shape.n_layers - 1
    made, said = Site("mlp_out", 0), Site("mlp_out", last)
    assert last > 2
    with pytest.raises(PairingError, match="belongs to layer 0"):
        verify(model, loaded(sae(model, items, made), said), items)


@pytest.mark.parametrize(
    ("made", "said"), [("mlp_out_raw.2", "mlp_out.2"), ("attn_out_raw.1", "attn_out.1"), ("resid_mid.2", "mlp_in.2")]
)
def test_a_dictionary_of_another_site_of_the_layer_is_named(model, items, made, said):
    with pytest.raises(PairingError, match=f"belongs to {made}"):
        verify(model, loaded(sae(model, items, Site.parse(made)), Site.parse(said)), items)


def transcoder(model, items, layer, x=None, y=None, kind=Transcoder):
    x = rows(model, items, Site("mlp_in", layer)) if x is None else x
    y = rows(model, items, Site("mlp_out", layer)) if y is None else y
    return kind(*features(x, y), activation=RELU)


def sites(layer: int) -> tuple[Site, Site]:
    return Site("mlp_in", layer), Site("mlp_out", layer)


def test_a_transcoder_that_fits_passes(model, items):
    found = verify(model, loaded(transcoder(model, items, 2), *sites(2)), items)
    assert found.fvu < 0.7
    assert min(one.fvu for one in found.alternatives) > found.fvu


def test_an_input_without_the_gain_is_named(model, items):
    x = gainless(model, items, 2)
    wrong = transcoder(model, items, 2, x=x)
    with pytest.raises(PairingError, match="without the norm's gain"):
        verify(model, loaded(wrong, *sites(2)), items)
    assert verify(model, loaded(wrong, *sites(2), read_gain=False), items).fvu < 0.7
    with pytest.raises(PairingError, match="with the norm's gain"):
        verify(model, loaded(transcoder(model, items, 2), *sites(2), read_gain=False), items)


def test_an_input_that_is_not_normalised_is_named(model, items):
    wrong = transcoder(model, items, 2, x=rows(model, items, Site("resid_mid", 2)))
    with pytest.raises(PairingError, match=r"resid_mid.2 \(before the norm\), not mlp_in.2"):
        verify(model, loaded(wrong, *sites(2)), items)


def test_an_output_before_its_norm_is_named(model, items):
    wrong = transcoder(model, items, 2, y=rows(model, items, Site("mlp_out_raw", 2)))
    with pytest.raises(PairingError, match=r"writes mlp_out_raw.2, not mlp_out.2"):
        verify(model, loaded(wrong, *sites(2)), items)


def test_a_transcoder_of_another_layer_is_named(model, items):
    with pytest.raises(PairingError, match="belongs to layer 1"):
        verify(model, loaded(transcoder(model, items, 1), *sites(2)), items)


def skip_transcoder(model, items, layer) -> SkipTranscoder:
    x, y = (rows(model, items, site) for site in sites(layer))
    ridge = 1e-3 * x.square().sum() / len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    W = torch.linalg.solve(x.T @ x + ridge, x.T @ (y - y.mean(0)))
    return SkipTranscoder(*features(x, y - x @ W, 8), W_skip=W.float(), activation=RELU)


def test_a_transposed_skip_is_named(model, items):
    right = skip_transcoder(model, items, 2)
    assert verify(model, loaded(right, *sites(2)), items).fvu < 0.7
    tensors = {name: tensor.data for name, tensor in right.named_parameters()}
    wrong = SkipTranscoder(**(tensors | {"W_skip": tensors["W_skip"].T.contiguous()}), activation=RELU)
    with pytest.raises(PairingError, match="skip connection is transposed"):
        verify(model, loaded(wrong, *sites(2)), items)


def test_a_lost_skip_is_refused(model, items):
    right = skip_transcoder(model, items, 2)
    tensors = {name: tensor.data for name, tensor in right.named_parameters() if name != "W_skip"}
    with pytest.raises(PairingError, match=r"damaged|most likely"):
        verify(model, loaded(Transcoder(**tensors, activation=RELU), *sites(2)), items)


def test_bos_twice_or_not_at_all_is_refused(model, items):
    site = Site("resid_post", 1)
    fits = loaded(sae(model, items, site), site)
    bos = model.vocabulary.bos_id
    doubled = [model.tokens_of([bos, *item.ids.tolist()]) for item in items]
    without = [model.tokens_of(item.ids.tolist()[1:]) for item in items]
    with pytest.raises(PairingError, match="<bos> twice"):
        verify(model, fits, doubled)
    with pytest.raises(PairingError, match="not at all"):
        verify(model, fits, without)


def test_the_wrong_model_width_is_named(model, items):
    wide = SAE(torch.randn(640, 8), torch.zeros(8), torch.randn(8, 640), torch.zeros(640), activation=RELU)
    config = DictionaryConfig.of(wide, Site("resid_post", 1), model="google/gemma-3-270m")
    with pytest.raises(PairingError, match=r"640 numbers, the width of gemma-3-270m.*made for google/gemma-3-270m"):
        verify(model, Loaded(wide, config), items)
    site = Site("resid_post", 99)
    with pytest.raises(PairingError, match=r"resid_post.99, which .* does not have"):
        verify(model, loaded(sae(model, items, Site("resid_post", 1)), site), items)


def test_noise_is_refused_without_a_guess(model, items):
    g = torch.Generator().manual_seed(5)
    d = model.shape.d_model
    noise = SAE(
        torch.randn(d, 32, generator=g),
        torch.zeros(32),
        torch.randn(32, d, generator=g),
        torch.zeros(d),
        activation=RELU,
    )
    with pytest.raises(PairingError, match="damaged or hardly trained"):
        verify(model, loaded(noise, Site("resid_post", 1)), items)


def test_a_text_too_short_to_tell_is_said(model, items):
    site = Site("resid_post", 1)
    with pytest.raises(InputError, match="too few"):
        verify(model, loaded(sae(model, items, site), site), "Paris")


def clt(model, items, kind=CrossLayerTranscoder, inputs="mlp_in", outputs="mlp_out", layers=None):
    """Random ReLU latents of every layer; the decoders to layer m by least squares over those of layers up to m."""
    layers = list(range(model.shape.n_layers)) if layers is None else layers
    n, d_sae = len(layers), 10
    xs = [rows(model, items, Site(inputs, layer)) for layer in layers]
    ys = [rows(model, items, Site(outputs, layer)) for layer in layers]
    d = xs[0].shape[1]
    g = torch.Generator().manual_seed(1)
    W_enc = [torch.randn(d, d_sae, generator=g, dtype=x.dtype) / (x.std() * d**0.5) for x in xs]
    acts = [torch.relu(x @ W) for x, W in zip(xs, W_enc, strict=True)]
    W_dec = [torch.zeros(n - at, d_sae, d) for at in range(n)]
    b_dec = []
    for m in range(n):
        seen = torch.cat([*acts[: m + 1], torch.ones(len(xs[0]), 1, dtype=xs[0].dtype)], 1)
        solved = torch.linalg.lstsq(seen, ys[m]).solution.float()
        for at in range(m + 1):
            W_dec[at][m - at] = solved[at * d_sae : (at + 1) * d_sae]
        b_dec.append(solved[-1])
    zeros = [torch.zeros(d_sae) for _ in range(n)]
    dictionary = kind([W.float() for W in W_enc], zeros, W_dec, b_dec, activation=RELU)
    return loaded(dictionary, [Site("mlp_in", i) for i in layers], [Site("mlp_out", i) for i in layers])


def test_a_clt_that_fits_passes(model, items):
    found = verify(model, clt(model, items), items)
    assert found.fvu < 0.7
    assert len(found.reads) == model.shape.n_layers


def test_a_clt_that_is_fed_the_residual_stream_is_named(model, items):
    with pytest.raises(PairingError, match=r"resid_mid.0 \(before the norm\)"):
        verify(model, clt(model, items, inputs="resid_mid"), items)


def test_a_transposed_skip_of_a_clt_is_named(model, items):
    """Its latents explain what the skip connections leave over."""
    n = model.shape.n_layers
    W_skip = []
    for layer in range(n):
        x, y = (rows(model, items, site) for site in sites(layer))
        ridge = 1e-3 * x.square().sum() / len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        W_skip.append(torch.linalg.solve(x.T @ x + ridge, x.T @ (y - y.mean(0))).float())
    silent = torch.zeros(model.shape.d_model, 1), torch.zeros(1)
    W_dec = [torch.zeros(n - at, 1, model.shape.d_model) for at in range(n)]
    b_dec = [
        (rows(model, items, sites(m)[1]) - rows(model, items, sites(m)[0]) @ W.double()).mean(0).float()
        for m, W in enumerate(W_skip)
    ]

    def made(skips):
        encoders, biases = [silent[0]] * n, [silent[1]] * n
        d = CrossLayerTranscoder(encoders, biases, W_dec, b_dec, W_skip=skips, activation=RELU)
        return loaded(d, [Site("mlp_in", i) for i in range(n)], [Site("mlp_out", i) for i in range(n)])

    assert verify(model, made(W_skip), items).fvu < 0.9
    with pytest.raises(PairingError, match="skip connection is transposed"):
        verify(model, made([W.T.contiguous() for W in W_skip]), items)


def test_a_crosscoder_made_on_hidden_states_minus_one_is_named(model, items):
    last = model.shape.n_layers - 1
    x = [rows(model, items, site) for site in (Site("resid_post", 1), Site("final_norm"))]
    maps = [linear(one, one, 8) for one in x]
    W_dec = [torch.stack([maps[0][2], torch.zeros_like(maps[0][2])]), maps[1][2][None]]
    wrong = Crosscoder([m[0] for m in maps], [m[1] for m in maps], W_dec, [m[3] for m in maps], activation=RELU)
    with pytest.raises(PairingError, match="after the final norm"):
        verify(model, loaded(wrong, [Site("resid_post", 1), Site("resid_post", last)]), items)


def test_summed_decoders_are_refused(model, items):
    right = clt(model, items)
    d = right.dictionary
    n = d.n_positions
    W_dec = [torch.zeros_like(table) for table in d.W_dec]
    for at in range(n):
        W_dec[at][0] = d.W_dec[at].sum(0)
    lists = {name: list(getattr(d, name)) for name in ("W_enc", "b_enc", "b_dec")}
    wrong = CrossLayerTranscoder(lists["W_enc"], lists["b_enc"], W_dec, lists["b_dec"], activation=RELU)
    with pytest.raises(PairingError):
        verify(model, replace(right, dictionary=wrong), items)


def test_a_crosscoder_of_other_layers_is_named(model, items):
    x = [rows(model, items, Site("resid_post", layer)) for layer in (1, 3)]
    maps = [linear(one, one, 8) for one in x]
    W_dec = [torch.stack([maps[0][2], torch.zeros_like(maps[0][2])]), maps[1][2][None]]
    fits = Crosscoder([m[0] for m in maps], [m[1] for m in maps], W_dec, [m[3] for m in maps], activation=RELU)
    assert verify(model, loaded(fits, [Site("resid_post", 1), Site("resid_post", 3)]), items).fvu < 0.5
    with pytest.raises(PairingError, match="belongs to layer 1"):
        verify(model, loaded(fits, [Site("resid_post", 0), Site("resid_post", 2)]), items)


def test_the_built_in_text_serves_any_model(model):
    site = Site("resid_post", 1)
    from gemscope.evaluation.reference import TEXTS as PLAIN

    own = [model.tokens(text) for text in PLAIN]
    assert verify(model, loaded(sae(model, own, site), site)).fvu < 0.5
