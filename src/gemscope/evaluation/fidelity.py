"""What a dictionary keeps of the activations it reconstructs, and how sparsely; streamed, in float64.

Definitions (y a row at a site that is written, ŷ its reconstruction, ⟨·⟩ the mean over all content rows, never over
batches; several written sites: the mean of theirs):

- ``l0``: ⟨number of active latents⟩, over all positions;
- ``fvu``: ⟨‖y − ŷ‖²⟩ / ⟨‖y − ȳ‖²⟩ with ȳ = ⟨y⟩ per dimension, so that a dictionary that always answers the mean has 1
  (Gemma Scope, Lieberum et al. 2024, section 4.1); explained variance is 1 − FVU;
- ``fvu_robust``: the same over the rows with ‖y‖ ≤ 10 × the median norm;
- ``cosine``: ⟨cos(y, ŷ)⟩; ``norm_ratio``: ⟨‖ŷ‖⟩ / ⟨‖y‖⟩, below 1 when the reconstruction shrinks;
- ``bias``: ⟨‖ŷ‖²⟩ / ⟨y·ŷ⟩, the relative reconstruction bias; 1 is unbiased (Rajamanoharan et al. 2024, eq. 10).

By position and by speaker ``fvu`` is the group's ⟨‖y − ŷ‖²⟩ over the spread of all rows: the groups' values average to
the whole, and no group's own spread hides its error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.core.errors import InputError
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.sparse import Support
from gemscope.evaluation.groups import Places, Sums, group_name
from gemscope.evaluation.moments import Moments

DENSITY_BINS = tuple(-6 + 0.5 * i for i in range(13))
"""Edges of the density histogram, as log10(share of rows): -6, -5.5, ... 0. The first bin also takes what is
below.
"""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the number of active latents per row."""

DENSE = 0.1
"""A latent is dense when it is active on more than this share of the rows."""


@dataclass(frozen=True)
class Reconstruction:
    """One written site."""

    site: str
    fvu: float
    fvu_robust: float | None
    """Without the outliers; None when they could not be told from one pass."""
    outliers: int | None
    """Rows of more than 10 times the median norm."""
    mse: float
    cosine: float
    norm_in: float
    """⟨‖y‖⟩."""
    norm_out: float
    """⟨‖ŷ‖⟩."""
    bias: float
    compat: Mapping[str, float] = field(default_factory=dict[str, float])
    """As other tools define them, right or wrong: see ``saebench``."""


@dataclass(frozen=True)
class GroupFidelity:
    """The rows of a stretch of positions, or of a speaker."""

    name: str
    rows: int
    l0: float
    fvu: float


@dataclass(frozen=True)
class PrefixPoint:
    """The dictionary of the first ``latents`` latents."""

    latents: int
    l0: float
    fvu: float


@dataclass(frozen=True)
class Fidelity:
    """What a dictionary keeps of its activations; every number is over ``rows`` rows."""

    rows: int
    """Number of token positions measured."""
    l0: float
    """Mean number of latents active per row."""
    fvu: float
    """Fraction of variance unexplained; 0 is perfect, 1 is no better than the mean."""
    mse: float
    """Mean squared distance ‖y − ŷ‖², summed over dimensions."""
    cosine: float
    """Mean cosine between a row and its reconstruction."""
    norm_ratio: float
    """Mean norm of the reconstruction over mean norm of the activation."""
    firings: tuple[int, ...]
    """Per latent, the number of rows on which it is active."""
    fvu_robust: float | None = None
    """FVU without rows of more than 10 times the median norm."""
    outliers: int | None = None
    """How many rows these are, over all written sites."""
    bias: float | None = None
    """Relative reconstruction bias; below 1 where the reconstruction is too long, above where it shrinks."""
    l1: float | None = None
    """Mean sum of the absolute activations per row."""
    l0_quantiles: tuple[float, ...] = ()
    """At ``QUANTILES``."""
    texts_fired: tuple[int, ...] = ()
    """Per latent, the number of documents in which it is active."""
    by_site: tuple[Reconstruction, ...] = ()
    by_group: tuple[GroupFidelity, ...] = ()
    """By position, then by speaker."""
    prefixes: tuple[PrefixPoint, ...] = ()
    """Matryoshka prefixes, the smallest first, the whole dictionary last; empty for others."""

    @cached_property
    def dead(self) -> int:
        """Latents that were active on none of the rows."""
        return sum(count == 0 for count in self.firings)

    @property
    def alive(self) -> int:
        """Latents that were active at least once."""
        return len(self.firings) - self.dead

    @property
    def dead_fraction(self) -> float:
        """Dead latents over all latents; falls as more rows are seen, so quote ``rows`` with it."""
        return self.dead / len(self.firings)

    @property
    def dense_fraction(self) -> float:
        """Latents active on more than a tenth of the rows, over all latents."""
        return sum(count > self.rows * DENSE for count in self.firings) / len(self.firings)

    @property
    def density(self) -> Float[Tensor, "d_sae"]:
        """Per latent, the share of rows on which it is active."""
        return torch.tensor(self.firings, dtype=torch.float64) / self.rows

    @property
    def histogram(self) -> tuple[int, ...]:
        """Latents alive per bin of log10 density; the bins' edges are ``DENSITY_BINS``."""
        density = self.density
        edges = torch.tensor(DENSITY_BINS, dtype=torch.float64)
        place = torch.bucketize(density[density > 0].log10(), edges[1:-1], right=True)
        return tuple(torch.bincount(place, minlength=len(DENSITY_BINS) - 1).tolist())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the derived numbers."""
        derived = {
            "dead": self.dead,
            "dead_fraction": self.dead_fraction,
            "dense_fraction": self.dense_fraction,
            "density_histogram": {"log10_edges": list(DENSITY_BINS), "latents": list(self.histogram)},
        }
        return asdict(self) | derived


@dataclass(frozen=True)
class Targets:
    """Rows of a site that is written, with what every dictionary needs of them; float64 on the CPU."""

    y: Float[Tensor, "rows width"]
    square: Float[Tensor, " rows"]
    norm: Float[Tensor, " rows"]
    centred: Float[Tensor, " rows"]
    """Squared distance from the mean of these rows, for ``compat`` only."""
    apart: Bool[Tensor, " rows"]
    """What ``Moments.add`` said of them."""

    @classmethod
    def of(cls, y: Float[Tensor, "rows width"], apart: Bool[Tensor, " rows"]) -> "Targets":
        """From the rows of one batch."""
        y = y.double().cpu()
        square = y.square().sum(1)
        return cls(y, square, square.sqrt(), (y - y.mean(0)).square().sum(1), apart)


_ERROR = ("sse", "norm", "norm_out", "cosine", "square_out", "dot", "ratio", "legacy", "shared", "square")


class ErrorSums:
    """Running sums of the error at one written site: ``add`` per batch, then ``result``."""

    def __init__(self, site: str, moments: Moments, documents: int) -> None:
        self.site = site
        self.moments = moments
        self.sums = Sums(_ERROR, documents)
        self._apart: list[Tensor] = []
        self._kept = 0.0

    def add(self, targets: Targets, recon: Float[Tensor, "rows width"], places: Places) -> None:
        """Take in rows and their reconstruction."""
        if len(recon) == 0:
            return
        y, recon = targets.y, recon.double().cpu()
        error, dot = (y - recon).square().sum(1), (y * recon).sum(1)
        square_out = recon.square().sum(1)
        norm, norm_out = targets.norm, square_out.sqrt()
        cosine = dot / (norm * norm_out).clamp_min(1e-300)
        self.sums.add(
            places,
            error,
            norm,
            norm_out,
            cosine,
            square_out,
            dot,
            norm_out / torch.where(norm < 1e-4, 1.0, norm),
            1 - error / targets.centred.clamp_min(1e-300),
            error / len(y),
            targets.square,
        )
        self._apart.append(error[targets.apart])
        self._kept += float(error[~targets.apart].sum())

    def result(self) -> Reconstruction:
        """Over all rows so far; raises InputError when they have no spread to explain."""
        rows, spread = self.moments.rows, self.moments.spread()
        if rows < 2 or spread.total == 0:
            raise InputError(f"{rows} token positions without any spread; FVU needs at least two that differ.")
        total, robust, outliers = self.sums.total, None, None
        mse = total("sse") / rows
        if (clean := self.moments.without_outliers()) is not None:
            inner, dropped = clean
            outliers = int(dropped.sum())
            rest = self._kept + float(torch.cat(self._apart)[~dropped].sum())
            robust = rest / inner.total if inner.total > 0 else None
        return Reconstruction(
            site=self.site,
            fvu=total("sse") / spread.total,
            fvu_robust=robust,
            outliers=outliers,
            mse=mse,
            cosine=total("cosine") / rows,
            norm_in=total("norm") / rows,
            norm_out=total("norm_out") / rows,
            bias=total("square_out") / total("dot") if total("dot") else float("inf"),
            compat=_compat(self.sums, rows, len(spread.mean)),
        )


def _compat(sums: Sums, rows: int, width: int) -> dict[str, float]:
    """Figures of other tools: SAELens' l2 ratio and legacy variance, and SAEBench core's two wrong ones
    (docs/guides/evaluation.md).
    """
    mse, square = sums.total("sse") / rows, sums.total("square") / rows
    below = square - (square / width) ** 2
    return {
        "l2_ratio": sums.total("ratio") / rows,
        "explained_variance_legacy": sums.total("legacy") / rows,
        "explained_variance_saebench_bug": 1 - mse / below if below else 0.0,
        "mse_saebench_bug": sums.total("shared") / rows,
    }


class FidelitySums:
    """Running sums of one dictionary: ``add`` per batch, then ``result``."""

    def __init__(self, dictionary: Dictionary, errors: Sequence[ErrorSums], documents: int) -> None:
        latents, sizes = dictionary.n_latents, dictionary.prefixes
        self._d_sae = dictionary.d_sae
        self.errors = tuple(errors)
        self.sums = Sums(("rows", "active", "absolute"), documents)
        self._l0: Int[Tensor, " counts"] = torch.zeros(latents + 1, dtype=torch.long)
        self._firings: Int[Tensor, " latents"] = torch.zeros(latents, dtype=torch.long)
        self._texts: Int[Tensor, " latents"] = torch.zeros(latents, dtype=torch.long)
        self._prefix_active = dict.fromkeys(sizes, 0)
        self._prefix_errors = {size: [0.0] * len(errors) for size in sizes}

    def add(self, support: Support, values: Float[Tensor, " active"], places: Places) -> None:
        """Take in the codes of a batch of rows."""
        rows, latents = support.rows.cpu(), support.latents.cpu()
        count = torch.bincount(rows, minlength=support.batch)
        absolute = torch.zeros(support.batch, dtype=torch.float64).index_add(0, rows, values.double().cpu().abs())
        self.sums.add(places, torch.ones(support.batch), count, absolute)
        self._l0 += torch.bincount(count, minlength=len(self._l0))
        self._firings += torch.bincount(latents, minlength=len(self._firings))
        count, local = places.local
        fired = torch.bincount(local[rows] * len(self._texts) + latents, minlength=count * len(self._texts))
        self._texts += (fired.view(count, -1) > 0).sum(0)

    def add_prefix(self, size: int, entries: int, y: Sequence[Targets], recon: Float[Tensor, "rows n _"]) -> None:
        """Take in the reconstruction from the first ``size`` latents, of which ``entries`` were active."""
        self._prefix_active[size] += entries
        for i, target in enumerate(y):
            self._prefix_errors[size][i] += float((target.y - recon[:, i].double().cpu()).square().sum())

    def result(self) -> Fidelity:
        """The measures over all rows so far; raises InputError when the rows have no spread to explain."""
        sites = tuple(error.result() for error in self.errors)
        rows = round(self.sums.total("rows"))
        robust = [one.fvu_robust for one in sites if one.fvu_robust is not None]
        outliers = [one.outliers for one in sites if one.outliers is not None]
        whole = len(sites)
        return Fidelity(
            rows=rows,
            l0=self.sums.total("active") / rows,
            fvu=sum(one.fvu for one in sites) / whole,
            mse=sum(one.mse for one in sites) / whole,
            cosine=sum(one.cosine for one in sites) / whole,
            norm_ratio=sum(one.norm_out / one.norm_in for one in sites) / whole,
            firings=tuple(self._firings.tolist()),
            fvu_robust=sum(robust) / whole if len(robust) == whole else None,
            outliers=sum(outliers) if len(outliers) == whole else None,
            bias=sum(one.bias for one in sites) / whole,
            l1=self.sums.total("absolute") / rows,
            l0_quantiles=tuple(_quantile(self._l0, q) for q in QUANTILES),
            texts_fired=tuple(self._texts.tolist()),
            by_site=sites,
            by_group=self._groups(),
            prefixes=self._curve(rows, sites),
        )

    def unexplained(self, group: int | None = None) -> tuple[Float[Tensor, " documents"], Float[Tensor, " documents"]]:
        """Per document, what FVU is a ratio of: errors over spread, each site's in units of its own mean spread."""
        above = torch.zeros_like(self.sums.per_document("rows"))
        below = torch.zeros_like(above)
        for error in self.errors:
            spread = error.moments.spread()
            unit = spread.total / spread.rows * len(self.errors)
            above = above + error.sums.per_document("sse", group) / unit
            below = below + spread.per_document / unit
        return above, below if group is None else self.sums.per_document("rows", group)

    def _groups(self) -> tuple[GroupFidelity, ...]:
        found: list[GroupFidelity] = []
        for group in sorted(self.sums.groups):
            rows = self.sums.total("rows", group)
            fvu = float(self.unexplained(group)[0].sum()) / rows
            found.append(GroupFidelity(group_name(group), round(rows), self.sums.total("active", group) / rows, fvu))
        return tuple(found)

    def _curve(self, rows: int, sites: Sequence[Reconstruction]) -> tuple[PrefixPoint, ...]:
        sizes = sorted(size for size in self._prefix_errors if size < self._d_sae)
        if not sizes:
            return ()
        spreads = [error.moments.spread().total for error in self.errors]
        points: list[PrefixPoint] = []
        for size in sizes:
            shares = [e / s for e, s in zip(self._prefix_errors[size], spreads, strict=True)]
            points.append(PrefixPoint(size, self._prefix_active[size] / rows, sum(shares) / len(shares)))
        fvu = sum(one.fvu for one in sites) / len(sites)
        return (*points, PrefixPoint(self._d_sae, self.sums.total("active") / rows, fvu))


def _quantile(histogram: Int[Tensor, " counts"], q: float) -> float:
    """The smallest count that at least the share ``q`` of the rows does not exceed."""
    below = histogram.cumsum(0)
    return float((below < q * float(below[-1])).sum())
