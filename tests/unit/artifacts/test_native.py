"""The native format: bit-identical round trips, and one clear sentence for everything that can be wrong with
a file.
"""

import contextlib
import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemscope.artifacts import native
from gemscope.core import files
from gemscope.core.errors import FormatError, GemscopeError, StorageError
from gemscope.core.files import read_tensors, write_tensors
from gemscope.core.provenance import Provenance
from gemscope.core.sites import Site
from gemscope.dictionaries.sae import SAE

FORMATS = Path(__file__).parents[3] / "docs" / "formats.md"
PROVENANCE = Provenance({"torch": "2"}, None, "test", "2026-01-01T00:00:00+00:00", {"cores": "2"}, {"seed": 1})


def _sae(dtype: torch.dtype = torch.float32) -> SAE:
    torch.manual_seed(0)
    shapes = [(4, 7), (7,), (7, 4), (4,)]
    return SAE(*(torch.randn(shape, dtype=dtype) for shape in shapes), torch.rand(7, dtype=dtype))


def _save(folder: Path, sae: SAE | None = None) -> Path:
    native.save(
        folder,
        sae or _sae(),
        site=Site("resid_post", 3),
        model="microworld-pt",
        revision="abc",
        provenance=PROVENANCE,
        extra={"training": {"steps": 5}},
    )
    return folder


def _edit_config(folder: Path, **fields: Any) -> None:
    path = folder / native.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _edit_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / native.WEIGHTS_FILE
    write_tensors(path, read_tensors(path) | tensors)


def test_round_trip_is_bit_identical_and_keeps_the_config(tmp_path: Path) -> None:
    sae = _sae()
    loaded = native.load(_save(tmp_path / "d", sae))
    for name, tensor in sae.named_parameters():
        assert torch.equal(loaded.dictionary.get_parameter(name), tensor)
    config = loaded.config
    assert (config.site, config.model, config.revision) == (Site("resid_post", 3), "microworld-pt", "abc")
    assert (config.d_in, config.d_sae, config.kind, config.activation) == (4, 7, "sae", "jumprelu")
    assert config.extra == {"training": {"steps": 5}}
    assert config.provenance == json.loads(json.dumps(PROVENANCE.as_dict()))
    assert native.read_config(tmp_path / "d") == config


def test_saving_again_gives_identical_bytes_and_replaces_the_folder(tmp_path: Path) -> None:
    first = _save(tmp_path / "a")
    second = _save(tmp_path / "b", native.load(first).dictionary)
    for name in (native.WEIGHTS_FILE, native.CONFIG_FILE):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    (first / "stray").write_text("old")
    _save(first)
    assert sorted(p.name for p in first.iterdir()) == [native.CONFIG_FILE, native.WEIGHTS_FILE]


def test_other_dtypes_are_written_as_float32(tmp_path: Path) -> None:
    sae = _sae(torch.float64)
    loaded = native.load(_save(tmp_path / "d", sae)).dictionary
    assert loaded.W_enc.dtype == torch.float32
    torch.testing.assert_close(loaded.W_enc.double(), sae.W_enc, rtol=1e-6, atol=1e-6)


def _rows(heading: str) -> list[list[str]]:
    section = FORMATS.read_text().split(f"### {heading}\n")[1].split("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_saved_tensors_are_those_of_the_document(tmp_path: Path) -> None:
    tensors = read_tensors(_save(tmp_path / "d") / native.WEIGHTS_FILE)
    rows = _rows("Tensors of `dictionary.safetensors`")
    assert {row[0].strip("`") for row in rows} == set(tensors)
    sizes = {"d_in": 4, "d_sae": 7}
    for name, shape, _ in rows:
        found = tensors[name.strip("`")]
        assert tuple(found.shape) == tuple(sizes[axis.strip()] for axis in shape.split(","))
        assert found.dtype == torch.float32


def test_saved_fields_are_those_of_the_document(tmp_path: Path) -> None:
    config = json.loads((_save(tmp_path / "d") / native.CONFIG_FILE).read_text())
    types = {"string": str, "integer": int, "object": dict}
    rows = _rows("Fields of `dictionary.json`")
    assert {row[0].strip("`") for row in rows} == set(config)
    for name, kind, value in rows:
        found = config[name.strip("`")]
        assert type(found) in [types.get(word, type(None)) for word in kind.split(" or ")]
        if fixed := re.match(r"`([^`]+)`", value):
            assert str(found) == fixed[1]


@given(where=st.floats(0, 1, exclude_max=True), which=st.sampled_from([native.WEIGHTS_FILE, native.CONFIG_FILE]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_a_format_error(where: float, which: str, tmp_path: Path) -> None:
    path = _save(tmp_path / "d") / which
    whole = path.read_bytes().rstrip()
    path.write_bytes(whole[: int(where * len(whole))])
    with pytest.raises(FormatError, match=re.escape(which)):
        native.load(tmp_path / "d")


@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_byte_never_gives_anything_but_a_format_error(position: float, byte: int, tmp_path: Path) -> None:
    """A changed weight can pass for a weight; whatever cannot be read must be refused in our own words."""
    for name in (native.WEIGHTS_FILE, native.CONFIG_FILE):
        path = _save(tmp_path / "d") / name
        damaged = bytearray(path.read_bytes())
        damaged[int(position * len(damaged))] = byte
        path.write_bytes(damaged)
        with contextlib.suppress(FormatError):
            loaded = native.load(tmp_path / "d").dictionary
            assert all(p.isfinite().all() for p in loaded.parameters())


@pytest.mark.parametrize("name", [native.WEIGHTS_FILE, native.CONFIG_FILE])
def test_a_missing_file_is_a_format_error(name: str, tmp_path: Path) -> None:
    (_save(tmp_path / "d") / name).unlink()
    with pytest.raises(FormatError, match="check the path"):
        native.load(tmp_path / "d")


def test_a_missing_or_unknown_tensor_is_named(tmp_path: Path) -> None:
    folder = _save(tmp_path / "d")
    tensors = read_tensors(folder / native.WEIGHTS_FILE)
    write_tensors(folder / native.WEIGHTS_FILE, tensors | {"W_skip": torch.zeros(2)})
    with pytest.raises(FormatError, match="holds W_skip"):
        native.load(folder)
    del tensors["b_enc"]
    write_tensors(folder / native.WEIGHTS_FILE, tensors)
    with pytest.raises(FormatError, match="lacks b_enc"):
        native.load(folder)


def test_a_wrong_shape_says_both_shapes(tmp_path: Path) -> None:
    folder = _save(tmp_path / "d")
    _edit_tensors(folder, W_dec=torch.zeros(4, 7))
    with pytest.raises(FormatError, match=r"W_dec .*\(4, 7\).*\(7, 4\)"):
        native.load(folder)


def test_a_wrong_dtype_is_refused(tmp_path: Path) -> None:
    folder = _save(tmp_path / "d")
    _edit_tensors(folder, W_dec=torch.zeros(7, 4, dtype=torch.float16))
    with pytest.raises(FormatError, match=r"float16.*float32"):
        native.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_in_reading_and_writing(value: float, tmp_path: Path) -> None:
    folder = _save(tmp_path / "d")
    bad = torch.zeros(7)
    bad[3] = value
    _edit_tensors(folder, b_enc=bad)
    with pytest.raises(FormatError, match=r"b_enc.*NaN or an infinity"):
        native.load(folder)
    sae = _sae()
    sae.b_enc[3] = value
    with pytest.raises(FormatError, match="b_enc"):
        _save(tmp_path / "new", sae)
    assert not (tmp_path / "new").exists()


def test_a_negative_threshold_is_refused(tmp_path: Path) -> None:
    folder = _save(tmp_path / "d")
    _edit_tensors(folder, threshold=torch.full((7,), -0.1))
    with pytest.raises(FormatError, match="negative threshold"):
        native.load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"format": "other"}, "not the config of a gemscope dictionary"),
        ({"kind": "transcoder"}, "transcoder"),
        ({"activation": "topk"}, "topk"),
        ({"dtype": "float16"}, "float16"),
        ({"d_sae": "7"}, "'d_sae'.*wrong type"),
        ({"d_sae": True}, "'d_sae'.*wrong type"),
        ({"d_sae": 8}, r"asks for"),
        ({"site": "nowhere.3"}, "'site'.*nowhere"),
        ({"extra": None}, "'extra'.*wrong type"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    _edit_config(_save(tmp_path / "d"), **fields)
    with pytest.raises(FormatError, match=message):
        native.load(tmp_path / "d")


@pytest.mark.parametrize("name", [row[0].strip("`") for row in _rows("Fields of `dictionary.json`")])
def test_every_field_is_required(name: str, tmp_path: Path) -> None:
    path = _save(tmp_path / "d") / native.CONFIG_FILE
    config = json.loads(path.read_text())
    del config[name]
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=name):
        native.load(tmp_path / "d")


def test_unknown_fields_are_ignored(tmp_path: Path) -> None:
    _edit_config(_save(tmp_path / "d"), later="addition")
    native.load(tmp_path / "d")


@pytest.mark.parametrize("config", ["[]", "null", '"text"', ""])
def test_json_of_another_kind_is_refused(config: str, tmp_path: Path) -> None:
    (_save(tmp_path / "d") / native.CONFIG_FILE).write_text(config)
    with pytest.raises(FormatError):
        native.load(tmp_path / "d")


@pytest.mark.parametrize("step", ["save_file", "dumps", "_sync"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_nothing_and_the_old_folder_as_it_was(
    step: str, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = _save(tmp_path / "old")
    before = {p.name: p.read_bytes() for p in old.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(files.json if step == "dumps" else files, step, fail)
    expected = StorageError if isinstance(failure, OSError) else KeyboardInterrupt
    for folder in (old, tmp_path / "new"):
        with pytest.raises(expected) as caught:
            _save(folder)
        if isinstance(caught.value, GemscopeError):
            assert "disk is full" in str(caught.value)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
