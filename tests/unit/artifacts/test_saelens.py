"""SAELens' folders, written here in its layout without it: every option it applies when it runs is folded exactly."""

import json

import pytest
import torch

from gemscope.artifacts import formats
from gemscope.core.errors import FormatError, InputError
from gemscope.core.sites import Site
from unit.artifacts import makers


def plain(architecture: str, d_out: int = makers.D_IN, **more) -> dict[str, torch.Tensor]:
    tensors = makers.weights(d_out=d_out) | more
    return tensors if "jumprelu" in architecture else {n: t for n, t in tensors.items() if n != "threshold"}


def formula(tensors, x, threshold=0.0):
    t = {name: tensor.double() for name, tensor in tensors.items()}
    acts = makers.jump(x.double() @ t["w_enc"] + t["b_enc"], torch.as_tensor(threshold, dtype=torch.float64))
    recon = acts @ t["w_dec"] + t["b_dec"]
    return recon + x.double() @ t["affine_skip_connection"] if "affine_skip_connection" in t else recon


CASES = {
    "standard": ("sae", "relu"),
    "jumprelu": ("sae", "jumprelu"),
    "transcoder": ("transcoder", "relu"),
    "skip_transcoder": ("skip_transcoder", "relu"),
    "jumprelu_transcoder": ("transcoder", "jumprelu"),
    "jumprelu_skip_transcoder": ("skip_transcoder", "jumprelu"),
}


def case(tmp_path, architecture):
    is_transcoder = "transcoder" in architecture
    d_out = makers.D_OUT if is_transcoder else makers.D_IN
    more = {"affine_skip_connection": torch.randn(makers.D_IN, d_out)} if "skip" in architecture else {}
    tensors = plain(architecture, d_out, **more)
    config = makers.config_saelens(architecture, d_out=d_out if is_transcoder else None)
    return tensors, makers.folder_saelens(tmp_path / architecture, tensors, config)


@pytest.mark.parametrize("architecture", CASES)
def test_each_architecture_computes_its_formula(tmp_path, architecture):
    tensors, folder = case(tmp_path, architecture)
    loaded = formats.load(folder)
    assert (loaded.config.kind, loaded.config.activation.kind) == CASES[architecture]
    assert loaded.config.site == (Site("mlp_in", 3) if "transcoder" in architecture else Site("resid_post", 3))
    assert loaded.warnings == ()
    x = makers.rows()
    want = formula(tensors, x, tensors.get("threshold", 0.0))
    assert (loaded.dictionary.double()(x.double()) - want).abs().max() < 1e-12


@pytest.mark.parametrize("architecture", CASES)
def test_there_and_back_is_the_same_bytes(tmp_path, architecture):
    _, folder = case(tmp_path, architecture)
    loaded = formats.load(folder)
    assert formats.save(tmp_path / "y", loaded.dictionary, loaded.config, format="saelens") == ()
    makers.same_files(folder, tmp_path / "y", "sae_weights.safetensors", "cfg.json")


def test_topk_there_and_back(tmp_path):
    config = makers.config_saelens("topk", k=3, rescale_acts_by_decoder_norm=False)
    tensors = plain("topk")
    folder = makers.folder_saelens(tmp_path / "x", tensors, config)
    loaded = formats.load(folder)
    assert loaded.config.activation.top == 3
    x = makers.rows()
    pre = x @ tensors["w_enc"] + tensors["b_enc"]
    best = pre.topk(3, dim=-1)
    want = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    assert torch.allclose(loaded.dictionary.encode(x), want, atol=1e-6)
    formats.save(tmp_path / "y", loaded.dictionary, loaded.config, format="saelens")
    makers.same_files(folder, tmp_path / "y", "sae_weights.safetensors", "cfg.json")


def test_a_decoder_bias_that_is_subtracted_from_the_input_is_folded(tmp_path):
    tensors = plain("jumprelu")
    folder = makers.folder_saelens(
        tmp_path / "x", tensors, makers.config_saelens("jumprelu", apply_b_dec_to_input=True)
    )
    loaded = formats.load(folder)
    assert "apply_b_dec_to_input" in loaded.warnings[0]
    x = makers.rows()
    t = {name: tensor.double() for name, tensor in tensors.items()}
    acts = makers.jump((x.double() - t["b_dec"]) @ t["w_enc"] + t["b_enc"], t["threshold"])
    assert torch.allclose(loaded.dictionary(x).double(), acts @ t["w_dec"] + t["b_dec"], atol=1e-5)


def test_the_bias_of_a_transcoder_is_never_subtracted_from_its_input(tmp_path):
    """It lives in the output space; SAELens refuses the option, and an absent option means the same."""
    config = makers.config_saelens("jumprelu_transcoder", d_out=makers.D_IN)
    del config["apply_b_dec_to_input"]
    tensors = plain("jumprelu")
    loaded = formats.load(makers.folder_saelens(tmp_path / "x", tensors, config))
    x = makers.rows()
    assert (loaded.dictionary.double()(x.double()) - makers.oracle(tensors, x)).abs().max() < 1e-12


@pytest.mark.parametrize("subtract", [False, True])
def test_activations_in_units_of_the_decoder_row_are_folded(tmp_path, subtract):
    config = makers.config_saelens("topk", k=3, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=subtract)
    tensors = plain("topk")
    loaded = formats.load(makers.folder_saelens(tmp_path / "x", tensors, config))
    x = makers.rows()
    t = {name: tensor.double() for name, tensor in tensors.items()}
    norms = t["w_dec"].norm(dim=-1)
    pre = ((x.double() - t["b_dec"] * subtract) @ t["w_enc"] + t["b_enc"]) * norms
    best = pre.topk(3, dim=-1)
    acts = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    assert torch.allclose(loaded.dictionary.encode(x).double(), acts, atol=1e-5)
    want = (acts / norms) @ t["w_dec"] + t["b_dec"]
    assert torch.allclose(loaded.dictionary(x).double(), want, atol=1e-5)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_training_checkpoint_of_batchtopk_has_its_inference_threshold(tmp_path, architecture):
    config = makers.config_saelens(
        architecture, k=2.5, rescale_acts_by_decoder_norm=False, matryoshka_widths=[4, makers.D_SAE]
    )
    tensors = plain(architecture) | {"topk_threshold": torch.tensor(0.4, dtype=torch.float64)}
    loaded = formats.load(makers.folder_saelens(tmp_path / "x", tensors, config))
    assert (loaded.config.activation.kind, loaded.config.activation.k) == ("batchtopk", 2.5)
    assert loaded.config.prefixes == (4,)
    x = makers.rows()
    tensors.pop("topk_threshold")
    assert torch.allclose(loaded.dictionary(x).double(), formula(tensors, x, 0.4), atol=1e-5)
    lost = formats.save(tmp_path / "y", loaded.dictionary, loaded.config, format="saelens")
    assert "BatchTopK's k (2.5)" in lost[0]
    again = formats.load(tmp_path / "y")
    assert (again.config.activation.kind, again.config.prefixes) == ("jumprelu", (4,))
    assert torch.equal(again.dictionary(x), loaded.dictionary(x))


def test_what_ours_knows_more_survives_in_the_metadata(tmp_path):
    from dataclasses import replace

    _, folder = case(tmp_path, "jumprelu")
    loaded = formats.load(folder)
    more = replace(
        loaded.config,
        l0=12.0,
        prefixes=(4, 8),
        revision="abc",
        provenance={"seed": 3},
        extra={"evaluation": {"fvu": 0.1}},
    )
    assert formats.save(tmp_path / "y", loaded.dictionary, more, format="saelens") == ()
    again = formats.load(tmp_path / "y").config
    assert (again.l0, again.prefixes, again.revision, again.provenance) == (12.0, (4, 8), "abc", {"seed": 3})
    assert again.extra["evaluation"] == {"fvu": 0.1}


def test_the_hugging_face_hook_is_believed(tmp_path):
    """The TransformerLens hook of its Gemma Scope 2 transcoders is the residual stream before the norm."""
    config = makers.config_saelens("jumprelu_transcoder", d_out=makers.D_IN)
    config["metadata"]["hook_name"] = "blocks.3.hook_mlp_in"
    loaded = formats.load(makers.folder_saelens(tmp_path / "x", plain("jumprelu"), config))
    assert loaded.config.site == Site("mlp_in", 3)
    assert loaded.config.read_gain
    assert "hook_mlp_in" in loaded.warnings[0]
    del config["metadata"]["hf_hook_name"]
    loaded = formats.load(makers.folder_saelens(tmp_path / "y", plain("jumprelu"), config))
    assert loaded.config.site == Site("resid_mid", 3)
    config["metadata"]["hook_name"] = "blocks.3.ln2.hook_normalized"
    loaded = formats.load(makers.folder_saelens(tmp_path / "z", plain("jumprelu"), config))
    assert (loaded.config.site, loaded.config.read_gain) == (Site("mlp_in", 3), False)
    formats.save(tmp_path / "w", loaded.dictionary, loaded.config, format="saelens")
    assert not formats.load(tmp_path / "w").config.read_gain


def test_a_config_from_before_version_6(tmp_path):
    tensors = plain("standard")
    config = {
        "d_in": makers.D_IN,
        "d_sae": makers.D_SAE,
        "dtype": "float32",
        "model_name": "google/gemma-2-2b",
        "hook_point": "blocks.5.hook_resid_post",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
        "apply_b_dec_to_input": False,
        "normalize_activations": False,
    }
    loaded = formats.load(makers.folder_saelens(tmp_path / "x", tensors, config))
    assert (loaded.config.site, loaded.config.activation.top) == (Site("resid_post", 5), 4)
    old = {**config, "activation_fn_str": "tanh-relu"}
    with pytest.raises(FormatError, match="tanh-relu"):
        formats.load(makers.folder_saelens(tmp_path / "y", tensors, old))


REFUSED = {
    "gated": ({"architecture": "gated"}, "two encoders"),
    "temporal": ({"architecture": "temporal"}, "several tokens"),
    "unknown": ({"architecture": "mystery"}, "gemscope reads"),
    "row norm": ({"normalize_activations": "layer_norm"}, "each row"),
    "row length": ({"normalize_activations": "constant_norm_rescale"}, "each row"),
    "other norm": ({"normalize_activations": "zscore"}, "not known"),
    "sizes": ({"d_sae": 12}, "d_sae"),
    "option": ({"apply_b_dec_to_input": "yes"}, "true or false"),
    "metadata": ({"metadata": 4}, "metadata"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_with_a_reason(tmp_path, name):
    changes, word = REFUSED[name]
    config = makers.config_saelens("jumprelu") | changes
    folder = makers.folder_saelens(tmp_path / "x", plain("jumprelu"), config)
    with pytest.raises(FormatError, match=word):
        formats.load(folder)


def test_a_normalisation_that_saelens_does_not_apply_is_read_as_folded(tmp_path):
    config = makers.config_saelens("jumprelu", normalize_activations="expected_average_only_in")
    loaded = formats.load(makers.folder_saelens(tmp_path / "x", plain("jumprelu"), config))
    assert "folded in" in loaded.warnings[0]


def test_a_clt_has_no_place_in_saelens(tmp_path):
    loaded = formats.load(makers.multi_folder_2(tmp_path / "c", makers.multi_weights(), makers.config_clt()))
    with pytest.raises(InputError, match="SAELens has no clt"):
        formats.save(tmp_path / "y", loaded.dictionary, loaded.config, format="saelens")


def test_the_config_that_is_written_has_saelens_names(tmp_path):
    loaded = formats.load(makers.folder_2(tmp_path / "x", makers.weights(), makers.config_2("transcoder")))
    formats.save(tmp_path / "y", loaded.dictionary, loaded.config, format="saelens")
    config = json.loads((tmp_path / "y/cfg.json").read_text())
    assert config["architecture"] == "jumprelu_transcoder"
    assert not config["apply_b_dec_to_input"]
    assert config["metadata"]["hf_hook_name"] == "model.layers.3.pre_feedforward_layernorm.output"
    assert config["metadata"]["hook_name_out"] == "blocks.3.hook_mlp_out"
