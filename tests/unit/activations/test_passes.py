import threading
import time

import pytest
import torch

from gemscope.activations.passes import AT_ONCE, Passes
from unit.activations import small


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_all_come_in_order_and_the_threads_are_shared_out(count):
    torch.set_num_threads(count)
    seen, running, most = [], [], []

    def start(item):
        seen.append(torch.get_num_threads())
        running.append(item)
        most.append(len(running))
        time.sleep(0.01 if item % 3 else 0.03)
        return item

    def land(item, moved):
        assert item == moved
        running.remove(item)
        return threading.get_ident()

    with Passes(small.model()) as passes:
        landed = list(passes.each(range(20), start, land))
        elsewhere = list[int]()
        other = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert [item for item, _ in landed] == list(range(20))
    assert max(most) == AT_ONCE  # with one thread the next one starts before the last lands
    assert set(seen) == {max(1, count // AT_ONCE)}
    assert len({thread for _, thread in landed}) == (1 if count == 1 else AT_ONCE)
    assert [torch.get_num_threads(), *elsewhere] == [count, count]


def test_each_thread_has_memory_and_modules_of_its_own_and_all_have_the_same_weights():
    torch.set_num_threads(2)
    gate = threading.Barrier(2)
    with Passes(small.model()) as passes:

        def place(_):
            gate.wait()
            return passes.scratch.like(torch.zeros(4, 4), torch.float32).data_ptr(), passes.gemma

        (_, (one, first)), (_, (two, second)) = passes.each(range(2), place, lambda _, found: found)
    assert one != two
    assert first.decoder.trunk is not second.decoder.trunk
    weights = zip(first.model.parameters(), second.model.parameters(), small.model().model.parameters(), strict=True)
    assert all(a is b is c for a, b, c in weights)


def test_an_error_is_raised_where_its_item_is_due_and_no_pass_goes_on():
    torch.set_num_threads(2)
    started = []

    def start(item):
        started.append(item)
        if item == 3:
            raise ValueError("no")
        return item

    got = []
    with pytest.raises(ValueError, match="no"), Passes(small.model()) as passes:
        for item, _ in passes.each(range(100), start, lambda item, _: item):
            got.append(item)
    assert got == [0, 1, 2]
    assert len(started) < 10
    before = len(started)
    time.sleep(0.05)
    assert len(started) == before


@pytest.mark.parametrize("count", [1, 2])
def test_an_item_that_has_to_wait_comes_when_one_more_has_landed(count):
    torch.set_num_threads(count)
    log, taken = [], []

    def items():
        for item in range(6):
            while item - len(taken) > 0:  # none is given before the last one was taken
                log.append("wait")
                yield None
            yield item

    with Passes(small.model()) as passes:
        for item, _ in passes.each(items(), lambda item: item, lambda item, _: item):
            taken.append(item)
    assert taken == list(range(6))
    assert log == ["wait"] * 5


def test_a_store_made_with_two_passes_at_a_time_is_the_store_made_with_one(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    small.store(tmp_path / "one")
    torch.set_num_threads(2)  # each pass has one thread, so that every product is the same
    small.store(tmp_path / "two")
    assert small.content(tmp_path / "one") == small.content(tmp_path / "two")
