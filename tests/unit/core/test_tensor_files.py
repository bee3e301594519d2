"""Reading safetensors by byte range: the same numbers as the reference reader, only the bytes asked for, and one
sentence for every damaged file.
"""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gemscope.core import tensor_files
from gemscope.core.errors import FormatError
from gemscope.core.tensor_files import TensorFile, check_shapes, read_all

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def _some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 3).abs().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (6,), (), (0, 5), (4, 0)])
def test_what_is_read_is_what_was_written(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {"a": _some(dtype, *shape), "b": torch.ones(3)}
    save_file(tensors, tmp_path / "f", {"kept": "yes"})
    with TensorFile(tmp_path / "f") as file:
        assert file.metadata == {"kept": "yes"}
        for name, tensor in tensors.items():
            found = file.read(name, finite=True)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


@given(index=st.lists(st.integers(0, 11), max_size=8), start=st.integers(0, 12), stop=st.integers(0, 12))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_blocks_and_columns(index: list[int], start: int, stop: int, tmp_path: Path) -> None:
    table = torch.arange(3 * 4 * 5, dtype=torch.float32).view(3, 4, 5)
    if not (path := tmp_path / "f").exists():
        save_file({"pad": torch.ones(3), "t": table}, path)
    flat, start, stop = table.view(12, 5), min(start, stop), max(start, stop)
    with TensorFile(path) as file:
        opened = file.bytes_read
        assert torch.equal(file.rows("t", torch.tensor(index, dtype=torch.int64)), flat[index])
        assert file.bytes_read - opened == len(set(index)) * 20
        assert torch.equal(file.block("t", start, stop), flat[start:stop])
        assert file.bytes_read - opened == (len(set(index)) + stop - start) * 20
    with TensorFile(path) as file, pytest.raises(FormatError, match="rows 0 to 11, not 12"):
        file.rows("t", torch.tensor([3, 12]))


def test_columns_of_a_matrix(tmp_path: Path) -> None:
    table = torch.randn(6, 9)
    save_file({"t": table}, tmp_path / "f")
    with TensorFile(tmp_path / "f") as file:
        opened = file.bytes_read
        assert torch.equal(file.columns("t", 2, 5), table[:, 2:5])
        assert file.bytes_read - opened == 6 * 3 * 4


@pytest.mark.parametrize("place", [0, 5, 11])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_found_in_any_chunk(
    place: int, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "CHUNK", 16)
    tensor = torch.zeros(12)
    tensor[place] = value
    save_file({"t": tensor}, tmp_path / "f")
    with TensorFile(tmp_path / "f") as file:
        assert torch.equal(file.read("t").isnan(), tensor.isnan())
        with pytest.raises(FormatError, match=r"t in .* has a NaN or an infinity"):
            file.read("t", finite=True)


def _write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def _entry(**changes: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([], "not a table"),
        ({"t": 3}, "'t' cannot be understood"),
        (_entry(dtype="F31"), "'t' cannot be understood"),
        (_entry(dtype=["F32"]), "'t' cannot be understood"),
        (_entry(shape=[-2]), "'t' cannot be understood"),
        (_entry(shape=[2.0]), "'t' cannot be understood"),
        (_entry(shape="2"), "'t' cannot be understood"),
        (_entry(shape=[3]), "does not fill its 8 bytes"),
        (_entry(shape=[10**30]), "does not fill its 8 bytes"),
        (_entry(data_offsets=[0]), "'t' cannot be understood"),
        (_entry(data_offsets=[8, 0]), "does not fill its -8 bytes"),
        ({"t" * 5000: 3}, "t' cannot be understood"),
        (_entry(shape=[1] * 5000), "'t' of shape"),
        (_entry(data_offsets=[0, 10**4000]), "does not fill its 10000"),
        (_entry(data_offsets=[4, 12]), "overlap or leave gaps"),
        (_entry() | {"u": _entry()["t"]}, "overlap or leave gaps"),
        (_entry(shape=[1], data_offsets=[0, 4]), "end at byte"),
        (_entry(shape=[3], data_offsets=[0, 12]), "end at byte"),
    ],
)
def test_a_header_that_cannot_be_right_is_one_sentence(header: Any, why: str, tmp_path: Path) -> None:
    _write(tmp_path / "f", header, bytes(8))
    with pytest.raises(FormatError, match=why) as caught:
        TensorFile(tmp_path / "f")
    assert str(caught.value).endswith("write or fetch it again.")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 200 << 20, 1000])
def test_a_huge_header_is_not_believed(length: int, tmp_path: Path) -> None:
    _write(tmp_path / "f", _entry(), bytes(8), length)
    with pytest.raises(FormatError, match="header claims"):
        TensorFile(tmp_path / "f")


@given(data=st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_is_a_format_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(FormatError):
        TensorFile(tmp_path / "f").read("t")
    _write(tmp_path / "f", data, b"12345678")
    with pytest.raises(FormatError):
        TensorFile(tmp_path / "f").read("t")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"t": torch.zeros(1000)}, tmp_path / "f")
    with TensorFile(tmp_path / "f") as file:
        (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:500])
        with pytest.raises(FormatError, match="ended while it was read"):
            file.read("t")


def test_missing_files_folders_and_tensors(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FormatError, match="there is no file"):
            TensorFile(path)
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "f")
    with pytest.raises(FormatError, match="lacks b; it holds a"):
        read_all(tmp_path / "f", {"b": (2, 3)})
    with TensorFile(tmp_path / "f") as file, pytest.raises(FormatError, match=r"a .*\(2, 3\), but \(3, 2\)"):
        check_shapes(file, {"a": (3, 2)})
    assert list(read_all(tmp_path / "f")) == ["a"]
