"""Every kind of text gives the same documents by number, whatever range is asked for."""

import io
import json

import pytest

from gemscope.activations.sources import (
    Documents,
    HubDataset,
    JsonLines,
    ParquetFiles,
    Source,
    TextFiles,
    document_of,
    spooled,
)
from gemscope.core.errors import InputError
from gemscope.models.chat import Turn
from gemscope.suites.corpus import GeneratedText

TEXTS = [f"text {i} ü\u2028x" for i in range(700)]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def jsonl(folder, texts, name="a.jsonl"):
    path = folder / name
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n\n".join(lines), "utf-8")
    return path


def sources(folder) -> list[Source]:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra 'data' is not installed")
    from pyarrow import parquet

    parts = [TEXTS[:300], TEXTS[300:]]
    jsons = tuple(jsonl(folder, part, f"{i}.jsonl") for i, part in enumerate(parts))
    tables = []
    for i, part in enumerate(parts):
        parquet.write_table(pyarrow.table({"text": part, "n": list(range(len(part)))}), folder / f"{i}.parquet", 64)
        tables.append(folder / f"{i}.parquet")
    lines = folder / "lines.txt"
    lines.write_bytes("\r\n".join(TEXTS).encode())
    return [Documents(TEXTS), JsonLines(jsons), ParquetFiles(tuple(tables)), TextFiles((lines,), lines=True)]


def test_every_source_gives_the_same_ranges(tmp_path):
    for source in sources(tmp_path):
        assert isinstance(source, Source)
        assert source.count() == 700
        for start, stop in [(0, 700), (0, 1), (255, 258), (299, 301), (511, 600), (690, 900), (700, 710)]:
            assert list(source.read(start, stop)) == TEXTS[start:stop], (source, start)
        assert json.loads(json.dumps(source.describe())) == source.describe()


def test_a_changed_text_is_another_source(tmp_path):
    one = JsonLines((jsonl(tmp_path, TEXTS),)).describe()
    other = JsonLines((jsonl(tmp_path, ["changed", *TEXTS[1:]]),)).describe()
    assert one != other
    assert Documents(["a"]).describe() != Documents(["b"]).describe()


def test_whole_files_are_documents(tmp_path):
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.txt")
        paths[-1].write_text(f"one\ntwo {i}\n")
    source = TextFiles(tuple(paths))
    assert list(source.read(1, 3)) == ["one\ntwo 1\n", "one\ntwo 2\n"]
    assert source.count() == 3


def test_standard_input_is_kept_under_the_name_of_its_content(tmp_path):
    lines = spooled(io.BytesIO(b"one\ntwo\n\nthree"), tmp_path)
    assert list(lines.read(0, 9)) == ["one", "two", "three"]
    objects = spooled(io.BytesIO(b'{"text": "one"}\n{"messages": []}'), tmp_path)
    assert list(objects.read(0, 9)) == ["one", ()]
    assert spooled(io.BytesIO(b"one\ntwo\n\nthree"), tmp_path).describe() == lines.describe()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_data_set_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder, TEXTS[:20], "train.jsonl")
    source = HubDataset(str(folder))
    assert source.count() == 20
    assert list(source.read(5, 7)) == TEXTS[5:7]
    assert source.describe() == HubDataset(str(folder)).describe()
    assert datasets.__version__
    with pytest.raises(InputError, match="cannot load"):
        HubDataset(str(tmp_path / "nothing")).count()


def test_chats_in_every_spelling():
    turns = (Turn("user", "hi"), Turn("model", "hello"))
    assert document_of({"messages": CHAT}, "text", "here") == turns
    assert document_of([{"role": "human", "text": "hi"}, {"role": "gpt", "text": "hello"}], "text", "here") == turns
    for bad in ({"other": 1}, {"text": 3}, {"messages": [{"role": "judge", "content": "x"}]}, 5, ["x"]):
        with pytest.raises(InputError, match="line 3"):
            document_of(bad, "text", "line 3")


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(InputError, match=r"a\.jsonl, document 1 is not valid JSON"):
        list(JsonLines((path,)).read(0, 2))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        list(TextFiles((tmp_path / "a.txt",)).read(0, 1))
    with pytest.raises(InputError, match="no file"):
        TextFiles((tmp_path / "none",))
    with pytest.raises(InputError, match="no readable Parquet"):
        ParquetFiles((path,)).count()


def test_the_microworld_by_number():
    source = GeneratedText(chat=True)
    whole = list(source.read(0, 600))
    assert len(set(whole)) > 500
    assert list(source.read(250, 530)) == whole[250:530]
    assert source.count() is None
    assert source.describe() != GeneratedText(chat=True, seed=1).describe()
    assert any(text.startswith("<start_of_turn>") for text in whole)
    assert not any(text.startswith("<start_of_turn>") for text in GeneratedText(chat=False).read(0, 50))
