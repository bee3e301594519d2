"""circuit-tracer's folders, against its documented keys and formulas: it is not on the package index."""

import pytest
import torch
import yaml

from gemscope.artifacts import circuit_tracer, formats
from gemscope.core.errors import FormatError, InputError
from gemscope.core.sites import Site
from unit.artifacts import makers


def layers(skip=True, threshold=True):
    found = []
    for at in range(makers.N):
        t = makers.weights(d_out=makers.D_IN, seed=at)
        if skip:
            t["affine_skip_connection"] = torch.randn(makers.D_IN, makers.D_IN, generator=makers.generator(at))
        if not threshold:
            del t["threshold"]
        found.append(t)
    return found


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("threshold", [False, True])
def test_every_layer_of_a_set_computes_its_formula(tmp_path, skip, threshold):
    given = layers(skip, threshold)
    found = circuit_tracer.load_set(makers.folder_set(tmp_path / "x", given))
    assert [one.config.site for one in found] == [Site("mlp_in", i) for i in range(makers.N)]
    for t, one in zip(given, found, strict=True):
        assert one.config.kind == ("skip_transcoder" if skip else "transcoder")
        x = makers.rows()
        want = makers.oracle({"threshold": torch.zeros(makers.D_SAE)} | t, x)
        assert (one.dictionary.double()(x.double()) - want).abs().max() < 1e-12


@pytest.mark.parametrize("skip", [False, True])
def test_a_set_there_and_back_is_the_same_bytes(tmp_path, skip):
    folder = makers.folder_set(tmp_path / "x", layers(skip))
    assert formats.save_all(tmp_path / "y", formats.load_all(folder), format="circuit-tracer") == ()
    makers.same_files(folder, tmp_path / "y", "config.yaml", *(f"layer_{i}.safetensors" for i in range(makers.N)))


def test_one_layer_of_a_set_is_named_by_its_file(tmp_path):
    folder = makers.folder_set(tmp_path / "x", layers())
    assert formats.load(folder / "layer_2.safetensors").config.site == Site("mlp_in", 2)
    with pytest.raises(FormatError, match=r"set of 3 transcoders; name one .*layer_0.safetensors"):
        formats.load(folder)


def test_the_hook_says_whether_the_gain_is_in_the_input(tmp_path):
    config = makers.yaml_config("transcoder_set", feature_input_hook="ln2.hook_normalized")
    found = circuit_tracer.load_set(makers.folder_set(tmp_path / "x", layers(), config))
    assert not found[0].config.read_gain
    formats.save_all(tmp_path / "y", found, format="circuit-tracer")
    assert yaml.safe_load((tmp_path / "y/config.yaml").read_text())["feature_input_hook"] == "ln2.hook_normalized"
    config = makers.yaml_config("transcoder_set", feature_input_hook="hook_resid_mid")
    found = circuit_tracer.load_set(makers.folder_set(tmp_path / "z", layers(), config))
    assert found[0].config.site == Site("resid_mid", 0)


@pytest.mark.parametrize("skip", [False, True])
def test_a_clt_computes_the_formula(tmp_path, skip):
    given = makers.multi_weights(skip=skip)
    loaded = formats.load(makers.folder_clt(tmp_path / "x", given))
    assert loaded.config.kind == "clt"
    x = torch.stack([makers.rows(seed=i) for i in range(makers.N)], 1)
    assert (loaded.dictionary.double()(x.double()) - makers.multi_oracle(given, x)).abs().max() < 1e-12


@pytest.mark.parametrize("skip", [False, True])
def test_a_clt_there_and_back_is_the_same_bytes(tmp_path, skip):
    folder = makers.folder_clt(tmp_path / "x", makers.multi_weights(skip=skip))
    loaded = formats.load(folder)
    assert formats.save(tmp_path / "y", loaded.dictionary, loaded.config, format="circuit-tracer") == ()
    names = [f"W_{part}_{i}.safetensors" for part in ("enc", "dec") for i in range(makers.N)]
    makers.same_files(folder, tmp_path / "y", "config.yaml", *names)


def test_bf16_stays_bf16(tmp_path):
    given = [{name: t.bfloat16() for name, t in layer.items()} for layer in makers.multi_weights(skip=True)]
    folder = makers.folder_clt(tmp_path / "x", given)
    loaded = formats.load(folder)
    assert loaded.config.dtype == "bfloat16"
    formats.save(tmp_path / "y", loaded.dictionary, loaded.config, format="circuit-tracer")
    makers.same_files(folder, tmp_path / "y", *(f"W_dec_{i}.safetensors" for i in range(makers.N)))


def test_gemma_scope_2_goes_through_circuit_tracer_and_back(tmp_path):
    given = makers.multi_weights(skip=True)
    first = makers.multi_folder_2(tmp_path / "a", given, makers.config_clt(affine_connection=True))
    loaded = formats.load(first)
    formats.save(tmp_path / "b", loaded.dictionary, loaded.config, format="circuit-tracer")
    again = formats.load(tmp_path / "b")
    formats.save(tmp_path / "c", again.dictionary, again.config, format="gemma-scope-2")
    makers.same_files(first, tmp_path / "c", *(f"params_layer_{i}.safetensors" for i in range(makers.N)))


WRONG = {
    "no kind": (lambda c: c.pop("model_kind"), "model_kind"),
    "elsewhere": (lambda c: c.update(transcoders=["hf://a/b/params.npz"]), "lie elsewhere"),
    "outside": (lambda c: c.update(transcoders=["../../etc/passwd"]), "lie elsewhere"),
    "hook": (lambda c: c.update(feature_input_hook="hook_nothing"), "hook name"),
    "no hook": (lambda c: c.pop("feature_output_hook"), "hook name"),
    "activation": (lambda c: c.update(activation="gelu"), "gelu"),
    "relu with threshold": (lambda c: c.update(activation="relu"), "relu"),
    "model": (lambda c: c.update(model_name=[1]), "model_name"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_config_that_cannot_be_is_refused(tmp_path, name):
    change, word = WRONG[name]
    config = makers.yaml_config("transcoder_set")
    change(config)
    folder = makers.folder_set(tmp_path / "x", layers(), config)
    with pytest.raises(FormatError, match=word):
        circuit_tracer.load_set(folder)


def test_a_yaml_that_wants_to_make_objects_is_refused(tmp_path):
    folder = makers.folder_set(tmp_path / "x", layers())
    (folder / "config.yaml").write_text("model_kind: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(FormatError, match="not valid YAML"):
        circuit_tracer.load_set(folder)


def test_what_is_no_transcoder_is_refused(tmp_path):
    loaded = formats.load(makers.folder_2(tmp_path / "x", makers.weights(), makers.config_2("resid_post")))
    with pytest.raises(InputError, match="replaces MLPs"):
        formats.save(tmp_path / "y", loaded.dictionary, loaded.config, format="circuit-tracer")
