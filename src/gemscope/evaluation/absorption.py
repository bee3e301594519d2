"""Splitting and absorption: a concept's latents that fall silent where a more special latent fires.

After Chanin et al. 2024 ("A is for Absorption"), for any concept and any kind with one written site:

- *splits*: the k-sparse probes of k = 1, 2, ... use the concept's strongest latents in order; its *main latents* are
  the first k after which one more raises the F1 by 0.03 or less;
- the concept's direction is that of its dense probe, in the space that is written; a latent's *projection* at a token
  is its activation times the component of its decoder along that direction;
- a token that is positive and that the dense probe calls so is *absorbed* when every main latent is silent, and the
  latent of the largest projection has a cosine of at least 0.025 with the direction and makes up at least 0.4 of the
  projection of the activation itself (from the mean of the training rows, so that no common offset counts);
- *partial*: the share of the (up to three) stand-ins of cosine at least 0.1 in the positive projections of them and the
  main latents together; 0 where there are none.

A dictionary that has learned little has nothing that absorbs: read it beside the AUROC. Decoder norms are part of the
projections, so dictionaries whose decoders are not of unit norm are treated alike.
"""

from collections.abc import Sequence

import torch

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.evaluation.concepts import ActiveEntries
from gemscope.evaluation.probes import Absorption

MORE = 0.03
"""F1 that another latent has to add to count as a split."""
MAIN_SILENT = 1e-8
COSINE = 0.025
SHARE = 0.4
PARTIAL_COSINE = 0.1
STAND_INS = 3


def splits(f1: Sequence[float]) -> int:
    """From the F1 of probes of 1, 2, ... latents: how many it takes until one more adds 0.03 or less."""
    for k in range(1, len(f1)):
        if f1[k] - f1[k - 1] <= MORE:
            return k
    return len(f1)


def absorption(
    active: ActiveEntries,
    decoder: Float[Tensor, "latents width"],
    direction: Float[Tensor, " width"],
    projection: Float[Tensor, " rows"],
    positive: Bool[Tensor, " rows"],
    main: Int[Tensor, " main"],
) -> Absorption:
    """Of one concept; ``projection`` is the activations' from their mean, ``positive`` the probe's true positives."""
    unit = direction.double() / direction.double().norm().clamp_min(1e-300)
    along = decoder.double() @ unit
    cosine = along / decoder.double().norm(dim=1).clamp_min(1e-300)
    rows = positive.nonzero()[:, 0]
    part = active.only(rows)
    written = part.value.double() * along[part.latent]
    is_main = torch.isin(part.latent, main)
    loud = torch.zeros(len(rows), dtype=torch.bool)
    loud[part.row[is_main & (part.value > MAIN_SILENT)]] = True
    own = torch.zeros(len(rows), dtype=torch.float64).index_add(0, part.row[is_main], written[is_main].clamp_min(0.0))
    top, latent = _largest(part, written, ~is_main)
    fits = (latent >= 0) & (cosine[latent.clamp_min(0)] >= COSINE)
    full = ~loud & fits & (top >= SHARE * projection[rows].double()) & (projection[rows] > 0)
    others = _stand_ins(part, written, ~is_main & (cosine[part.latent] >= PARTIAL_COSINE) & (written > 0))
    both = others + own
    partial = torch.where(both > 0, others / both.clamp_min(1e-300), 0.0)
    count = max(len(rows), 1)
    names, times = latent[full].unique(return_counts=True)
    order = times.argsort(descending=True, stable=True)[:10].tolist()
    return Absorption(
        full=float(full.sum()) / count,
        partial=float(partial.sum()) / count,
        true_positives=len(rows),
        stand_ins=tuple((int(names[i]), int(times[i])) for i in order),
    )


def _largest(
    active: ActiveEntries, written: Float[Tensor, " entries"], keep: Bool[Tensor, " entries"]
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Per row the largest projection among some entries, and whose it is (-1: there is none)."""
    top = torch.full((active.shape[0],), -torch.inf, dtype=torch.float64)
    top = top.scatter_reduce(0, active.row[keep], written[keep], "amax")
    latent = torch.full((active.shape[0],), -1, dtype=torch.long)
    best = keep & (written == top[active.row])
    latent[active.row[best]] = active.latent[best]
    return top, latent


def _stand_ins(
    active: ActiveEntries, written: Float[Tensor, " entries"], keep: Bool[Tensor, " entries"]
) -> Float[Tensor, " rows"]:
    """Per row the sum of the three largest projections among some entries."""
    row, value = active.row[keep], written[keep]
    order = value.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    row, value = row[order], value[order]
    count = torch.bincount(row, minlength=active.shape[0])
    place = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    first = place < STAND_INS
    return torch.zeros(active.shape[0], dtype=torch.float64).index_add(0, row[first], value[first])
