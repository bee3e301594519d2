"""``inspect`` and ``convert``: what a dictionary is, what is lost, and that nothing but the new folder is written."""

import errno
import json
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

from gemscope.artifacts import formats, lazy
from gemscope.artifacts.convert import convert
from gemscope.artifacts.inspect import describe, inspect
from gemscope.cli import artifacts as cli
from gemscope.core import files
from gemscope.core.errors import FormatError, InputError, StorageError
from gemscope.core.tensor_files import TensorFile
from unit.artifacts import makers
from unit.artifacts import test_round_trips as round_trips


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


@pytest.mark.parametrize("name", round_trips.NAMES)
def test_inspect_says_of_files_in_slices_what_it_says_of_the_loaded_dictionary(tmp_path, name, monkeypatch):
    folder = round_trips.make(name, tmp_path / "a")
    if name.endswith("set"):
        folder = folder / "layer_1.safetensors"
    monkeypatch.setattr(lazy, "MEMORY", 1)  # a row at a time
    found = inspect(folder)
    loaded = formats.load(folder)
    held = describe(lazy.held(loaded, folder), folder)
    for one, other in ((found.encoder_norms, held.encoder_norms), (found.decoder_norms, held.decoder_norms)):
        assert astuple(one) == pytest.approx(astuple(other), rel=1e-12)
    assert replace(found, encoder_norms=held.encoder_norms, decoder_norms=held.decoder_norms) == held
    shapes = {name: tuple(parameter.shape) for name, parameter in loaded.dictionary.named_parameters()}
    assert {tensor.name: tensor.shape for tensor in found.tensors} == shapes
    assert found.bytes == sum(p.numel() * p.element_size() for p in loaded.dictionary.parameters())
    convert(folder, tmp_path / "ours", "gemscope")
    ours = inspect(tmp_path / "ours")
    assert replace(ours, path=found.path, format=found.format, warnings=found.warnings) == found


def test_inspecting_a_wide_dictionary_reads_it_once_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy, "MEMORY", 1 << 16)
    folder = makers.folder_2(tmp_path / "x", makers.weights(32, 1 << 13, 32), makers.config_2("resid_post"))
    blocks: list[int] = []
    block = TensorFile.block

    def counted(file: TensorFile, name: str, first: int, stop: int) -> torch.Tensor:
        found = block(file, name, first, stop)
        blocks.append(found.nbytes)
        return found

    monkeypatch.setattr(TensorFile, "block", counted)
    opened = formats.open_lazy(folder)
    assert opened.bytes_read < 1000  # the header
    describe(opened, folder)
    assert opened.bytes_read <= opened.nbytes
    assert max(blocks) <= 1 << 16
    assert sum(blocks) == 2 * 4 * 32 << 13  # W_enc and W_dec


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
    there, here = formats.load(tmp_path / "b"), formats.load_all(folder)[0]
    assert there.config.reads == here.config.reads
    tensors = dict(here.dictionary.named_parameters())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in there.dictionary.named_parameters())
    x = makers.rows().double()  # in fp32 the last bit depends on how a tensor lies in memory
    assert (there.dictionary.double()(x) - here.dictionary.double()(x)).abs().max() < 1e-12


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
    for name in ("..", ".", "/", "", tmp_path / "made/../out"):
        with pytest.raises((InputError, StorageError)):
            convert(sae, name, "saelens")
    assert not (tmp_path / "made").exists()
    with pytest.raises(InputError, match="there is no format"):
        convert(sae, tmp_path / "n", "npz")


@pytest.mark.parametrize("to", ["gemscope", "gemma-scope-1", "gemma-scope-2", "saelens"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_said_of_the_folder_that_was_asked_for(tmp_path, sae, monkeypatch, to, error):
    def sync(path: Path) -> None:
        raise OSError(error, "No space left on device" if error == errno.ENOSPC else "Read-only file system")

    monkeypatch.setattr(files, "_sync", sync)
    target = tmp_path / "out" / to
    with pytest.raises(StorageError, match=r"disk is full" if error == errno.ENOSPC else "may write") as caught:
        convert(sae, target, to)
    assert str(target) in str(caught.value)
    assert ".tmp" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


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
    shown = capsys.readouterr().out
    assert "lost: the model (google/gemma-3-1b-it) is not written." in shown
    assert "lost: the config of the gemma-scope-2 files, word for word, is not written." in shown
    cli.convert(tmp_path / "a", tmp_path / "c", "gemma-scope-2")
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("lost")] == [
        "lost: the config of the saelens files, word for word, is not written."
    ]


def test_a_path_that_is_no_dictionary_is_said(tmp_path):
    for path in (tmp_path, tmp_path / "none", Path("/dev/null")):
        with pytest.raises(FormatError):
            inspect(path)
