import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch

from gemscope.core import files
from gemscope.core.errors import FormatError, StorageError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_and_json_come_back_as_they_were(tmp_path: Path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(5), "c": torch.randn(2).bfloat16()}
    files.write_tensors(tmp_path / "sub" / "t.safetensors", tensors)
    back = files.read_tensors(tmp_path / "sub" / "t.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())
    files.write_json(tmp_path / "v.json", {"x": [1, 2.5, None, "ä"]})
    assert files.read_json(tmp_path / "v.json") == {"x": [1, 2.5, None, "ä"]}


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), ValueError("bug"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException):
    path = tmp_path / "result.json"
    files.write_text(path, "old")
    expected = StorageError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise failure
    assert path.read_text() == "old"
    assert names(tmp_path) == ["result.json"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_folder_that_fails_leaves_the_old_folder_and_nothing_else(tmp_path: Path, failure: BaseException):
    path = tmp_path / "suite"
    with files.atomic_folder(path) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises((StorageError, KeyboardInterrupt)), files.atomic_folder(path) as temporary:
        (temporary / "a").write_text("half")
        raise failure
    assert (path / "a").read_text() == "old"
    assert names(tmp_path) == ["suite"]


def test_a_whole_folder_takes_the_place_of_the_old_one(tmp_path: Path):
    for content in ("one", "two"):
        with files.atomic_folder(tmp_path / "f") as temporary:
            (temporary / content).write_text(content)
    assert names(tmp_path / "f") == ["two"]
    assert names(tmp_path) == ["f"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, rename = tmp_path / "f", Path.rename
    with files.atomic_folder(path) as temporary:
        (temporary / "old").write_text("")

    def renamed(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(path) as temporary:
        (temporary / "new").write_text("")
    assert names(path) == ["old"]
    assert names(tmp_path) == ["f"]


def test_what_a_kill_left_is_settled(tmp_path: Path):
    """The older one goes back only where nothing took its place; what belongs to other names is not touched."""
    for name in (".f.abcdefg1.old", ".f.abcdefg1.tmp", ".g.abcdefg2.old", ".f.no2.abcdefg3.old", ".f.tmp", "g"):
        (tmp_path / name).mkdir()
    (tmp_path / ".f.abcdefg1.old" / "a").write_text("old")
    (tmp_path / ".g.abcdefg4.tmp").write_text("half")
    for _ in range(2):
        files.recover(tmp_path / "f")
        files.recover(tmp_path / "g")
    files.recover(tmp_path / "nothing" / "here")
    assert (tmp_path / "f" / "a").read_text() == "old"
    assert names(tmp_path) == [".f.no2.abcdefg3.old", ".f.tmp", "f", "g"]


def test_a_full_disk_is_one_sentence(tmp_path: Path):
    with pytest.raises(StorageError, match="disk is full") as error, files.atomic_path(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        files.write_text(tmp_path / "file" / "below", "x")


@pytest.mark.parametrize("keep", [0, 4, 20, 100])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, keep: int):
    path = tmp_path / "t.safetensors"
    files.write_tensors(path, {"a": torch.randn(8, 8)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match="truncated or damaged"):
        files.read_tensors(path)


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_damaged_json_is_refused(tmp_path: Path, text: str):
    (tmp_path / "v.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError):
        files.read_json(tmp_path / "v.json")
    with pytest.raises(FormatError):
        files.read_json(tmp_path / "missing.json")


def test_sha256_is_that_of_the_bytes(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"gemscope" * 1000)
    assert files.sha256_file(tmp_path / "f") == hashlib.sha256(b"gemscope" * 1000).hexdigest()
