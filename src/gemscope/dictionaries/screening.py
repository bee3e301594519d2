"""Which entries of a batch are active, found while the encoder is being trained: above thresholds, the k largest
of each row, or the largest of the batch.

Notable:
- the encoder lies row by row, ``E = W_enc.T [d_sae, d_in]``, so that one latent is one stretch of memory;
- the product is made block by block of rows; of a block only the maxima of small groups of latents are compared,
  and only the groups that reach the floor are looked into, so no sort ever sees d_sae numbers;
- ``screen=True`` makes the product in bf16, lowers the floor by a proven bound on its error, and computes the
  few survivors in fp32: the same entries as in fp32, in less than half the time where the processor multiplies
  bf16 natively.

The bound: with x~, e~, b~ for what is rounded to bf16, |x~ . e~ + b~ - (x . e + b)| is at most ||x - x~|| ||e|| +
||x~|| ||e - e~|| + |b - b~| by Cauchy-Schwarz, where the norms of the roundings are measured; the fp32 sums add at most
d_in 2^-23 ||x|| ||e|| (Higham, Accuracy and Stability, section 3.1), and the result is rounded to bf16 once more, by at
most 2^-8 of itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.dictionaries.products import Affine, kth_largest
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
    product = _Product(x, E, bias - floor, screen)
    rows, latents, values = product.at_least(lambda maxima, start: maxima.new_zeros(len(maxima), 1))
    support, gaps = product.exact(rows, latents, values)
    keep = gaps > 0
    support, gaps = _keep(support, gaps, keep)
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
    k = min(k, len(E))
    product = _Product(x, E, bias, screen)

    def kth(maxima: Tensor, start: int) -> Tensor:
        # k groups reach it, hence k entries do: the k-th largest entry is no smaller
        count = maxima.shape[1]
        smallest = kth_largest(maxima, k)[:, None] if k <= count else None
        return maxima.new_zeros(len(maxima), 1) if smallest is None else smallest.clamp(min=0)

    support, values = product.exact(*product.at_least(kth, twice=True))
    support, values = _keep(support, values, values > 0)
    smallest = _kth_of_rows(support, values, k)
    return _keep(support, values, not_surplus(support.rows, values, smallest, k))


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
        support, values = product.exact(*product.at_least(lambda m, start, f=floor: m.new_full((len(m), 1), f)))
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


@dataclass
class _Product:
    """x E' + bias, in blocks."""

    x: Tensor
    E: Tensor
    bias: Tensor
    screen: bool

    def __post_init__(self) -> None:
        size = len(self.E)
        self.group = _group_size(size)
        self.rows = max(_ROWS, _BLOCK.get(self.x.device.type, 1 << 27) // size)
        self.low = [t.bfloat16() if self.screen else t for t in (self.x, self.E, self.bias)]
        self.margins = _margins(self.x, self.E, self.bias, self.low) if self.screen else None

    def at_least(self, floor: Callable[[Tensor, int], Tensor], twice: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, latents and values of all entries that may reach the floor; and some that may not, in a screen.

        ``floor`` gives one number per row from the group maxima of a block; with ``twice`` these are themselves
        off by the error of a screen.
        """
        x, E, bias = self.low
        product = Affine(E.T, bias)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(x), self.rows):
            block = product(x[start : start + self.rows])
            maxima = block.view(len(block), self.group, -1).amax(1).to(self.x.dtype)
            low = floor(maxima, start)
            if self.margins is not None:
                slack = self.margins[start : start + self.rows]
                if twice:
                    low = low - _UNIT * low.abs() - slack
                low = (low - slack) - _UNIT * (low - slack).abs()
            parts.append(_look(block, maxima, low, self.group, start))
        rows, latents, values = (torch.cat(part) for part in zip(*parts, strict=True))
        return rows, latents, values

    def exact(self, rows: Tensor, latents: Tensor, values: Tensor) -> Found:
        """As a Support in order; survivors of a screen get their value in fp32."""
        order = _order(latents, len(self.E))
        rows, latents = rows.index_select(0, order), latents.index_select(0, order)
        by_row = _order(rows, len(self.x))
        support = Support(rows.index_select(0, by_row), latents.index_select(0, by_row), len(self.x), len(self.E))
        if not self.screen:
            return support, values.index_select(0, order).index_select(0, by_row)
        return support, dots(support, self.x, self.E) + self.bias.index_select(0, support.latents)


def _margins(x: Tensor, E: Tensor, bias: Tensor, low: Sequence[Tensor]) -> Float[Tensor, "batch 1"]:
    """How far a row's pre-activations may be from those in bf16, before these are rounded themselves."""
    off_x = (x - low[0]).norm(dim=1, keepdim=True)
    parts = zip(E.split(_ROWS), low[1].split(_ROWS), strict=True)
    off_E = torch.stack([(part - short).norm(dim=1).max() for part, short in parts]).max()
    size_x, size_E = x.norm(dim=1, keepdim=True) + off_x, E.norm(dim=1).max() + off_E
    sums = x.shape[1] * 2.0**-23 * size_x * size_E
    return 1.001 * (off_x * size_E + size_x * off_E + sums) + (bias - low[2]).abs().max()


def _group_size(size: int) -> int:
    """A power of two that divides ``size``, an eighth of its square root: both searches are then short."""
    group = 1
    while size % (2 * group) == 0 and 64 * (2 * group) ** 2 <= size:
        group *= 2
    return group


def _look(block: Tensor, maxima: Tensor, floor: Tensor, group: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of a block that reach the floor of their row."""
    count = maxima.shape[1]
    hit = (maxima >= floor).view(-1).nonzero()[:, 0]
    row = torch.div(hit, count, rounding_mode="floor")
    first = row * block.shape[1] + hit - row * count
    steps = torch.arange(group, device=block.device) * count
    found = block.view(-1).take(first[:, None] + steps).to(maxima.dtype)
    where = (found >= floor.view(-1).index_select(0, row)[:, None]).view(-1).nonzero()[:, 0]
    of = torch.div(where, group, rounding_mode="floor")
    rows = row.index_select(0, of)
    latents = (hit - row * count).index_select(0, of) + (where - of * group) * count
    return rows + start, latents, found.view(-1).index_select(0, where)


def _order(index: Tensor, size: int) -> Tensor:
    """What sorts ``index`` stably; short integers sort in half the time."""
    kind = torch.int16 if size < 1 << 15 else torch.int32
    return index.to(kind).sort(stable=True).indices


def _keep(support: Support, values: Tensor, keep: Tensor) -> Found:
    if bool(keep.all()):
        return support, values
    at = keep.nonzero()[:, 0]
    rows, latents = support.rows.index_select(0, at), support.latents.index_select(0, at)
    return Support(rows, latents, support.batch, support.d_sae), values.index_select(0, at)


def _kth_of_rows(support: Support, values: Tensor, k: int) -> Tensor:
    """The k-th largest value of each row; minus infinity where there are fewer."""
    offsets = support.row_offsets
    width = max(k, int((offsets[1:] - offsets[:-1]).max()))
    table = values.new_full((support.batch, width), float("-inf"))
    place = torch.arange(len(values), device=values.device) - offsets.index_select(0, support.rows)
    table.view(-1)[support.rows * width + place] = values
    return kth_largest(table, k)


def _guess(x: Tensor, E: Tensor, bias: Tensor, count: int) -> float:
    """A little below the same quantile of some rows."""
    sample = x[:: max(1, len(x) // 64)][:64]
    pre_acts = Affine(E.T, bias)(sample).view(-1)
    wanted = min(len(pre_acts), max(1, round(1.2 * count * len(sample) / len(x))))
    return float(pre_acts.topk(wanted, sorted=False).values.min())
