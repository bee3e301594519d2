"""Pools become batches: cut, joined, resumed; rows go straight to their places in memory that is used again."""

import gc
import os
import weakref
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemscope.activations import scatter
from gemscope.activations.lending import Lender
from gemscope.activations.order import Position
from gemscope.activations.scatter import Places
from gemscope.activations.stream import Cut, Origin, Pool, Stream
from gemscope.core.errors import FormatError, InputError
from gemscope.core.sites import Site

SITE = Site("resid_post", 0)


class Counting:
    """Pools of given sizes; row i of an epoch is [i, epoch]."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def pools(self, epoch: int) -> int:
        return len(self.sizes)

    def load(self, epoch: int, pool: int, cut: Cut) -> Pool:
        first = sum(self.sizes[:pool])
        number = torch.arange(first + cut.row, first + self.sizes[pool])
        rows = torch.stack([number, torch.full_like(number, epoch)], 1).to(torch.bfloat16)
        parts, at = deque(), 0
        for size in cut.sizes(self.sizes[pool]):
            here = number[at : at + size]
            parts.append(({SITE: rows[at : at + size]}, Origin(here, here + 1, here + 2)))
            at += size
        assert at == len(number)
        return Pool(self.sizes[pool], parts)


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


@settings(max_examples=50, deadline=None)
@given(SIZES, st.integers(1, 12))
@example([5, 0], 3)  # the last pool is empty, and rows are left over
def test_batches_are_full_hold_every_row_in_order_and_go_on_at_any_place(sizes, size):
    reader, total = Counting(sizes), sum(sizes)
    stream = Stream(reader, [SITE], size, start=Position(), epochs=2)
    steps = [(batch[SITE], stream.origin, stream.position) for batch in stream]
    whole, rest = divmod(total, size)
    assert [len(x) for x, _, _ in steps] == 2 * [*whole * [size], *[rest] * bool(rest)]
    rows = torch.cat([x for x, _, _ in steps])
    assert rows[:, 0].tolist() == 2 * list(range(total))
    assert rows[:, 1].tolist() == total * [0] + total * [1]
    assert torch.cat([origin.token for _, origin, _ in steps]).tolist() == [i + 2 for i in 2 * list(range(total))]
    for number, (_, _, position) in enumerate(steps):
        ahead = Stream(reader, [SITE], size, start=position, epochs=2 - position.epoch)
        assert [x[SITE].tolist() for x in ahead] == [x.tolist() for x, _, _ in steps[number + 1 :]]


@pytest.mark.parametrize(("sites", "size"), [([], 4), ([SITE], 0)])
def test_nothing_to_stream_is_refused(sites, size):
    with pytest.raises(InputError):
        Stream(Counting([3]), sites, size, start=Position(), epochs=1)


def test_a_position_of_another_stream_is_refused():
    with pytest.raises(InputError, match="another stream"):
        next(Stream(Counting([3, 4]), [SITE], 2, start=Position(0, 0, 3), epochs=1))


@pytest.mark.parametrize("part", [lambda x: torch.from_numpy(x).view(torch.int32)[1:], lambda x: x[1:, 2:]])
def test_lent_memory_comes_back_when_nobody_holds_a_part_of_it(part):
    lender = Lender(spare_bytes=2 * 12)
    address = (first := lender.rows(3, 4)).ctypes.data
    held = part(first)
    del first
    gc.collect()
    others = [lender.rows(3, 4) for _ in range(3)]
    assert address not in {one.ctypes.data for one in others}
    del held
    assert lender.rows(3, 5).ctypes.data != address
    again = lender.rows(3, 4)
    assert again.ctypes.data == address
    del others, again
    assert [len(spare) for spare in lender._spare.values()] == [2, 1]  # no more than was allowed


def test_what_is_spare_goes_with_the_lender():
    lender = Lender(spare_bytes=10**6)
    held, spare = lender.rows(3, 4), lender.rows(3, 4)
    memory = weakref.ref(spare.base.base.obj)
    del spare
    assert memory() is not None
    del lender
    assert memory() is None
    held[:] = 1


@pytest.fixture
def rows(tmp_path):
    """(descriptor, what is in the file after 10 bytes) of 3000 rows of 24 bytes."""
    x = np.random.default_rng(0).integers(0, 256, (3000, 24), dtype=np.uint8)
    (tmp_path / "x").write_bytes(b"0123456789" + x.tobytes())
    handle = os.open(tmp_path / "x", os.O_RDONLY)
    yield handle, x
    os.close(handle)


@pytest.mark.parametrize("most", [10**9, 24 * 1024 + 5, 25, 7])
def test_rows_are_read_to_their_places_in_several_arrays(rows, monkeypatch, most):
    """More of them than the system takes at once, or a few bytes at a time; some go nowhere; the rest of the memory is
    left alone.
    """
    handle, x = rows
    preadv, at_once = scatter._system()

    def short(handle, vectors, count, offset):
        whole = preadv(handle, vectors, count, offset)
        return min(whole, most)  # what lies behind is read again

    monkeypatch.setattr(scatter, "_system", lambda: (short, at_once))
    random = np.random.default_rng(1)
    place = np.where(random.random(3000) < 0.2, -1, random.permutation(3510)[:3000])
    memory = [np.full((n, 24), 7, np.uint8) for n in (1000, 1, 2499)]
    places = Places(memory, 24, skipped=10)
    places.read(handle, 10, place[:1700])
    places.read(handle, 10 + 1700 * 24, place[1700:])
    want = np.full((3510, 24), 7, np.uint8)
    want[place[place >= 0]] = x[place >= 0]
    assert np.array_equal(np.concatenate(memory), want[10:])


def test_nothing_is_written_outside_the_memory(rows):
    room = np.zeros((10, 24), np.uint8)
    for place in (12, -2):
        with pytest.raises(ValueError, match="places"):
            Places([room], 24, skipped=2).read(rows[0], 10, np.array([place]))
    frozen = room.copy()
    frozen.flags.writeable = False
    for memory in (room[::2], room[:, :20], frozen):
        with pytest.raises(ValueError, match="rows of 24 bytes"):
            Places([memory], 24)


def test_a_file_that_ends_early_and_one_that_cannot_be_read_are_named(rows):
    handle, _ = rows
    places = Places([np.zeros((3000, 24), np.uint8)], 24)
    for offset in (11, 10 + 24, 10 + 24 * 2999):  # in the last row, before it, and after the first
        with pytest.raises(FormatError, match="ends before its last row"):
            places.read(handle, offset, np.arange(3000))
    with pytest.raises(FormatError, match="Bad file descriptor"):
        places.read(10**6, 10, np.arange(3000))
