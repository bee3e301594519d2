"""The dense product and the selection equal the plain formulas, with and without oneDNN."""

import pytest
import torch

from gemscope.dictionaries import products
from gemscope.dictionaries.products import Affine, kth_largest


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("batch", [0, 1, 33])
def test_affine(has: bool, dtype: torch.dtype, layout: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_onednn", lambda: has)
    torch.manual_seed(0)
    x, b = torch.randn(batch, 24, dtype=dtype), torch.randn(70, dtype=dtype, requires_grad=True)
    W = torch.randn(24, 70, dtype=dtype) if layout == "rows" else torch.randn(70, 24, dtype=dtype).T
    found = Affine(W, b)(x)
    assert (found.dtype, found.shape, found.requires_grad) == (dtype, (batch, 70), False)
    exact = x.double() @ W.double() + b.double()
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_kth_largest(threads: int, k: int) -> None:
    torch.manual_seed(0)
    table = torch.randint(-9, 9, (20, 50)).float()
    table[3, 5:] = float("-inf")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = kth_largest(table, k)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, table.sort(dim=1, descending=True).values[:, k - 1])
