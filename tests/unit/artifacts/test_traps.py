"""The mistakes that other loaders made with these very files, each as a test that their version of it would fail.

Every test states the right result by its formula, and shows that the mistake gives another: were the mistake made here,
the first assertion would fail.
"""

import pytest
import torch

from gemscope.artifacts import circuit_tracer, formats
from gemscope.core.errors import FormatError
from gemscope.core.sites import Site
from unit.artifacts import makers


def differs(wrong: torch.Tensor, right: torch.Tensor) -> bool:
    """By far more than rounding."""
    return bool((wrong - right).abs().max() > 0.01 * right.abs().max())


def multi_x() -> torch.Tensor:
    return torch.stack([makers.rows(seed=i) for i in range(makers.N)], 1)


def affine(seed: int = 0) -> dict[str, torch.Tensor]:
    """Square, so that a transposed skip connection fits as well."""
    tensors = makers.weights(seed=seed)
    return tensors | {"affine_skip_connection": torch.randn(makers.D_IN, makers.D_IN, generator=makers.generator(7))}


def ours(folder) -> torch.nn.Module:
    return formats.load(folder).dictionary.double()


def test_trap_1_the_skip_connection_applied_transposed(tmp_path):
    """SAELens up to 6.54.0 kept ``affine_skip_connection`` as it is and applied ``x @ W_skip.T``."""
    tensors, x = affine(), makers.rows().double()
    right = makers.oracle(tensors, x)
    folder = makers.folder_2(tmp_path / "x", tensors, makers.config_2("transcoder", affine_connection=True))
    assert (ours(folder)(x) - right).abs().max() < 1e-12
    skip = tensors["affine_skip_connection"].double()
    assert differs(right - x @ skip + x @ skip.T, right)


def test_trap_1_the_same_skip_in_the_layouts_that_do_transpose_it(tmp_path):
    """SAELens and circuit-tracer's sets keep [d_out, d_in], circuit-tracer's CLTs [d_in, d_out]."""
    tensors, x = affine(), makers.rows().double()
    right = makers.oracle(tensors, x)
    lens = makers.config_saelens("jumprelu_skip_transcoder", d_out=makers.D_IN)
    assert (ours(makers.folder_saelens(tmp_path / "a", tensors, lens))(x) - right).abs().max() < 1e-12
    assert (ours(makers.folder_set(tmp_path / "b", [tensors]))(x) - right).abs().max() < 1e-12
    layers = makers.multi_weights(skip=True)
    clt = ours(makers.folder_clt(tmp_path / "c", layers))
    assert (clt(multi_x().double()) - makers.multi_oracle(layers, multi_x())).abs().max() < 1e-12


def test_trap_2_the_hook_that_is_the_stream_before_the_norm(tmp_path):
    """SAELens names ``hook_mlp_in`` for the transcoders of Gemma Scope 2; only its Hugging Face name is right."""
    config = makers.config_saelens("jumprelu_transcoder", d_out=makers.D_IN)
    config["metadata"]["hook_name"] = "blocks.3.hook_mlp_in"
    loaded = formats.load(makers.folder_saelens(tmp_path / "x", makers.weights(), config))
    assert loaded.config.site == Site("mlp_in", 3)
    assert Site("mlp_in", 3) != Site("resid_mid", 3)
    two = formats.load(makers.folder_2(tmp_path / "y", makers.weights(), makers.config_2("transcoder")))
    formats.save(tmp_path / "z", two.dictionary, two.config, format="saelens")
    assert formats.load(tmp_path / "z").config.reads == (Site("mlp_in", 3),)
    assert "hook_mlp_in" not in (tmp_path / "z/cfg.json").read_text()


def test_trap_3_a_clt_loaded_as_the_sum_of_its_decoders(tmp_path):
    """SAELens reads a CLT layer with ``w_dec.sum(dim=1)``: one table that belongs to no layer."""
    layers, x = makers.multi_weights(), multi_x().double()
    right = makers.multi_oracle(layers, x)
    folder = makers.multi_folder_2(tmp_path / "x", layers, makers.config_clt())
    assert (ours(folder)(x) - right).abs().max() < 1e-12
    t = {name: tensor.double() for name, tensor in layers[0].items()}
    acts = makers.jump(x[:, 0] @ t["w_enc"] + t["b_enc"], t["threshold"])
    assert differs(acts @ t["w_dec"].sum(1) + t["b_dec"], right[:, 0])
    with pytest.raises(FormatError):
        formats.load(folder / "params_layer_3.safetensors")


def test_trap_4_the_last_layer_of_a_clt_dropped(tmp_path):
    """circuit-tracer reads ``range(max(layers))`` files, one too few; here a missing file is a refusal."""
    layers, x = makers.multi_weights(), multi_x().double()
    folder = makers.multi_folder_2(tmp_path / "x", layers, makers.config_clt())
    assert formats.load(folder).dictionary.n_positions == makers.N
    without = [t | {"w_dec": t["w_dec"][:, : makers.N - 1]} for t in layers[:-1]]
    right = makers.multi_oracle(layers, x)
    assert makers.multi_oracle(without, x[:, :-1]).shape != right.shape
    assert differs(right[:, -1] - layers[-1]["b_dec"].double(), right[:, -1])
    (folder / f"params_layer_{makers.N - 1}.safetensors").unlink()
    with pytest.raises(FormatError, match=rf"params_layer_{makers.N - 1}.safetensors: .* write to {makers.N} layers"):
        formats.load(folder)


def test_trap_4_the_skip_connection_of_a_clt_lost_when_it_is_saved(tmp_path):
    """circuit-tracer's own layout was written and read without W_skip."""
    layers, x = makers.multi_weights(skip=True), multi_x().double()
    right = makers.multi_oracle(layers, x)
    first = formats.load(makers.multi_folder_2(tmp_path / "a", layers, makers.config_clt(affine_connection=True)))
    formats.save(tmp_path / "b", first.dictionary, first.config, format="circuit-tracer")
    assert (ours(tmp_path / "b")(x) - right).abs().max() < 1e-12
    bare = [{name: t for name, t in layer.items() if name != "affine_skip_connection"} for layer in layers]
    assert differs(makers.multi_oracle(bare, x), right)
    with pytest.raises(FormatError, match="said to be affine"):
        formats.load(makers.multi_folder_2(tmp_path / "c", bare, makers.config_clt(affine_connection=True)))


def test_trap_4_a_skip_in_some_layers_only_is_refused(tmp_path):
    layers = makers.multi_weights(skip=True)
    del layers[1]["affine_skip_connection"]
    with pytest.raises(FormatError, match="lacks affine_skip_connection"):
        formats.load(makers.multi_folder_2(tmp_path / "a", layers, makers.config_clt(affine_connection=True)))
    with pytest.raises(FormatError, match="same tensors"):
        formats.load(makers.folder_clt(tmp_path / "b", layers))


def test_trap_4_the_skip_connection_of_a_clt_added_once(tmp_path):
    """circuit-tracer's ``forward`` adds it after ``decode`` has."""
    layers, x = makers.multi_weights(skip=True), multi_x().double()
    right = makers.multi_oracle(layers, x)
    assert (ours(makers.folder_clt(tmp_path / "x", layers))(x) - right).abs().max() < 1e-12
    skips = torch.stack([x[:, m] @ layers[m]["affine_skip_connection"].double() for m in range(makers.N)], 1)
    assert differs(right + skips, right)


def test_trap_5_a_clt_fed_with_the_residual_stream(tmp_path):
    """The default input hook of circuit-tracer's CLTs is ``hook_resid_mid``; Gemma Scope 2's is the norm's output."""
    loaded = formats.load(makers.multi_folder_2(tmp_path / "x", makers.multi_weights(), makers.config_clt()))
    assert {site.name for site in loaded.config.reads} == {"mlp_in"}
    formats.save(tmp_path / "y", loaded.dictionary, loaded.config, format="circuit-tracer")
    assert "feature_input_hook: mlp.hook_in" in (tmp_path / "y/config.yaml").read_text()
    other = makers.yaml_config("cross_layer_transcoder", feature_input_hook="hook_resid_mid")
    said = formats.load(makers.folder_clt(tmp_path / "z", makers.multi_weights(), other)).config.reads
    assert {site.name for site in said} == {"resid_mid"}


def test_trap_6_attn_out_is_what_enters_o_proj(tmp_path):
    """Their ``attn_out`` is the concatenated heads, not what attention adds to the stream."""
    path = tmp_path / "gemma-scope-2-1b-it/attn_out/layer_7_width_16k_l0_small"
    for config in (None, makers.config_2("attn_out", 7)):
        assert formats.load(makers.folder_2(path, makers.weights(), config)).config.site == Site("z", 7)
        (path / "config.json").unlink(missing_ok=True)


def test_trap_6_a_transcoder_is_affine_only_when_it_has_the_tensor(tmp_path):
    loaded = formats.load(makers.folder_2(tmp_path / "x", makers.weights(), makers.config_2("transcoder")))
    assert loaded.config.kind == "transcoder"
    path = tmp_path / "gemma-scope-2-1b-it/transcoder/layer_7_width_16k_l0_small"
    assert formats.load(makers.folder_2(path, makers.weights(), None)).config.kind == "transcoder"


def test_trap_6_b_dec_subtracted_from_the_input_of_a_transcoder(tmp_path):
    """It lives in the output space; where the widths happen to agree, subtracting it goes unnoticed."""
    tensors, x = makers.weights(), makers.rows().double()
    right = makers.oracle(tensors, x)
    for name, folder in (
        ("gemma-scope-2", makers.folder_2(tmp_path / "a", tensors, makers.config_2("transcoder"))),
        (
            "gemma-scope-1",
            makers.folder_1(tmp_path / "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_9", tensors),
        ),
        ("circuit-tracer", makers.folder_set(tmp_path / "b", [tensors])),
    ):
        assert formats.load(folder).format == name
        assert (ours(folder)(x) - right).abs().max() < 1e-12
    assert differs(makers.oracle(tensors, x - tensors["b_dec"].double()), right)


def test_one_script_reads_the_decoder_by_distance_and_is_wrong(tmp_path):
    """``w_dec[:, target - source, :]``: the axis is the absolute layer in these files, the distance only in ours."""
    layers, x = makers.multi_weights(), multi_x().double()
    loaded = formats.load(makers.multi_folder_2(tmp_path / "x", layers, makers.config_clt()))
    assert torch.equal(loaded.dictionary.W_dec[1][0], layers[1]["w_dec"][:, 1])
    assert torch.equal(loaded.dictionary.W_dec[1][1], layers[1]["w_dec"][:, 2])
    shifted = [t | {"w_dec": t["w_dec"].roll(at, 1)} for at, t in enumerate(layers)]
    assert differs(makers.multi_oracle(shifted, x), makers.multi_oracle(layers, x))


def test_gemma_scope_1_reads_without_the_gain_and_2_with_it(tmp_path):
    one = makers.folder_1(tmp_path / "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_9", makers.weights())
    two = makers.folder_2(tmp_path / "x", makers.weights(), makers.config_2("transcoder"))
    assert [formats.load(folder).config.read_gain for folder in (one, two)] == [False, True]
    set_one = makers.yaml_config("transcoder_set", feature_input_hook="ln2.hook_normalized")
    (loaded,) = circuit_tracer.load_set(makers.folder_set(tmp_path / "y", [makers.weights()], set_one))
    assert not loaded.config.read_gain


def test_the_name_big_means_two_numbers(tmp_path):
    """``l0_big`` is 150 in resid_post and 120 in resid_post_all: the config's number is kept, not the name."""
    for category, l0 in (("resid_post", 150), ("resid_post_all", 120)):
        path = tmp_path / f"gemma-scope-2-1b-it/{category}/layer_13_width_16k_l0_big"
        config = makers.config_2("resid_post", 13, l0=l0, width=16384)
        assert formats.load(makers.folder_2(path, makers.weights(), config)).config.l0 == l0
