"""From which share of active entries on dense matrices are faster: where ``dictionaries.sparse`` changes over.

Decoding, the gradient at the entries and the gradient of the table (one product each), from the same random codes
[1024, d_sae], d 640, fp32, one thread: CPU-seconds by the sparse products, index work included, and by the dense ones.
The crossing is where a straight line between the two neighbouring shares, in logarithms, has a ratio of 1.
"""

import math
import os
import time
from itertools import pairwise

import torch
from _common import Result, arguments, machine, report

from gemscope.dictionaries.sparse import Support, dots, times_latents, times_rows

BATCH, D = 1024, 640
SHARES = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3)


def seconds(mask: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, is_dense: bool) -> float:
    """CPU-seconds of the three products."""
    where = mask.nonzero(as_tuple=True)
    values = torch.rand(len(where[0]))
    support = Support(where[0], where[1], *mask.shape)
    vars(support)["is_dense"] = is_dense
    start = time.process_time()
    times_latents(support, values, table)
    dots(support, rows, table)
    times_rows(support, values, rows)
    return time.process_time() - start


def measured(d_sae: int, shares: tuple[float, ...], rounds: int) -> list[Result]:
    """Both ways at every share, and where they cross."""
    generator = torch.Generator().manual_seed(0)
    table, rows = (torch.randn(n, D, generator=generator) for n in (d_sae, BATCH))
    on = f"d 640, batch {BATCH}, best of {rounds}, load {os.getloadavg()[0]:.1f}; {machine()}"
    found: list[Result] = []
    ratios: list[tuple[float, float]] = []
    for share in shares:
        mask = torch.rand(BATCH, d_sae, generator=generator) < share
        pairs = [(seconds(mask, table, rows, False), seconds(mask, table, rows, True)) for _ in range(rounds)]
        sparse, dense = (min(times) for times in zip(*pairs, strict=True))
        name = f"{d_sae} latents, L0 {share * d_sae:.0f} ({share:.0%})"
        found += [Result(f"{name}, sparse", sparse, "CPU-s", on), Result(f"{name}, dense", dense, "CPU-s", on)]
        ratios.append((math.log(share), math.log(sparse / dense)))
    for (a, below), (b, above) in pairwise(ratios):
        if below < 0 <= above:
            at = math.exp(a + (b - a) * below / (below - above))
            found.append(Result(f"{d_sae} latents, dense is faster from", at, "share", on))
    return found


def main() -> None:
    """Run and print."""
    o = arguments(__doc__ or "")
    torch.set_num_threads(1)
    for d_sae in (512,) if o.quick else (4096, 8192, 16384):
        report(measured(d_sae, SHARES[::4] if o.quick else SHARES, 1 if o.quick else 3), o.json)


if __name__ == "__main__":
    main()
