"""The native format: bit-identical round trips, and one clear sentence for everything that can be wrong with
a file.
"""

import contextlib
import dataclasses
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
from gemscope.artifacts.config import KINDS as KINDS_OF_CLASSES
from gemscope.artifacts.config import AnyDictionary, DictionaryConfig
from gemscope.core import files
from gemscope.core.errors import FormatError, GemscopeError, InputError, StorageError
from gemscope.core.files import read_tensors, write_tensors
from gemscope.core.provenance import Provenance
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.multilayer import MultiLayer
from gemscope.dictionaries.sae import SAE
from unit.dictionaries.zoo import ACTIVATIONS, KINDS, random_dictionary

FORMATS = Path(__file__).parents[3] / "docs" / "formats.md"
PROVENANCE = Provenance({"torch": "2"}, None, "test", "2026-01-01T00:00:00+00:00", {"cores": "2"}, {"seed": 1})


def _sae(dtype: torch.dtype = torch.float32) -> SAE:
    torch.manual_seed(0)
    shapes = [(4, 7), (7,), (7, 4), (4,)]
    return SAE(*(torch.randn(shape, dtype=dtype) for shape in shapes), torch.rand(7, dtype=dtype))


def _save(folder: Path, sae: SAE | None = None) -> Path:
    sae = sae or _sae()
    native.save(folder, sae, _config(sae))
    return folder


def _config(dictionary: AnyDictionary, **about: Any) -> DictionaryConfig:
    reads = [Site("resid_post", 3 + i) for i in range(dictionary.n_positions)]
    writes = None if dictionary.kind in ("sae", "crosscoder") else [Site("mlp_out", site.layer) for site in reads]
    about = {"revision": "abc", "provenance": PROVENANCE.as_dict(), "extra": {"training": {"steps": 5}}} | about
    return DictionaryConfig.of(dictionary, reads, writes, model="microworld-pt", **about)


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
    assert (config.d_in, config.d_sae, config.kind, config.activation) == (4, 7, "sae", Activation("jumprelu"))
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_round_trips_bit_for_bit(kind: str, activation: Activation, dtype: str, tmp_path: Path) -> None:
    dictionary = random_dictionary(kind, activation, dtype=getattr(torch, dtype), prefixes=(2, 5))
    config = _config(dictionary, l0=20, read_gain=False)
    assert native.save(tmp_path / "a", dictionary, config) == ()
    loaded = native.load(tmp_path / "a")
    assert loaded.config == config
    assert (config.dtype, config.prefixes, loaded.format, loaded.warnings) == (dtype, (2, 5), "gemscope", ())
    assert type(loaded.dictionary) is type(dictionary)
    assert dict(loaded.dictionary.named_parameters()).keys() == dict(dictionary.named_parameters()).keys()
    for name, tensor in dictionary.named_parameters():
        assert torch.equal(loaded.dictionary.get_parameter(name), tensor)
    native.save(tmp_path / "b", loaded.dictionary, loaded.config)
    for name in (native.WEIGHTS_FILE, native.CONFIG_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_storing_in_half_the_precision_says_what_is_lost(tmp_path: Path) -> None:
    sae = _sae()
    lost = native.save(tmp_path / "d", sae, _config(sae, dtype="bfloat16"))
    assert lost == ("the weights were float32 and are now bfloat16.",)
    assert torch.equal(native.load(tmp_path / "d").dictionary.W_enc, sae.W_enc.bfloat16())


def test_tied_weights_are_stored_twice(tmp_path: Path) -> None:
    W = torch.randn(7, 4)
    tied = SAE(W.T, torch.zeros(7), W, torch.zeros(4), torch.ones(7))
    loaded = native.load(_save(tmp_path / "d", tied)).dictionary
    assert torch.equal(loaded.W_enc, W.T)
    assert torch.equal(loaded.W_dec, W)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kind": "transcoder"}, "kind"), ({"d_sae": 8}, "d_sae 8"), ({"activation": Activation("relu")}, "activation")],
)
def test_a_config_of_another_dictionary_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    sae = _sae()
    with pytest.raises(InputError, match=message):
        native.save(tmp_path / "d", sae, dataclasses.replace(_config(sae), **change))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
def test_saved_tensors_are_those_of_the_document(kind: str, activation: Activation, tmp_path: Path) -> None:
    dictionary = random_dictionary(kind, activation, dtype=torch.float32)
    native.save(tmp_path / "d", dictionary, _config(dictionary))
    tensors = read_tensors(tmp_path / "d" / native.WEIGHTS_FILE)
    multi, n = isinstance(dictionary, MultiLayer), dictionary.n_positions
    has = {row[0].strip("`"): row[2] == "yes" for row in _rows("Activations")}
    assert has[activation.kind] == activation.has_threshold
    expected: dict[str, tuple[int, ...]] = {}
    for cell, shape, kinds, _ in _rows("Tensors of `dictionary.safetensors`"):
        name = cell.strip("`").removesuffix(".l")
        if kinds != "all" and dictionary.kind not in kinds.split(", "):
            continue
        if (name == "threshold" and not has[activation.kind]) or (name == "W_skip" and kind == "clt"):
            continue
        for at in range(n):
            sizes = {"d_in": 5, "d_out": dictionary.d_out, "d_sae": 13, "n - l": n - at}
            expected[f"{name}.{at}" if multi else name] = tuple(sizes[axis.strip()] for axis in shape.split(","))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected


def test_kinds_and_activations_are_those_of_the_document() -> None:
    value = next(row[2] for row in _rows("Fields of `dictionary.json`") if row[0] == "`kind`")
    assert set(value.replace(" or ", ", ").split(", ")) == set(KINDS_OF_CLASSES)
    rows = {row[0].strip("`"): row[1] == "yes" for row in _rows("Activations")}
    assert rows == {a.kind: a.k is not None for a in ACTIVATIONS}


def test_saved_fields_are_those_of_the_document(tmp_path: Path) -> None:
    config = json.loads((_save(tmp_path / "d") / native.CONFIG_FILE).read_text())
    types = {"string": str, "integer": int, "object": dict, "array": list, "number": float, "boolean": bool}
    rows = _rows("Fields of `dictionary.json`")
    assert [row[0].strip("`") for row in rows] == list(config)
    for name, kind, value in rows:
        found = config[name.strip("`")]
        assert type(found) in [types.get(word, type(None)) for word in kind.split(" or ")]
        if fixed := re.match(r"`([^`]+)`", value):
            assert str(found) == fixed[1]


@given(where=st.floats(0, 1, exclude_max=True), which=st.sampled_from([native.WEIGHTS_FILE, native.CONFIG_FILE]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_a_format_error(where: float, which: str, tmp_path: Path) -> None:
    if not (folder := tmp_path / "d").exists():
        _save(folder)
    whole = (folder / which).read_bytes()
    (folder / which).write_bytes(whole.rstrip()[: int(where * len(whole.rstrip()))])
    with pytest.raises(FormatError, match=re.escape(which)):
        native.load(folder)
    (folder / which).write_bytes(whole)


@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_byte_never_gives_anything_but_a_format_error(position: float, byte: int, tmp_path: Path) -> None:
    """A changed weight can pass for a weight; whatever cannot be read must be refused in our own words."""
    if not (folder := tmp_path / "d").exists():
        _save(folder)
    for name in (native.WEIGHTS_FILE, native.CONFIG_FILE):
        path = folder / name
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[int(position * len(damaged))] = byte
        path.write_bytes(damaged)
        with contextlib.suppress(FormatError):
            loaded = native.load(tmp_path / "d").dictionary
            assert all(p.isfinite().all() for p in loaded.parameters())
        path.write_bytes(whole)


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
    sae.b_enc.data[3] = value
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
        ({"kind": "autoencoder"}, "autoencoder"),
        ({"kind": ["sae"]}, "'kind'.*wrong type"),
        ({"kind": "crosscoder"}, "lacks W_dec.0"),
        ({"kind": "skip_transcoder"}, "lacks W_skip"),
        ({"activation": "topk"}, "'activation'.*wrong type"),
        ({"activation": {"kind": "softmax"}}, "softmax"),
        ({"activation": {"kind": ["topk"], "k": 3}}, "topk"),
        ({"activation": {"kind": "topk"}}, "needs a k"),
        ({"activation": {"kind": "topk", "k": "3"}}, "no number"),
        ({"activation": {"kind": "topk", "k": 3}}, "holds threshold"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16"}, "float32.*bfloat16"),
        ({"d_sae": "7"}, "'d_sae'.*wrong type"),
        ({"d_sae": True}, "'d_sae'.*wrong type"),
        ({"d_sae": 8}, r"\(8, 4\) was expected"),
        ({"d_sae": -7}, "at least 1"),
        ({"d_sae": 10**30}, "asks for|expected"),
        ({"d_out": 5}, "writes what it reads"),
        ({"reads": ["nowhere.3"]}, "a site in .*nowhere"),
        ({"reads": [3]}, "3 is not the name of a site"),
        ({"reads": []}, "0 sites are read"),
        ({"reads": ["resid_post.3", "resid_post.4"], "writes": ["mlp_out.3", "mlp_out.4"]}, "reads one site"),
        ({"writes": ["resid_post.4"]}, "writes what it reads"),
        ({"prefixes": [0]}, "0 is not a number of latents"),
        ({"prefixes": ["4"]}, "'4' is not a number"),
        ({"l0": "ten"}, "'l0'.*wrong type"),
        ({"read_gain": 1}, "'read_gain'.*wrong type"),
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


def test_saving_over_a_link_replaces_the_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    target = _save(tmp_path / "elsewhere")
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    other = _sae()
    other.b_enc.data += 1
    for link, to in ((tmp_path / "link", target), (tmp_path / "dangling", tmp_path / "nothing")):
        link.symlink_to(to)
        _save(link, other)
        assert not link.is_symlink()
        assert torch.equal(native.load(link).dictionary.b_enc, other.b_enc)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "elsewhere", "link"]


@pytest.mark.parametrize("name", ["../../W_dec", "/etc/passwd", "W_dec.0", "", "W_dec\n"])
def test_a_strange_name_of_a_tensor_is_refused_and_touches_nothing(name: str, tmp_path: Path) -> None:
    folder = _save(tmp_path / "d")
    tensors = read_tensors(folder / native.WEIGHTS_FILE)
    write_tensors(folder / native.WEIGHTS_FILE, tensors | {name: torch.zeros(2)})
    with pytest.raises(FormatError, match="should hold only"):
        native.load(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
