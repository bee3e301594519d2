"""The dense product equals the plain formula, with and without oneDNN."""

import pytest
import torch

from gemscope.dictionaries import products
from gemscope.dictionaries.products import Affine


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
