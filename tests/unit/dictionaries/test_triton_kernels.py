"""The Triton kernels against dense matrices in float64: on a GPU, or in Triton's interpreter.

Triton decides when it is imported whether it interprets, so on a machine without a GPU one test starts the others in a
process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemscope.dictionaries import triton_kernels as kernels
from gemscope.dictionaries.sparse import Support

pytest.importorskip("triton", reason="Triton is published for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = pytest.mark.skipif(not kernels.AVAILABLE, reason="run by test_in_the_interpreter")


@pytest.mark.skipif(kernels.AVAILABLE, reason="the kernels run right here")
def test_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("s" + 12 * "."), done.stdout


@runs
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("d", [1, 5, 40])
def test_products_equal_those_of_the_dense_matrix(share: float, d: int) -> None:
    """Empty rows, latents that never fire, widths that fill no block."""
    torch.manual_seed(d)
    dense = torch.randn(7, 11, dtype=torch.float64, device=DEVICE) * (torch.rand(7, 11, device=DEVICE) < share)
    dense[2] = 0
    dense[:, 4] = 0
    rows, latents = dense.nonzero(as_tuple=True)
    support, values = Support(rows, latents, 7, 11), dense[rows, latents]
    by_latent = torch.randn(11, d, dtype=torch.float64, device=DEVICE)
    by_row = torch.randn(7, d, dtype=torch.float64, device=DEVICE)

    decoded = kernels.bag(latents, by_latent, support.row_offsets, values)
    torch.testing.assert_close(decoded, dense @ by_latent, rtol=0, atol=1e-12)
    order, offsets = support.by_latent
    gradient = kernels.bag(rows[order], by_row, offsets, values[order])
    torch.testing.assert_close(gradient, dense.T @ by_row, rtol=0, atol=1e-12)
    found = kernels.pair_dots(latents, support.row_offsets, by_row, by_latent)
    torch.testing.assert_close(found, (by_row @ by_latent.T)[rows, latents], rtol=0, atol=1e-12)


@runs
def test_repeated_entries_add_up() -> None:
    index, offsets = (torch.tensor(n, device=DEVICE) for n in ([1, 1, 0], [0, 2, 2, 3]))
    weights = torch.tensor([2.0, 3.0, 1.0], device=DEVICE)
    table = torch.tensor([[1.0, 10.0], [100.0, 1000.0]], device=DEVICE)
    found = kernels.bag(index, table, offsets, weights)
    assert found.tolist() == [[500.0, 5000.0], [0.0, 0.0], [1.0, 10.0]]


@runs
def test_tensors_may_be_views() -> None:
    """Every number at hand is told apart from its neighbours in memory."""
    index, offsets = (torch.tensor(n, device=DEVICE) for n in ([0, 9, 1, 9, 2, 9], [0, 9, 1, 9, 3, 9]))
    index, offsets = index[::2], offsets[::2]
    weights = torch.tensor([1.0, 5.0, 7.0], device=DEVICE)[:1].expand(3)
    table = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]], device=DEVICE).T
    assert kernels.bag(index, table, offsets, weights).tolist() == [[1.0, 2.0], [110.0, 220.0]]
    left = torch.tensor([[1.0, 3.0], [1.0, 1.0]], device=DEVICE).T
    assert kernels.pair_dots(index, offsets, left, table).tolist() == [3.0, 50.0, 500.0]


@runs
def test_wide_rows_are_split_over_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_WIDEST", 4)
    table = torch.randn(3, 10, device=DEVICE)
    index, offsets = (torch.tensor([0, 2], device=DEVICE) for _ in range(2))
    found = kernels.bag(index, table, offsets, torch.tensor([1.0, -2.0], device=DEVICE))
    torch.testing.assert_close(found[0], table[0] - 2 * table[2], rtol=1e-6, atol=1e-6)
