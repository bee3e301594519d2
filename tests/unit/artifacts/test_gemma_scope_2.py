"""Gemma Scope 2's files: every kind, odd and missing configs, and the way back bit by bit."""

import json
from dataclasses import replace

import pytest
import torch

from gemscope.artifacts import formats, gemma_scope_2
from gemscope.artifacts.examples import Examples
from gemscope.core.errors import FormatError, InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.sae import SAE
from unit.artifacts import makers

CATEGORIES = {
    "resid_post": ("resid_post", "resid_post"),
    "attn_out": ("z", "z"),
    "mlp_out": ("mlp_out", "mlp_out"),
    "transcoder": ("mlp_in", "mlp_out"),
}


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_folder_is_read_at_its_site_and_computes_the_formula(tmp_path, category):
    tensors = makers.weights()
    folder = makers.folder_2(tmp_path / "x", tensors, makers.config_2(category))
    loaded = formats.load(folder)
    into, out = CATEGORIES[category]
    assert (loaded.config.reads, loaded.config.writes) == ((Site(into, 3),), (Site(out, 3),))
    assert (loaded.format, loaded.config.model, loaded.config.l0) == ("gemma-scope-2", "google/gemma-3-1b-it", 10)
    assert loaded.config.kind == ("transcoder" if category == "transcoder" else "sae")
    assert loaded.warnings == ()
    x = makers.rows()
    assert torch.allclose(loaded.dictionary(x).double(), makers.oracle(tensors, x), atol=1e-5)
    exact = loaded.dictionary.double()
    assert (exact(x.double()) - makers.oracle(tensors, x)).abs().max() < 1e-12


def test_the_skip_connection_is_not_transposed(tmp_path):
    tensors = makers.weights(d_out=makers.D_OUT)
    tensors["affine_skip_connection"] = torch.randn(makers.D_IN, makers.D_OUT)
    loaded = formats.load(
        makers.folder_2(tmp_path / "x", tensors, makers.config_2("transcoder", affine_connection=True))
    )
    x = makers.rows()
    assert loaded.config.kind == "skip_transcoder"
    assert torch.allclose(loaded.dictionary(x).double(), makers.oracle(tensors, x), atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_a_clt_sums_over_earlier_layers_only(tmp_path, skip):
    layers = makers.multi_weights(skip=skip)
    loaded = formats.load(makers.multi_folder_2(tmp_path / "c", layers, makers.config_clt(affine_connection=skip)))
    assert loaded.config.kind == "clt"
    assert loaded.config.model == "google/gemma-3-270m"
    assert loaded.config.reads == tuple(Site("mlp_in", i) for i in range(makers.N))
    assert loaded.config.writes == tuple(Site("mlp_out", i) for i in range(makers.N))
    x = torch.stack([makers.rows(seed=i) for i in range(makers.N)], 1)
    assert (loaded.dictionary.double()(x.double()) - makers.multi_oracle(layers, x)).abs().max() < 1e-12


def test_a_crosscoder_knows_its_layers(tmp_path):
    layers = makers.multi_weights()
    loaded = formats.load(makers.multi_folder_2(tmp_path / "c", layers, makers.config_crosscoder()))
    assert loaded.config.kind == "crosscoder"
    assert [site.layer for site in loaded.config.reads] == [5, 9, 12]
    x = torch.stack([makers.rows(seed=i) for i in range(makers.N)], 1)
    assert (loaded.dictionary.double()(x.double()) - makers.multi_oracle(layers, x)).abs().max() < 1e-12


@pytest.mark.parametrize("spelling", ["model.layers.{all}.pre_feedforward_layernorm.output", None])
def test_a_clt_may_say_all(tmp_path, spelling):
    into = spelling or "model.layers.{0, 1, 2}.pre_feedforward_layernorm.output"
    config = makers.config_clt(hf_hook_point_in=into)
    loaded = formats.load(makers.multi_folder_2(tmp_path / "c", makers.multi_weights(), config))
    assert len(loaded.config.reads) == makers.N


def test_the_total_width_of_a_clt_may_be_rounded_as_in_the_release(tmp_path):
    """262,144 / 18 layers is 14,560 latents each, and the config says 262,080."""
    layers, wrong = makers.multi_weights(), makers.config_clt(width=makers.N * makers.D_SAE + 1)
    assert formats.load(makers.multi_folder_2(tmp_path / "a", layers, makers.config_clt())).warnings == ()
    (warning,) = formats.load(makers.multi_folder_2(tmp_path / "b", layers, wrong)).warnings
    assert "34 latents" in warning
    assert "33" in warning


PATHS = [
    ("gemma-scope-2-4b-it/transcoder_all/layer_5_width_16k_l0_big_affine", "mlp_in.5", "google/gemma-3-4b-it"),
    (
        "models--google--gemma-scope-2-270m-pt/x/resid_post_all/layer_9_width_16k_l0_small",
        "resid_post.9",
        "google/gemma-3-270m",
    ),
    ("gemma-scope-2-12b-pt/attn_out/layer_24_width_65k_l0_medium", "z.24", "google/gemma-3-12b-pt"),
    ("gemma-scope-2-27b-it/mlp_out/layer_40_width_262k_l0_medium", "mlp_out.40", "google/gemma-3-27b-it"),
    ("gemma-scope-2-1b-pt/resid_post/layer_22_width_262k_l0_medium_seed_1", "resid_post.22", "google/gemma-3-1b-pt"),
]


@pytest.mark.parametrize(("path", "site", "model"), PATHS)
def test_a_missing_config_is_read_off_the_path(tmp_path, path, site, model):
    tensors = makers.weights()
    if "affine" in path:
        tensors["affine_skip_connection"] = torch.eye(makers.D_IN)
    loaded = formats.load(makers.folder_2(tmp_path / path, tensors, None))
    assert str(loaded.config.site) == site
    assert loaded.config.model == model
    assert "read off its path" in loaded.warnings[0]


TARGETS = [
    ("1b-pt/resid_post/layer_4_width_65k_l0_medium", 43),  # 30 + 30 * 4 / (26 / 3), rounded down
    ("1b-pt/resid_post/layer_22_width_65k_l0_big", 150),
    ("1b-pt/resid_post_all/layer_22_width_16k_l0_big", 120),
    ("4b-it/mlp_out_all/layer_0_width_262k_l0_small", 10),
    ("1b-pt/resid_post/layer_22_width_65k_l0_vast", None),
    ("1b-pt/resid_post/layer_99_width_65k_l0_big", None),
]


@pytest.mark.parametrize(("path", "l0"), TARGETS)
def test_the_l0_target_of_a_missing_config_is_that_of_the_rule(tmp_path, path, l0):
    folder = makers.folder_2(tmp_path / f"gemma-scope-2-{path}", makers.weights(), None)
    assert formats.load(folder).config.l0 == l0
    assert ("L0 target were read off" in formats.load(folder).warnings[0]) == (l0 is not None)
    elsewhere = makers.folder_2(tmp_path / path, makers.weights(), None)
    assert formats.load(elsewhere, model="google/gemma-3-1b-pt").config.l0 is None  # of a model of unknown depth


@pytest.mark.parametrize(("said", "l0"), [({"l0": 70}, 70), ({"l0": None}, None), ({}, 60)])
def test_the_config_wins_over_the_path(tmp_path, said, l0):
    config = {name: value for name, value in makers.config_2("resid_post", 22).items() if name != "l0"} | said
    path = tmp_path / "gemma-scope-2-1b-pt/resid_post/layer_22_width_65k_l0_medium"
    assert formats.load(makers.folder_2(path, makers.weights(), config)).config.l0 == l0


def test_multi_layer_paths_without_config(tmp_path):
    layers = makers.multi_weights()
    clt = tmp_path / "gemma-scope-2-270m-pt/clt/width_262k_l0_medium"
    assert formats.load(makers.multi_folder_2(clt, layers, None)).config.kind == "clt"
    assert formats.load(clt).config.l0 == 50
    cross = tmp_path / "gemma-scope-2-270m-pt/crosscoder/layer_5_9_12_width_65k_l0_medium"
    loaded = formats.load(makers.multi_folder_2(cross, layers, None))
    assert [str(site) for site in loaded.config.reads] == ["resid_post.5", "resid_post.9", "resid_post.12"]


@pytest.mark.parametrize(
    "spelling", ["gemma-v3-1b-it", "gemma-3-1b-it", "google/gemma-v3-1b-it", "google/gemma-3-1b-it"]
)
def test_odd_model_names_are_the_hub_id(tmp_path, spelling):
    folder = makers.folder_2(tmp_path / "x", makers.weights(), makers.config_2("resid_post", model_name=spelling))
    assert formats.load(folder).config.model == "google/gemma-3-1b-it"
    formats.save(tmp_path / "y", *_pair(formats.load(folder)), format="gemma-scope-2")
    assert json.loads((tmp_path / "y/config.json").read_text())["model_name"] == spelling


def _pair(loaded):
    return loaded.dictionary, loaded.config


@pytest.mark.parametrize("category", CATEGORIES)
def test_there_and_back_is_the_same_bytes(tmp_path, category):
    tensors = makers.weights()
    if category == "transcoder":
        tensors["affine_skip_connection"] = torch.randn(makers.D_IN, makers.D_IN)
    config = makers.config_2(category, affine_connection=category == "transcoder")
    folder = makers.folder_2(tmp_path / "x", tensors, config)
    assert formats.save(tmp_path / "y", *_pair(formats.load(folder)), format="gemma-scope-2") == ()
    makers.same_files(folder, tmp_path / "y", "params.safetensors")
    assert json.loads((tmp_path / "y/config.json").read_text()) == config


@pytest.mark.parametrize(
    "config", [makers.config_clt(), makers.config_clt(affine_connection=True), makers.config_crosscoder()]
)
def test_multi_layer_there_and_back_is_the_same_bytes(tmp_path, config):
    layers = makers.multi_weights(skip=config["affine_connection"])
    folder = makers.multi_folder_2(tmp_path / "x", layers, config)
    assert formats.save(tmp_path / "y", *_pair(formats.load(folder)), format="gemma-scope-2") == ()
    makers.same_files(folder, tmp_path / "y", *(f"params_layer_{i}.safetensors" for i in range(makers.N)))
    assert json.loads((tmp_path / "y/config.json").read_text()) == config


def test_metadata_of_the_weights_file_is_kept(tmp_path):
    from safetensors.torch import save_file

    folder = makers.folder_2(tmp_path / "x", makers.weights(), makers.config_2("resid_post"))
    save_file(makers.weights(), folder / "params.safetensors", {"format": "pt"})
    formats.save(tmp_path / "y", *_pair(formats.load(folder)), format="gemma-scope-2")
    makers.same_files(folder, tmp_path / "y", "params.safetensors")


def test_what_does_not_fit_is_said_or_refused(tmp_path):
    folder = makers.folder_2(tmp_path / "x", makers.weights(), makers.config_2("resid_post"))
    dictionary, config = _pair(formats.load(folder))
    more = replace(config, revision="abc", provenance={"seed": 1}, extra={"evaluation": {}}, prefixes=(4,))
    lost = gemma_scope_2.save(tmp_path / "y", dictionary, more)
    assert [any(word in note for note in lost) for word in ("abc", "provenance", "evaluation", "[4]")] == [True] * 4
    top = SAE(
        *(getattr(dictionary, n).data for n in ("W_enc", "b_enc", "W_dec", "b_dec")), activation=Activation("topk", 3.0)
    )
    with pytest.raises(InputError, match="TopK"):
        gemma_scope_2.save(tmp_path / "z", top, replace(config, activation=top.activation))
    with pytest.raises(InputError, match="gain"):
        gemma_scope_2.save(tmp_path / "z", dictionary, replace(config, read_gain=False))
    assert not (tmp_path / "z").exists()


def test_a_relu_is_the_same_function_with_thresholds_of_zero(tmp_path):
    folder = makers.folder_2(tmp_path / "x", makers.weights(), makers.config_2("resid_post"))
    dictionary, config = _pair(formats.load(folder))
    relu = SAE(
        *(getattr(dictionary, n).data for n in ("W_enc", "b_enc", "W_dec", "b_dec")), activation=Activation("relu")
    )
    (note,) = gemma_scope_2.save(tmp_path / "y", relu, replace(config, activation=relu.activation))
    assert "ReLU" in note
    assert torch.equal(formats.load(tmp_path / "y").dictionary(makers.rows()), relu(makers.rows()))


WRONG = {
    "architecture": ({"architecture": "topk"}, "jump_relu"),
    "type": ({"type": "thing"}, "crosscoder"),
    "affine": ({"affine_connection": True}, "affine"),
    "not a hook": ({"hf_hook_point_in": "model.layers.3.nothing.output"}, "hook point"),
    "many layers": ({"hf_hook_point_in": "model.layers.{1,2}.output"}, "hook point"),
    "negative l0": ({"l0": -1}, "l0"),
    "text width": ({"width": "16k"}, "width"),
    "no name": ({"model_name": 7}, "model_name"),
    "kind and hooks": ({"type": "transcoder"}, "transcoder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_config_that_contradicts_is_refused(tmp_path, case):
    changes, word = WRONG[case]
    folder = makers.folder_2(tmp_path / "x", makers.weights(), makers.config_2("resid_post", **changes))
    with pytest.raises(FormatError, match=word):
        formats.load(folder)


def test_config_and_path_that_differ_are_said(tmp_path):
    path = tmp_path / "gemma-scope-2-1b-it/resid_post/layer_7_width_16k_l0_small"
    (warning, _) = formats.load(
        makers.folder_2(path, makers.weights(), makers.config_2("resid_post", width=16384))
    ).warnings
    assert "resid_post.7" in warning


def test_a_skip_that_the_config_denies_is_used_and_said(tmp_path):
    tensors = makers.weights() | {"affine_skip_connection": torch.eye(makers.D_IN)}
    loaded = formats.load(makers.folder_2(tmp_path / "x", tensors, makers.config_2("transcoder")))
    assert loaded.config.kind == "skip_transcoder"
    assert "it was used" in loaded.warnings[0]


def test_numbers_in_the_unused_half_are_ignored_and_said(tmp_path):
    layers = makers.multi_weights()
    layers[2]["w_dec"][:, 0] = 1.0
    loaded = formats.load(makers.multi_folder_2(tmp_path / "x", layers, makers.config_clt()))
    assert any("does not use them" in note for note in loaded.warnings)
    x = torch.stack([makers.rows(seed=i) for i in range(makers.N)], 1)
    assert (loaded.dictionary.double()(x.double()) - makers.multi_oracle(layers, x)).abs().max() < 1e-12
    formats.save(tmp_path / "y", *_pair(loaded), format="gemma-scope-2")
    from safetensors.torch import load_file

    assert load_file(tmp_path / "y/params_layer_2.safetensors")["w_dec"][:, :2].abs().max() == 0


def test_negative_thresholds_act_as_zero_like_the_official_relu(tmp_path):
    tensors = makers.weights()
    tensors["threshold"][:3] = -0.5
    loaded = formats.load(makers.folder_2(tmp_path / "x", tensors, makers.config_2("resid_post")))
    assert "3 thresholds" in loaded.warnings[0]
    x = makers.rows()
    pre = x @ tensors["w_enc"] + tensors["b_enc"]
    official = torch.relu(pre) * (pre > tensors["threshold"])
    assert torch.allclose(loaded.dictionary.encode(x), official, atol=1e-6)


def examples(d_sae: int = makers.D_SAE) -> dict[str, torch.Tensor]:
    g = makers.generator(3)
    seq_ids = torch.randint(0, 5, (d_sae, 9), generator=g)
    seq_ids[2, 4:] = -1
    return {
        "activations": torch.rand(d_sae, 9, generator=g),
        "seq_ids": seq_ids,
        "positions": torch.randint(0, 8, (d_sae, 9), generator=g, dtype=torch.int32),
        "logit_effects": torch.randn(d_sae, 9, generator=g),
        "top_logits": torch.randn(d_sae, 4, generator=g),
        "bottom_logits": torch.randn(d_sae, 4, generator=g),
        "top_tokens": torch.randint(0, 99, (d_sae, 4), generator=g, dtype=torch.int32),
        "bottom_tokens": torch.randint(0, 99, (d_sae, 4), generator=g, dtype=torch.int32),
        "feature_frequencies": torch.rand(d_sae, generator=g, dtype=torch.float64),
        "tokens": torch.randint(0, 99, (5, 8), generator=g, dtype=torch.int32),
    }


def test_the_evidence_of_one_latent(tmp_path):
    from safetensors.torch import save_file

    tensors = examples()
    save_file(tensors, tmp_path / "examples.safetensors")
    evidence = Examples.open(tmp_path)
    assert (evidence.d_sae, evidence.kept, evidence.sequences, evidence.pos) == (makers.D_SAE, 9, 5, 8)
    got = evidence.of(2, top=3)
    best = tensors["activations"][2, :4].sort(descending=True)
    assert torch.equal(got.activations, best.values[:3])
    assert torch.equal(got.tokens, tensors["tokens"][tensors["seq_ids"][2, best.indices[:3]]].long())
    assert torch.equal(got.positions, tensors["positions"][2, best.indices[:3]].long())
    assert got.density == tensors["feature_frequencies"][2].item()
    assert [token for token, _ in got.promoted] == tensors["top_tokens"][2].tolist()
    with pytest.raises(InputError, match="no latent 11"):
        evidence.of(11)


def test_evidence_that_points_nowhere_is_refused(tmp_path):
    from safetensors.torch import save_file

    tensors = examples()
    tensors["seq_ids"][4, 0] = 99
    save_file(tensors, tmp_path / "examples.safetensors")
    with pytest.raises(FormatError, match="outside"):
        Examples.open(tmp_path).of(4)
    save_file(tensors | {"tokens": tensors["tokens"].float()}, tmp_path / "examples.safetensors")
    with pytest.raises(FormatError, match="whole numbers"):
        Examples.open(tmp_path)
