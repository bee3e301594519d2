import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemscope.core.errors import FormatError
from gemscope.features import layout
from gemscope.features.pieces import Pieces, save_pieces
from gemscope.features.spelling import Reader, readable

SPELLED = st.dictionaries(st.integers(0, 300), st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))


@given(SPELLED, st.sets(st.integers(-1, 320)))
def test_what_was_saved_is_found_by_id_and_by_spelling(tmp_path_factory, pieces, ids):
    folder = tmp_path_factory.mktemp("pieces")
    save_pieces(folder, pieces)
    opened = Pieces(folder)
    assert opened.of(ids) == {i: pieces[i] for i in ids if i in pieces}
    for text in {*pieces.values(), "never there, not at all", ""}:
        assert opened.ids_of([text]) == sorted(i for i, one in pieces.items() if one == text)


def test_a_file_that_was_cut_is_named(tmp_path):
    save_pieces(tmp_path, {3: "Paris", 5: "▁Berlin"})
    layout.save(tmp_path / "piece_text.npy", np.zeros(4, np.uint8))
    with pytest.raises(FormatError, match=r"piece_text\.npy is damaged"):
        Pieces(tmp_path)


@given(st.lists(st.sampled_from(["▁a", "b", "<0xC3>", "<0xA9>", "<0xFF>", "▁"]), max_size=12))
def test_many_tokens_are_read_as_one_by_one(texts):
    pieces = dict(enumerate(texts))
    ids = list(range(len(texts)))
    assert Reader(pieces, marked=True)(ids) == readable(texts)
    assert Reader(pieces, marked=False)([*ids, 99]) == [*texts, ""]


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), st.data())
def test_of_a_run_of_bytes_that_is_cut_only_the_cut_characters_are_lost(text, data):
    spelling = [(i, byte) for i, char in enumerate(text) for byte in char.encode()]
    low = data.draw(st.integers(0, len(spelling) - 1))
    high = data.draw(st.integers(low + 1, len(spelling)))
    kept = spelling[low:high]
    whole = {i for i in range(len(text)) if len(text[i].encode()) == sum(at == i for at, _ in kept)}
    first = {at: n for n, (at, _) in reversed(list(enumerate(kept)))}
    wanted = ["\ufffd" if at not in whole else text[at] if first[at] == n else "" for n, (at, _) in enumerate(kept)]
    assert readable([f"<0x{byte:02X}>" for _, byte in kept]) == wanted


class Asked(mmap.mmap):
    """A mapped file that keeps what it was asked for."""

    def madvise(self, option, start=0, length=0):
        assert option == mmap.MADV_WILLNEED
        assert start % mmap.PAGESIZE == 0
        assert 0 < start + length <= len(self)
        self.__dict__.setdefault("ranges", []).append(range(start, start + length))


@given(st.lists(st.integers(0, 20_000), max_size=12), st.integers(0, 3000))
def test_all_that_will_be_read_is_asked_for_once(tmp_path_factory, starts, count):
    path = tmp_path_factory.mktemp("mapped") / "a.npy"
    layout.save(path, np.zeros(20_000))
    array = np.load(path, mmap_mode="r")
    array._mmap = mapped = Asked(-1, array.offset + array.nbytes)
    layout.prefetch(array, np.array(starts, np.int64), count)
    ranges = mapped.__dict__.get("ranges", [])
    pages = [page for one in ranges for page in range(one.start, one.stop, mmap.PAGESIZE)]
    assert len(pages) == len(set(pages))
    for start in starts:
        for byte in range(array.offset + 8 * start, min(array.offset + 8 * (start + count), len(mapped)), 999):
            assert any(byte in one for one in ranges)
