"""SAELens 6.54.12 itself reads what gemscope writes and the other way round; run by ``make interop`` in its own
virtual environment.

Where SAELens computes something else than the published formula, the test shows both figures.
"""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

sae_lens = pytest.importorskip("sae_lens", reason="make interop installs SAELens beside gemscope")

from sae_lens import SAE as TheirSAE  # noqa: E402
from sae_lens.loading import pretrained_sae_loaders as loaders  # noqa: E402

from gemscope.artifacts import formats  # noqa: E402
from gemscope.artifacts.config import DictionaryConfig  # noqa: E402
from gemscope.core.sites import Site  # noqa: E402
from gemscope.dictionaries.activation import Activation  # noqa: E402
from gemscope.dictionaries.sae import SAE  # noqa: E402
from gemscope.dictionaries.transcoder import SkipTranscoder, Transcoder  # noqa: E402
from unit.artifacts import makers  # noqa: E402

D_IN, D_SAE, D_OUT = 24, 96, 20


def test_this_is_the_version_that_was_promised():
    assert version("sae-lens") == "6.54.12"


def close(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """To within 1e-5 of the largest value."""
    scale = max(1.0, float(ours.abs().max()))
    assert float((theirs.detach() - ours.detach()).abs().max()) < 1e-5 * scale


def made(kind: str, activation: str) -> tuple[object, DictionaryConfig]:
    d_out = D_OUT if kind != "sae" else D_IN
    t = makers.weights(D_IN, D_SAE, d_out, scale=D_IN**-0.5)
    weights = (t["w_enc"], t["b_enc"], t["w_dec"], t["b_dec"])
    chosen = Activation(activation, 7.0 if activation in ("topk", "batchtopk") else None)
    threshold = t["threshold"] if chosen.has_threshold else None
    if activation == "batchtopk":
        threshold = torch.full((D_SAE,), 0.3)
    model = "google/gemma-3-1b-it"
    if kind == "sae":
        sae = SAE(*weights, threshold, activation=chosen)
        return sae, DictionaryConfig.of(sae, Site("resid_post", 5), model=model)
    sites = Site("mlp_in", 5), Site("mlp_out", 5)
    if kind == "transcoder":
        transcoder = Transcoder(*weights, threshold, activation=chosen)
        return transcoder, DictionaryConfig.of(transcoder, *sites, model=model)
    W_skip = torch.randn(D_IN, D_OUT, generator=makers.generator(4))
    skip = SkipTranscoder(*weights, threshold, W_skip=W_skip, activation=chosen)
    return skip, DictionaryConfig.of(skip, *sites, model=model)


CASES = [
    ("sae", "jumprelu"),
    ("sae", "relu"),
    ("sae", "topk"),
    ("sae", "batchtopk"),
    ("transcoder", "jumprelu"),
    ("transcoder", "relu"),
    ("skip_transcoder", "jumprelu"),
    ("skip_transcoder", "relu"),
]


@pytest.mark.parametrize(("kind", "activation"), CASES)
def test_what_we_write_loads_in_saelens_and_computes_the_same(tmp_path, kind, activation):
    dictionary, config = made(kind, activation)
    formats.save(tmp_path / "x", dictionary, config, format="saelens")
    theirs = TheirSAE.load_from_disk(tmp_path / "x")
    x = makers.rows(50, D_IN)
    acts = dictionary.encode(x)
    close(theirs.encode(x), acts)
    close(theirs.decode(acts), dictionary.decode(acts))
    close(theirs(x), dictionary(x))
    assert theirs.cfg.metadata.model_name == "google/gemma-3-1b-it"


@pytest.mark.parametrize(("kind", "activation"), CASES)
def test_what_saelens_saves_of_it_loads_here_again(tmp_path, kind, activation):
    dictionary, config = made(kind, activation)
    formats.save(tmp_path / "x", dictionary, config, format="saelens")
    TheirSAE.load_from_disk(tmp_path / "x").save_model(tmp_path / "y")
    again = formats.load(tmp_path / "y")
    x = makers.rows(50, D_IN)
    assert torch.equal(again.dictionary(x), formats.load(tmp_path / "x").dictionary(x))
    assert again.config.reads == config.reads
    assert again.config.writes == config.writes
    (tmp_path / "z").mkdir()
    formats.save(tmp_path / "z/z", again.dictionary, again.config, format="saelens")
    makers.same_files(tmp_path / "y", tmp_path / "z/z", "sae_weights.safetensors", "cfg.json")


def their(name: str, **options):
    """One of SAELens' own classes with random weights."""
    cls, config = sae_lens.registry.get_sae_class(name)
    made = cls(config(d_in=D_IN, d_sae=D_SAE, **options))
    with torch.no_grad():
        for at, (key, parameter) in enumerate(sorted(made.named_parameters())):
            parameter.copy_(torch.randn(parameter.shape, generator=makers.generator(at)) * 0.3)
            if key == "threshold":
                parameter.abs_()
    made.cfg.metadata.model_name = "google/gemma-3-1b-it"
    made.cfg.metadata.hook_name = "blocks.5.hook_resid_post"
    made.cfg.metadata.hook_name_out = "blocks.5.hook_mlp_out"
    return made


THEIRS = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("standard", {"normalize_activations": "expected_average_only_in"}),
    ("jumprelu", {}),
    ("jumprelu", {"apply_b_dec_to_input": False}),
    ("topk", {"k": 9}),
    ("topk", {"k": 9, "rescale_acts_by_decoder_norm": True}),
    ("transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    ("skip_transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    ("jumprelu_transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    ("jumprelu_skip_transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
]


@pytest.mark.parametrize(("name", "options"), THEIRS)
def test_what_saelens_makes_computes_the_same_here(tmp_path, name, options):
    theirs = their(name, **options)
    theirs.save_model(tmp_path)
    loaded = formats.load(tmp_path)
    x = makers.rows(50, D_IN)
    close(theirs.encode(x), loaded.dictionary.encode(x))
    close(theirs(x), loaded.dictionary(x))


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
def test_training_checkpoints_and_what_saelens_makes_of_them(tmp_path, name):
    cls, config = sae_lens.registry.get_sae_training_class(name)
    widths = {"matryoshka_widths": [32, D_SAE]} if name.startswith("matryoshka") else {}
    training = cls(config(d_in=D_IN, d_sae=D_SAE, k=6, **widths))
    with torch.no_grad():
        for at, (_, parameter) in enumerate(sorted(training.named_parameters())):
            parameter.copy_(torch.randn(parameter.shape, generator=makers.generator(at)) * 0.3)
        training.topk_threshold.fill_(0.7)
    training.cfg.metadata.model_name = "google/gemma-3-1b-it"
    training.cfg.metadata.hook_name = "blocks.5.hook_resid_post"
    training.save_model(tmp_path / "training")
    training.save_inference_model(tmp_path / "inference")
    theirs = TheirSAE.load_from_disk(tmp_path / "inference")
    x = makers.rows(50, D_IN)
    for folder in ("training", "inference"):
        loaded = formats.load(tmp_path / folder)
        close(theirs(x), loaded.dictionary(x))
        close(theirs.encode(x), loaded.dictionary.encode(x))
    first = formats.load(tmp_path / "training").config
    assert first.activation == Activation("batchtopk", 6.0)
    assert first.prefixes == ((32,) if widths else ())


@pytest.mark.parametrize("name", ["gated", "temporal", "matching_pursuit"])
def test_what_is_refused_says_why(tmp_path, name):
    (tmp_path / "cfg.json").write_text(json.dumps(makers.config_saelens(name)))
    with pytest.raises(formats.FormatError, match="is not read"):
        formats.load(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """SAELens' Gemma Scope loaders, with the hub replaced by a folder."""

    def download(repo_id: str, filename: str, subfolder: str | None = None, **_: object) -> str:
        path = tmp_path / repo_id.split("/")[-1] / (subfolder or "") / filename
        if not path.exists():
            raise loaders.EntryNotFoundError("not here")
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        from safetensors import safe_open

        with safe_open(download(repo_id, filename), framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    return tmp_path


def through_saelens(config: dict, state: dict) -> TheirSAE:
    """What ``from_pretrained`` does with the output of a loader."""
    config = loaders.handle_config_defaulting(config)
    cls = sae_lens.registry.get_sae_class(config["architecture"])
    made = cls[0](cls[1].from_dict(config))
    made.load_state_dict(state)
    return made


REPO = "google/gemma-scope-2-1b-it"
GEMMA_SCOPE_2 = {
    "sae": "resid_post_all/layer_5_width_16k_l0_small",
    "transcoder": "transcoder_all/layer_5_width_16k_l0_small",
    "skip_transcoder": "transcoder_all/layer_5_width_16k_l0_small_affine",
}


@pytest.mark.parametrize("kind", GEMMA_SCOPE_2)
def test_what_we_write_for_gemma_scope_2_loads_in_saelens(hub, kind):
    dictionary, config = made(kind, "jumprelu")
    formats.save(hub / "gemma-scope-2-1b-it" / GEMMA_SCOPE_2[kind], dictionary, config, format="gemma-scope-2")
    theirs = through_saelens(*loaders.gemma_3_sae_huggingface_loader(REPO, GEMMA_SCOPE_2[kind], "cpu")[:2])
    x = makers.rows(50, D_IN)
    acts = dictionary.encode(x)
    close(theirs.encode(x), acts)
    close(theirs.decode(acts), dictionary.decode(acts))
    close(theirs(x), dictionary(x))


def test_gemma_scope_1_loads_in_saelens(hub):
    repo, folder = "google/gemma-scope-2b-pt-res", "layer_5/width_16k/average_l0_71"
    dictionary, config = made("sae", "jumprelu")
    formats.save(hub / "gemma-scope-2b-pt-res" / folder, dictionary, config, format="gemma-scope-1")
    their_config, state, _ = loaders.gemma_2_sae_huggingface_loader(repo, folder, "cpu")
    theirs = through_saelens(their_config | {"d_in": D_IN, "d_sae": D_SAE}, state)
    x = makers.rows(50, D_IN)
    close(theirs.encode(x), dictionary.encode(x))
    close(theirs(x), dictionary(x))


def test_peer_error_the_transformer_lens_hook_of_transcoders(hub):
    """SAELens says ``hook_mlp_in``, the stream before the norm; ours says what the config says."""
    dictionary, config = made("transcoder", "jumprelu")
    place = hub / "gemma-scope-2-1b-it" / GEMMA_SCOPE_2["transcoder"]
    formats.save(place, dictionary, config, format="gemma-scope-2")
    theirs = loaders.gemma_3_sae_huggingface_loader(REPO, GEMMA_SCOPE_2["transcoder"], "cpu")[0]
    assert theirs["hook_name"] == "blocks.5.hook_mlp_in"
    assert theirs["hf_hook_name"] == "model.layers.5.pre_feedforward_layernorm.output"
    assert formats.load(place).config.site == Site("mlp_in", 5)


def test_peer_error_a_clt_layer_is_the_sum_of_its_decoders(hub):
    """Their reconstruction of the first layer against the formula's, in the same measure as ours."""
    layers = makers.multi_weights()
    folder: Path = hub / "gemma-scope-2-1b-it/clt/width_262k_l0_medium"
    makers.multi_folder_2(folder, layers, makers.config_clt())
    (folder / "config.json").unlink()
    theirs = through_saelens(
        *loaders.gemma_3_sae_huggingface_loader(REPO, "clt/width_262k_l0_medium/params_layer_0", "cpu")[:2]
    )
    x = torch.stack([makers.rows(50, seed=i) for i in range(makers.N)], 1)
    right = makers.multi_oracle(layers, x)[:, 0]
    ours = formats.load(folder).dictionary(x)[:, 0].double()
    spread = (right - right.mean(0)).square().sum()
    fvu_theirs = float((theirs(x[:, 0]).double() - right).square().sum() / spread)
    fvu_ours = float((ours - right).square().sum() / spread)
    print(f"\nCLT layer 0, error over spread: SAELens {fvu_theirs:.3f}, gemscope {fvu_ours:.1e}")
    assert fvu_theirs > 0.5
    assert fvu_ours < 1e-9


def test_peer_error_the_bias_of_the_embedding_sae_is_not_scaled(hub):
    """SAELens scales W_enc and W_dec of the embedding SAEs by sqrt(d_model), and leaves b_dec in the table's units."""
    repo, folder = "google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_44"
    tensors = makers.weights(D_IN, D_SAE, D_IN)
    makers.folder_1(hub / "gemma-scope-2b-pt-res" / folder, tensors)
    _, state, _ = loaders.gemma_2_sae_huggingface_loader(
        repo, folder, "cpu", cfg_overrides={"d_in": D_IN, "d_sae": D_SAE}
    )
    ours = formats.load(hub / "gemma-scope-2b-pt-res" / folder).dictionary
    close(state["W_enc"], ours.W_enc)
    close(state["W_dec"], ours.W_dec)
    close(state["b_dec"] * D_IN**0.5, ours.b_dec)
    u = makers.rows(50, D_IN)
    close(ours(u * D_IN**0.5), makers.oracle(tensors, u).float() * D_IN**0.5)
