"""Selection and comparison are those of sorted and compared numbers, by numpy and by torch, in every dtype."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemscope.dictionaries.ranking import kth_largest, kth_of_groups, reaching


@pytest.fixture(params=[1, 8], autouse=True, scope="module")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


NUMBERS = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1.0078125, 1.00390625, -1.0078125, 3e38, -3e38, 1e-40, -1e-40, 2.5, -7.0]
)
FLOORS = (
    NUMBERS | st.floats(-8, 8, allow_subnormal=True) | st.sampled_from([1.001, -1.001, 1e-45, -1e-45, 3.4e38, -3.4e38])
)


@given(
    st.lists(st.lists(NUMBERS, min_size=8, max_size=8), min_size=1, max_size=4),
    st.lists(FLOORS, min_size=4, max_size=4),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_an_entry_reaches_its_rows_floor_where_the_number_does(numbers, floors, dtype, wide):
    block = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    floor = torch.tensor(floors[: len(block)], dtype=torch.float64)[:, None].to(wide)
    if dtype != torch.bfloat16:
        floor = floor.to(dtype)
    expected = [
        8 * i + j for i, row in enumerate(block.tolist()) for j, one in enumerate(row) if one >= floor[i, 0].item()
    ]
    assert reaching(block, floor).tolist() == expected


@pytest.mark.parametrize("k", [1, 7, 50])
def test_kth_largest(k: int) -> None:
    torch.manual_seed(0)
    table = torch.randint(-9, 9, (20, 50)).float()
    table[3, 5:] = float("-inf")
    assert torch.equal(kth_largest(table, k), table.sort(dim=1, descending=True).values[:, k - 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("shift", [0.0, -2.0, -9.0])
def test_kth_of_groups(dtype: torch.dtype, group: int, shift: float) -> None:
    torch.manual_seed(0)
    block = (torch.randn(30, 64) + shift).to(dtype)
    best = [sorted((max(row[i :: 64 // group]) for i in range(64 // group)), reverse=True) for row in block.tolist()]
    assert kth_of_groups(block, group, 3).tolist() == [max(one[2], 0.0) for one in best]
