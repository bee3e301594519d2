"""From each format to ours on disk and back: the same bits, config and all."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from gemscope.artifacts.convert import convert
from gemscope.artifacts.formats import load, load_all
from unit.artifacts import makers

PLACE = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"


def affine() -> dict[str, torch.Tensor]:
    return makers.weights() | {"affine_skip_connection": torch.randn(6, 6, generator=makers.generator(2))}


def make(name: str, at: Path) -> Path:
    if name == "gemma-scope-2":
        return makers.folder_2(at, affine(), makers.config_2("transcoder", affine_connection=True))
    if name == "gemma-scope-2 crosscoder":
        return makers.multi_folder_2(at, makers.multi_weights(), makers.config_crosscoder())
    if name == "gemma-scope-2 clt":
        return makers.multi_folder_2(at, makers.multi_weights(skip=True), makers.config_clt(affine_connection=True))
    if name == "gemma-scope-1":
        return makers.folder_1(at / PLACE, makers.weights())
    if name == "saelens":
        config = makers.config_saelens("jumprelu_skip_transcoder", d_out=makers.D_IN)
        return makers.folder_saelens(at, affine(), config)
    if name == "circuit-tracer set":
        return makers.folder_set(at, [affine(), affine(), affine()])
    return makers.folder_clt(at, makers.multi_weights(skip=True))


NAMES = [
    "gemma-scope-2",
    "gemma-scope-2 crosscoder",
    "gemma-scope-2 clt",
    "gemma-scope-1",
    "saelens",
    "circuit-tracer set",
    "circuit-tracer clt",
]


@pytest.mark.parametrize("name", NAMES)
def test_to_ours_and_back_is_the_same_bits(tmp_path, name):
    source, format = make(name, tmp_path / "a"), name.split()[0]
    assert convert(source, tmp_path / "ours", "gemscope").lost == ()
    target = tmp_path / "b" / (PLACE if format == "gemma-scope-1" else "")
    done = convert(tmp_path / "ours", target, format)
    assert done.lost == ()
    files = sorted(path.name for path in source.iterdir())
    assert sorted(path.name for path in target.iterdir()) == files
    for file in files:
        if file == "config.json":
            assert json.loads((source / file).read_text()) == json.loads((target / file).read_text())
        elif file == "config.yaml":
            assert yaml.safe_load((source / file).read_text()) == yaml.safe_load((target / file).read_text())
        else:
            assert (source / file).read_bytes() == (target / file).read_bytes(), file


@pytest.mark.parametrize("name", NAMES)
def test_ours_computes_the_same(tmp_path, name):
    source = make(name, tmp_path / "a")
    convert(source, tmp_path / "ours", "gemscope")
    for one, other in zip(load_all(source), load_all(tmp_path / "ours"), strict=True):
        x = torch.randn(5, *([makers.N] if one.dictionary.n_positions > 1 else []), makers.D_IN)
        for name, tensor in one.dictionary.named_parameters():
            assert torch.equal(tensor, other.dictionary.get_parameter(name)), name
        assert torch.allclose(one.dictionary(x), other.dictionary(x), atol=1e-5)
        assert one.config.reads == other.config.reads


def test_a_prefix_of_a_crosscoder_read_from_gemma_scope_2(tmp_path):
    loaded = load(make("gemma-scope-2 crosscoder", tmp_path / "a"))
    assert loaded.dictionary.prefix(4).d_sae == 4
