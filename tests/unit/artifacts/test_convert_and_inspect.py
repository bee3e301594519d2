"""``inspect`` and ``convert``: what a dictionary is, what is lost, and that nothing but the new folder is written."""

import json
from pathlib import Path

import pytest
import torch

from gemscope.artifacts import formats
from gemscope.artifacts.convert import convert
from gemscope.artifacts.inspect import inspect
from gemscope.cli import artifacts as cli
from gemscope.core.errors import FormatError, InputError, StorageError
from unit.artifacts import makers


@pytest.fixture
def sae(tmp_path) -> Path:
    return makers.folder_2(tmp_path / "in/sae", makers.weights(), makers.config_2("resid_post"))


def test_inspect_says_what_it_is(tmp_path, sae):
    found = inspect(sae)
    tensors = makers.weights()
    assert (found.kind, found.activation, found.format, found.reads) == (
        "sae",
        "jumprelu",
        "gemma-scope-2",
        ("resid_post.3",),
    )
    assert (found.d_in, found.d_sae, found.l0, found.model) == (makers.D_IN, makers.D_SAE, 10, "google/gemma-3-1b-it")
    assert found.bytes == 4 * sum(t.numel() for t in tensors.values())
    norms = tensors["w_dec"].norm(dim=1)
    assert found.decoder_norms.median == pytest.approx(norms.sort().values[5].item(), rel=1e-6)
    assert found.encoder_norms.maximum == pytest.approx(tensors["w_enc"].norm(dim=0).max().item(), rel=1e-6)
    assert found.thresholds is not None
    assert found.thresholds.minimum == pytest.approx(tensors["threshold"].min().item())
    assert not found.examples
    assert json.loads(json.dumps(found.as_dict()))["tensors"][0] == {
        "name": "W_enc",
        "shape": [6, 11],
        "dtype": "float32",
    }


def test_inspect_says_what_is_odd(tmp_path):
    tensors = makers.weights()
    tensors["w_dec"][2] = 0
    tensors["w_enc"][:, 4] = 0
    tensors["w_dec"][7] *= 1000
    found = inspect(makers.folder_2(tmp_path / "x", tensors, makers.config_2("resid_post", width=99)))
    assert found.zero_rows == 1
    said = " ".join(found.warnings)
    assert all(word in said for word in ("99 latents", "write nothing", "read nothing", "100 times longer"))


@pytest.mark.parametrize("columns", [80, 200])
def test_the_view_of_each_kind_fits_its_terminal(tmp_path, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    clt = makers.multi_folder_2(
        tmp_path / "c", makers.multi_weights(skip=True), makers.config_clt(affine_connection=True)
    )
    cli.inspect(clt)
    shown = capsys.readouterr().out
    assert "clt, jumprelu" in shown
    assert "11 in each of 3 positions, 33 in all" in shown
    assert max(map(len, shown.splitlines())) <= columns
    cli.inspect(clt, as_json=True)
    assert json.loads(capsys.readouterr().out)["n_latents"] == 33


ROUTES = {
    "gemma-scope-2": ("gemscope", "saelens"),
    "saelens": ("gemscope", "gemma-scope-2"),
    "gemma-scope-1": ("gemscope", "gemma-scope-2", "saelens"),
    "circuit-tracer": ("gemma-scope-2", "saelens"),
}


def source(tmp_path: Path, name: str) -> Path:
    kept = makers.weights()
    if name == "gemma-scope-2":
        return makers.folder_2(tmp_path / "a", kept, makers.config_2("transcoder"))
    if name == "saelens":
        return makers.folder_saelens(tmp_path / "a", kept, makers.config_saelens("jumprelu"))
    if name == "gemma-scope-1":
        return makers.folder_1(tmp_path / "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", kept)
    return makers.folder_set(tmp_path / "a", [kept])


@pytest.mark.parametrize(
    ("name", "to"), [(name, to) for name, targets in ROUTES.items() for to in targets if to != "gemscope"]
)
def test_the_function_is_the_same_in_every_format(tmp_path, name, to):
    folder = source(tmp_path, name)
    done = convert(folder, tmp_path / "b", to)
    assert (done.source, done.target, done.written) == (name, to, 1)
    x = makers.rows()
    assert torch.equal(formats.load(tmp_path / "b").dictionary(x), formats.load_all(folder)[0].dictionary(x))
    assert formats.load(tmp_path / "b").config.reads == formats.load_all(folder)[0].config.reads


def test_a_set_becomes_a_folder_of_dictionaries_and_a_set_again(tmp_path):
    layers = [makers.weights(seed=i) for i in range(3)]
    folder = makers.folder_set(tmp_path / "a", layers, makers.yaml_config("transcoder_set"))
    done = convert(folder, tmp_path / "b", "gemma-scope-2")
    assert done.written == 3
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["mlp_in.0", "mlp_in.1", "mlp_in.2"]
    convert(tmp_path / "b", tmp_path / "c", "circuit-tracer")
    makers.same_files(folder, tmp_path / "c", *(f"layer_{i}.safetensors" for i in range(3)))


def test_nothing_that_exists_is_replaced(tmp_path, sae):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("kept")
    with pytest.raises(StorageError, match="not empty"):
        convert(sae, full, "saelens")
    assert [p.name for p in full.iterdir()] == ["mine.txt"]
    link = tmp_path / "link"
    link.symlink_to(full)
    with pytest.raises(StorageError, match="symbolic link"):
        convert(sae, link, "saelens")
    with pytest.raises(StorageError, match="not empty"):
        convert(sae, sae, "saelens")
    for name in ("..", ".", "/", ""):
        with pytest.raises((InputError, StorageError)):
            convert(sae, name, "saelens")
    with pytest.raises(InputError, match="there is no format"):
        convert(sae, tmp_path / "n", "npz")


def test_only_the_new_folder_is_written(tmp_path, sae):
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    convert(sae, tmp_path / "out/deep/new", "saelens")
    after = {p for p in tmp_path.rglob("*") if p.is_file()}
    new = {p.relative_to(tmp_path).as_posix() for p in after - set(before)}
    assert new == {"out/deep/new/cfg.json", "out/deep/new/sae_weights.safetensors"}
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_what_cannot_be_expressed_leaves_nothing_behind(tmp_path, sae):
    with pytest.raises(InputError):
        convert(sae, tmp_path / "out", "circuit-tracer")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_lost(tmp_path, sae, capsys):
    cli.convert(sae, tmp_path / "a", "saelens")
    assert "nothing is lost" in capsys.readouterr().out
    cli.convert(sae, tmp_path / "b", "gemma-scope-1")
    assert "lost: the model (google/gemma-3-1b-it) is not written." in capsys.readouterr().out


def test_a_path_that_is_no_dictionary_is_said(tmp_path):
    for path in (tmp_path, tmp_path / "none", Path("/dev/null")):
        with pytest.raises(FormatError):
            inspect(path)
