"""Which entries of a batch are active, found while the encoder is being trained: above thresholds, the k largest
of each row, or the largest of the batch.

Notable:
- the encoder lies row by row, ``E = W_enc.T [d_sae, d_in]``, so that one latent is one stretch of memory;
- the product is made block by block of rows, and a block is compared with one floor per row; of the k largest of a
  row it comes from the maxima of small groups of latents, so no sort ever sees d_sae numbers;
- ``screen=True`` makes the product in bf16, lowers the floor by a proven bound on its error, and computes the
  few survivors in fp32: the same entries as in fp32, in less than half the time where the processor multiplies
  bf16 natively.

The bound: with x~, e~, b~ for what is rounded to bf16, |x~ . e~ + b~ - (x . e + b)| is at most ||x - x~|| ||e|| +
||x~|| ||e - e~|| + |b - b~| by Cauchy-Schwarz, where the norms of the roundings are measured; the fp32 sums add at most
d_in 2^-23 ||x|| ||e|| (Higham, Accuracy and Stability, section 3.1), and the result is rounded to bf16 once more, by at
most 2^-8 of itself.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.dictionaries.products import Affine
from gemscope.dictionaries.ranking import kth_largest, kth_of_groups, reaching
from gemscope.dictionaries.sparse import Support, dots, not_surplus

_ROWS = 256
"""Rows of a block on a CPU, at least: fewer make the matrix product slower."""
_BLOCK = {"cpu": 1 << 22}
"""Pre-activations of a block."""
_UNIT = 1.01 * 2.0**-8
"""Largest relative change by rounding to bf16, and a little for products of roundings."""


@cache
def _cpu_flags() -> frozenset[str]:
    """What the processor can do; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


Found = tuple[Support, Float[Tensor, " entries"]]


def bf16_is_fast(device: torch.device) -> bool:
    """Whether this processor multiplies bf16 matrices faster than fp32 ones."""
    if device.type == "cpu":
        return "avx512_bf16" in _cpu_flags()
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def above(
    x: Float[Tensor, "batch d_in"],
    E: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    floor: Float[Tensor, " d_sae"],
    *,
    screen: bool = False,
) -> Found:
    """The pre-activations x E' + bias above ``floor``, one floor per latent."""
    support, gaps = _Product(x, E, bias - floor, screen).at_least(lambda block: block.new_zeros(len(block), 1))
    support, gaps = _keep(support, gaps, gaps > 0)
    return support, gaps + floor.index_select(0, support.latents)


def top_of_rows(
    x: Float[Tensor, "batch d_in"],
    E: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    *,
    screen: bool = False,
) -> Found:
    """The k largest positive pre-activations of each row, of equal ones those of the lower latents."""
    k, group = min(k, len(E)), _group_size(len(E), k)
    product = _Product(x, E, bias, screen)
    support, values = product.at_least(lambda block: kth_of_groups(block, group, k)[:, None], twice=True)
    support, values = _keep(support, values, values > 0)
    offsets = support.row_offsets
    counts = offsets[1:] - offsets[:-1]
    smallest = _kth_of_rows(support, values, max(k, int(counts.max())), k)
    reached = values >= smallest.index_select(0, support.rows)
    if int(reached.sum()) > int(counts.clamp(max=k).sum()):  # equal ones, of which not all are wanted
        reached = not_surplus(support.rows, values, smallest, k)
    return _keep(support, values, reached)


def top_of_batch(
    x: Float[Tensor, "batch d_in"],
    E: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    count: int,
    *,
    guess: float | None = None,
    screen: bool = False,
) -> tuple[Support, Float[Tensor, " entries"], float]:
    """The ``count`` largest positive pre-activations of the whole batch, and the smallest of them.

    ``guess`` says below which value the smallest will hardly be; a wrong one costs time only. Without one it is
    taken from some of the rows.
    """
    product = _Product(x, E, bias, screen)
    guess = _guess(x, E, bias, count) if guess is None else guess
    while True:
        floor = max(guess, 0.0)
        support, values = product.at_least(lambda block, f=floor: block.new_full((len(block), 1), f, dtype=x.dtype))
        enough = int((values > floor).sum()) >= count
        if enough or floor == 0.0:
            break
        guess = 0.8 * floor if guess > 1e-3 * float(values.max() if len(values) else 0) else 0.0
    support, values = _keep(support, values, values > 0)
    if len(values) <= count:
        return support, values, float(values.min()) if len(values) else 0.0
    smallest = kth_largest(values[None], count)[0]
    one_row = torch.zeros_like(support.rows)
    support, values = _keep(support, values, not_surplus(one_row, values, smallest[None], count))
    return support, values, float(smallest)


class _Product:
    """x E' + bias, in blocks."""

    def __init__(self, x: Tensor, E: Tensor, bias: Tensor, screen: bool) -> None:
        self.x, self.E, self.bias = x, E, bias
        self.rows = max(_ROWS, _BLOCK.get(x.device.type, 1 << 27) // len(E))
        self.low = (x, E, bias)
        self.margins = None
        if screen:
            (low_x, off_x, size_x), (low_E, off_E, size_E) = _rounded(x), _rounded(E)
            self.low = (low_x, low_E, bias.bfloat16())
            off_bias = (bias - self.low[2]).abs().max()
            self.margins = _margins(x.shape[1], off_x, size_x, off_E.max(), size_E.max(), off_bias)[:, None]

    def at_least(self, floor: Callable[[Tensor], Tensor], twice: bool = False) -> Found:
        """All entries that reach the floor; and some that do not, in a screen, whose survivors get their value in fp32.

        ``floor`` gives one number per row of a block of pre-activations; with ``twice`` these are themselves off by
        the error of a screen.
        """
        x, E, bias = self.low
        product = Affine(E.T, bias)
        rows, latents, values = list[Tensor](), list[Tensor](), list[Tensor]()
        for start in range(0, len(x), self.rows):
            block = product(x[start : start + self.rows])
            low = floor(block).to(self.x.dtype)
            if self.margins is not None:
                slack = self.margins[start : start + self.rows]
                if twice:
                    low = low - _UNIT * low.abs() - slack
                low = (low - slack) - _UNIT * (low - slack).abs()
            hit = reaching(block, low)
            row = torch.div(hit, block.shape[1], rounding_mode="floor")
            rows.append(row + start)
            latents.append(hit - row * block.shape[1])
            if self.margins is None:
                values.append(block.view(-1).index_select(0, hit))
        support = Support(torch.cat(rows), torch.cat(latents), len(x), len(E))
        if self.margins is None:
            return support, torch.cat(values)
        return support, dots(support, self.x, self.E) + self.bias.index_select(0, support.latents)


def _rounded(table: Float[Tensor, "n d"]) -> tuple[Tensor, Float[Tensor, " n"], Float[Tensor, " n"]]:
    """A table in bf16; of each row the length of what rounding changed, and its own."""
    low = torch.empty_like(table, dtype=torch.bfloat16)
    rows = _ROWS if table.device.type == "cpu" else len(table)
    off, size = list[Tensor](), list[Tensor]()
    for part, short in zip(table.split(rows), low.split(rows), strict=True):  # while it is in the cache
        short.copy_(part)
        off.append((part - short).norm(dim=1))
        size.append(part.norm(dim=1))
    return low, torch.cat(off), torch.cat(size)


def _margins(
    d_in: int, off_x: Tensor, size_x: Tensor, off_E: Tensor, size_E: Tensor, off_bias: Tensor
) -> Float[Tensor, " batch"]:
    """How far a row's pre-activations may be from those in bf16, before these are rounded themselves."""
    size_x, size_E = size_x + off_x, size_E + off_E
    sums = d_in * 2.0**-23 * size_x * size_E
    return 1.001 * (off_x * size_E + size_x * off_E + sums) + off_bias


def _group_size(size: int, k: int) -> int:
    """A power of two that divides ``size``, an eighth of its square root, and leaves at least ``k`` groups."""
    group = 1
    while size % (2 * group) == 0 and 64 * (2 * group) ** 2 <= size and 2 * group * k <= size:
        group *= 2
    return group


def _keep(support: Support, values: Tensor, keep: Tensor) -> Found:
    if bool(keep.all()):
        return support, values
    at = keep.nonzero()[:, 0]
    rows, latents = support.rows.index_select(0, at), support.latents.index_select(0, at)
    return Support(rows, latents, support.batch, support.d_sae), values.index_select(0, at)


def _kth_of_rows(support: Support, values: Tensor, width: int, k: int) -> Tensor:
    """The k-th largest value of each row, minus infinity where there are fewer; no row has more than ``width``."""
    table = values.new_full((support.batch, width), float("-inf"))
    place = torch.arange(len(values), device=values.device) - support.row_offsets.index_select(0, support.rows)
    table.view(-1)[support.rows * width + place] = values
    return kth_largest(table, k)


def _guess(x: Tensor, E: Tensor, bias: Tensor, count: int) -> float:
    """A little below the same quantile of some rows."""
    sample = x[:: max(1, len(x) // 64)][:64]
    pre_acts = Affine(E.T, bias)(sample).view(-1)
    wanted = min(len(pre_acts), max(1, round(1.2 * count * len(sample) / len(x))))
    return float(pre_acts.topk(wanted, sorted=False).values.min())
