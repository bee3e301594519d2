import json
import threading
import time
from dataclasses import replace

import pytest
import torch

from gemscope.activations.harvesting import write_units
from gemscope.activations.passes import AT_ONCE, Passes
from gemscope.activations.plan import Plan
from gemscope.activations.sources import Documents
from gemscope.activations.store import Store
from gemscope.activations.units import Filling
from gemscope.activations.upkeep import verify
from gemscope.core.errors import InputError
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


def test_a_store_made_with_two_passes_at_a_time_is_the_store_made_with_one(tmp_path):
    torch.set_num_threads(1)
    small.store(tmp_path / "one")
    torch.set_num_threads(2)  # each pass has one thread, so that every product is the same
    small.store(tmp_path / "two")
    assert small.content(tmp_path / "one") == small.content(tmp_path / "two")


@pytest.mark.parametrize("step", ["start", "land"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_stops_one_of_two_passes_leaves_nothing_half_and_the_next_run_goes_on(tmp_path, monkeypatch, step, error):
    torch.set_num_threads(2)
    plain, calls, last = getattr(Filling, step), [], [10**9]

    def stopped(*args):
        calls.append(args)
        if len(calls) == last[0]:
            raise error
        return plain(*args)

    monkeypatch.setattr(Filling, step, stopped)
    small.store(tmp_path / "whole")
    last[0] = len(calls) + 2 * len(calls) // 3
    with pytest.raises(error):
        small.store(tmp_path / "s")
    monkeypatch.undo()
    torch.set_num_threads(2)
    assert not list((tmp_path / "s").rglob("*.tmp"))
    assert 0 < len(list((tmp_path / "s" / "units").glob("*.json"))) < Plan.read(tmp_path / "s").units
    small.store(tmp_path / "s")
    assert small.content(tmp_path / "s") == small.content(tmp_path / "whole")


@pytest.mark.parametrize("count", [1, 2])
def test_a_unit_without_rows_and_buckets_of_one_batch(tmp_path, count):
    torch.set_num_threads(count)
    items = list(small.corpus().items)
    items[40:90] = [""] * 50  # a unit and more
    config = replace(small.CONFIG, bucket_rows=40, unit_rows=120)
    small.store(tmp_path / "s", config, Documents(tuple(items)))
    records = [json.loads(path.read_text()) for path in (tmp_path / "s" / "units").glob("*.json")]
    assert any(one["rows"] == 0 for one in records)
    store = Store.open(tmp_path / "s")
    assert store.rows == sum(one["rows"] for one in records) > 0
    assert verify(tmp_path / "s") == []


def test_units_that_were_read_are_whole_when_a_later_one_cannot_be_read(tmp_path):
    torch.set_num_threads(2)
    small.store(tmp_path / "whole")
    cut = Plan.read(tmp_path / "whole").range(3)[0] + 1
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "plan.json").write_bytes((tmp_path / "whole" / "plan.json").read_bytes())
    source, plan = Documents(small.corpus().items[:cut]), Plan.read(tmp_path / "s")
    with pytest.raises(InputError, match="the text has changed"):
        write_units(small.model(), source, plan, tmp_path / "s", range(plan.units))
    assert len(list((tmp_path / "s" / "units").glob("*.json"))) == 3
