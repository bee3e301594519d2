"""Files that are broken, hostile or simply wrong: always one FormatError of one sentence, never anything else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gemscope.artifacts import formats
from gemscope.artifacts.convert import convert
from gemscope.artifacts.inspect import inspect
from gemscope.core.errors import FormatError, GemscopeError
from unit.artifacts import makers

SETTINGS = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


def skip_weights() -> dict[str, torch.Tensor]:
    return makers.weights() | {"affine_skip_connection": torch.eye(makers.D_IN)}


MAKERS: dict[str, Callable[[Path], Path]] = {
    "gemma-scope-2": lambda at: makers.folder_2(
        at, skip_weights(), makers.config_2("transcoder", affine_connection=True)
    ),
    "gemma-scope-2 clt": lambda at: makers.multi_folder_2(at, makers.multi_weights(), makers.config_clt()),
    "gemma-scope-1": lambda at: makers.folder_1(
        at / "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", makers.weights()
    ),
    "saelens": lambda at: makers.folder_saelens(at, makers.weights(), makers.config_saelens("jumprelu")),
    "circuit-tracer": lambda at: makers.folder_set(at, [skip_weights()]),
    "circuit-tracer clt": lambda at: makers.folder_clt(at, makers.multi_weights(skip=True)),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def refused(folder: Path) -> str:
    """The sentence with which loading refuses the folder; ``inspect``, which reads it in slices, must refuse it too."""
    for read in (inspect, formats.load):
        with pytest.raises(FormatError) as caught:
            read(folder)
        sentence = str(caught.value)
        assert sentence
        assert "\n" not in sentence
        assert "Traceback" not in sentence
        assert len(sentence) < 1500
    return sentence


def tame(folder: Path) -> None:
    """Is loaded and inspected, or refused with an error of ours."""
    for read in (inspect, formats.load):
        said = "x"
        try:
            read(folder)
        except GemscopeError as error:
            said = str(error)
        assert 0 < len(said) < 1500
        assert "\n" not in said


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_each_maker_loads_untouched(tmp_path, make):
    folder = make(tmp_path)
    assert formats.load(folder).dictionary.d_sae == makers.D_SAE


@SETTINGS
@given(data=st.data())
def test_truncated_files_are_refused(make, data):
    with TemporaryDirectory() as place:
        folder = make(Path(place) / "x")
        path = data.draw(st.sampled_from([p for p in files(folder) if p.suffix != ".yaml"]))
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        refused(folder)


@SETTINGS
@given(data=st.data())
def test_files_with_changed_bytes_are_tame(make, data):
    with TemporaryDirectory() as place:
        folder = make(Path(place) / "x")
        path = data.draw(st.sampled_from(files(folder)))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.one_of(st.integers(0, min(len(content) - 1, 300)), st.integers(0, len(content) - 1)))
            content[at] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(content))
        tame(folder)


@SETTINGS
@given(data=st.data())
def test_files_of_noise_are_refused(make, data):
    with TemporaryDirectory() as place:
        folder = make(Path(place) / "x")
        path = data.draw(st.sampled_from([p for p in files(folder) if p.suffix != ".yaml"]))
        path.write_bytes(data.draw(st.binary(max_size=200)))
        if path.name == "config.json":
            tame(folder)
        else:
            refused(folder)


def change_tensors(folder: Path, data, change: Callable[[dict[str, torch.Tensor], str], None]) -> None:
    path = data.draw(st.sampled_from([p for p in files(folder) if p.suffix == ".safetensors"]))
    tensors = load_file(path)
    change(tensors, data.draw(st.sampled_from(sorted(tensors))))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


TENSORS = [name for name in MAKERS if name != "gemma-scope-1"]


@pytest.mark.parametrize("name", TENSORS)
@SETTINGS
@given(data=st.data())
def test_wrong_shapes_and_numbers_of_axes_are_refused(name, data):
    def change(tensors, which):
        tensor, how = tensors[which], data.draw(st.sampled_from(["size", "more", "none"]))
        if how == "size":
            axis = data.draw(st.integers(0, tensor.ndim - 1))
            size = tensor.shape[axis] + data.draw(st.sampled_from([-1, 1, 3]))
            tensors[which] = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
        else:
            tensors[which] = tensor[None] if how == "more" else tensor.flatten()[0]

    with TemporaryDirectory() as place:
        folder = MAKERS[name](Path(place) / "x")
        change_tensors(folder, data, change)
        refused(folder)


@pytest.mark.parametrize("name", TENSORS)
@SETTINGS
@given(data=st.data())
def test_nan_and_infinity_are_refused(name, data):
    def change(tensors, which):
        at = data.draw(st.integers(0, tensors[which].numel() - 1))
        if which == "w_dec" and tensors[which].ndim == 3:
            at = tensors[which].numel() - 1
        tensors[which].view(-1)[at] = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))

    with TemporaryDirectory() as place:
        folder = MAKERS[name](Path(place) / "x")
        change_tensors(folder, data, change)
        assert "NaN or an infinity" in refused(folder)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_numbers_that_are_no_weights_are_refused(tmp_path, name, dtype):
    folder = MAKERS[name](tmp_path / "x")
    path = next(p for p in files(folder) if p.suffix == ".safetensors")
    tensors = load_file(path)
    which = sorted(tensors)[0]
    save_file(tensors | {which: tensors[which].to(dtype)}, path)
    assert refused(folder)


@pytest.mark.parametrize("name", TENSORS)
def test_half_and_double_precision_are_read_as_float32(tmp_path, name):
    folder = MAKERS[name](tmp_path / "x")
    for path in files(folder):
        if path.suffix == ".safetensors":
            save_file({n: t.half() for n, t in load_file(path).items()}, path)
    assert formats.load(folder).config.dtype == "float32"
    for path in files(folder):
        if path.suffix == ".safetensors":
            save_file({n: t.double() for n, t in load_file(path).items()}, path)
    assert any("rounded" in note for note in formats.load(folder).warnings)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("extra", ["../../outside", "/etc/passwd", "W_gate", "\u202e", "x" * 5000, ""])
def test_a_tensor_of_another_name_is_refused(tmp_path, name, extra):
    folder = MAKERS[name](tmp_path / "deep/x")
    path = next(p for p in files(folder) if p.suffix == ".safetensors")
    save_file(load_file(path) | {extra: torch.zeros(3)}, path)
    assert len(refused(folder)) < 600
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor_is_refused(tmp_path, name):
    folder = MAKERS[name](tmp_path / "x")
    path = next(p for p in files(folder) if p.suffix == ".safetensors")
    tensors = load_file(path)
    del tensors[next(n for n in sorted(tensors) if "b_enc" in n or "W_dec" in n)]
    save_file(tensors, path)
    assert "lacks" in refused(folder)


@pytest.mark.parametrize("name", TENSORS)
def test_a_huge_header_is_refused_at_once(tmp_path, name):
    folder = MAKERS[name](tmp_path / "x")
    path = next(p for p in files(folder) if p.suffix == ".safetensors")
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    refused(folder)
    header = json.dumps({"w_enc": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(folder)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@pytest.mark.parametrize("name", ["gemma-scope-2", "gemma-scope-2 clt", "saelens"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_in_a_config_is_tame(name, data):
    with TemporaryDirectory() as place:
        folder = MAKERS[name](Path(place) / "x")
        path = folder / ("cfg.json" if name == "saelens" else "config.json")
        config = json.loads(path.read_text())
        at = config["metadata"] if name == "saelens" and data.draw(st.booleans()) else config
        for key in data.draw(
            st.lists(st.sampled_from([*at, "k", "gemscope", "matryoshka_widths", "l0"]), min_size=1, max_size=3)
        ):
            at[key] = data.draw(JSON)
        path.write_text(json.dumps(config))
        tame(folder)
        path.write_text(json.dumps(data.draw(JSON)))
        tame(folder)


@pytest.mark.parametrize("name", ["circuit-tracer", "circuit-tracer clt"])
@SETTINGS
@given(data=st.data())
def test_any_yaml_is_tame(name, data):
    with TemporaryDirectory() as place:
        folder = MAKERS[name](Path(place) / "x")
        (folder / "config.yaml").write_bytes(
            data.draw(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
        )
        refused(folder)


def test_deeply_nested_configs_are_refused(tmp_path):
    folder = MAKERS["saelens"](tmp_path / "a")
    (folder / "cfg.json").write_text("[" * 100000)
    refused(folder)
    folder = MAKERS["circuit-tracer"](tmp_path / "b")
    (folder / "config.yaml").write_text("[" * 100000)
    refused(folder)


def test_an_alias_bomb_is_refused(tmp_path):
    folder = MAKERS["circuit-tracer"](tmp_path / "b")
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    (folder / "config.yaml").write_text("\n".join(lines) + "\nmodel_kind: *a29\n")
    refused(folder)


def test_links_are_followed_for_files_and_lead_nowhere_else(tmp_path, make):
    """The hub's cache is made of links to files; a link to a folder, a device or itself is no weights file."""
    folder = make(tmp_path / "x")
    real = files(folder)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, path in enumerate(real):
        shutil.move(path, blobs / str(i))
        path.symlink_to(blobs / str(i))
    formats.load(folder)
    weights = next(p for p in real if p.suffix in (".safetensors", ".npz"))
    for target in (blobs, Path("/dev/zero"), weights, tmp_path / "nothing"):
        weights.unlink()
        weights.symlink_to(target)
        refused(folder)


@pytest.mark.parametrize("path", ["\0", "x" * 5000, "a/\0/b", "/proc/self/mem", "~", "con:"])
def test_impossible_paths_are_refused(path):
    with pytest.raises(GemscopeError):
        formats.load(path)
    with pytest.raises(GemscopeError):
        convert(path, "/tmp/never-written", "gemscope")
    assert not Path("/tmp/never-written").exists()


@SETTINGS
@given(name=st.text(max_size=30))
def test_no_target_name_writes_outside(name):
    with TemporaryDirectory() as place:
        base = Path(place) / "base"
        source = MAKERS["saelens"](base / "source")
        outside = {p for p in Path(place).rglob("*")}
        try:
            target = base / "out" / name.replace("..", "") if not name.startswith("/") else base / "out"
            convert(source, target, "gemma-scope-2")
        except GemscopeError:
            pass
        written = {p for p in Path(place).rglob("*")} - outside
        assert all((base / "out") in (p, *p.parents) for p in written)
