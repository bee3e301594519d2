"""Interventions: frozen values that say how a forward pass is changed at a site.

Each changes the value at its ``site`` where its ``positions``, ``steps`` and ``heads`` select; several at one
site are applied in the order given, and a later site sees the change of an earlier one. What a capture holds
at a changed site is the value after all changes. At ``pattern`` the positions are queries, and rows are not
renormalised.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from gemscope.core.arrays import Bool, Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.models.freeze import FreezeNorms, FreezePatterns
from gemscope.models.layout import ModelShape
from gemscope.models.positions import Moment, Positions, Steps, select

_HEADED = {"q": "n_heads", "z": "n_heads", "pattern": "n_heads", "k": "n_kv_heads", "v": "n_kv_heads"}


@dataclass(frozen=True, eq=False)
class SiteEdit:
    """What all interventions at a site share; use one of the classes below."""

    site: str | Site
    positions: Positions = field(default=None, kw_only=True)
    """Where along each text; None: everywhere."""
    steps: Steps = field(default="all", kw_only=True)
    """At which steps of a generation; a capture is step 0."""
    heads: Sequence[int] | None = field(default=None, kw_only=True)
    """Which heads, at ``q``, ``k``, ``v`` (key/value heads for k and v), ``z`` and ``pattern``; None: all."""

    @property
    def place(self) -> Site:
        """The site, parsed; raises SiteError."""
        return Site.parse(self.site)

    def new(self, x: Tensor, moment: Moment) -> tuple[Tensor, Bool[Tensor, "pos"] | None]:
        """The value to put in the place of ``x``, and the columns for which there is one (None: all)."""
        raise AssertionError("SiteEdit is the base of the interventions, not one itself")

    def apply(self, x: Tensor, moment: Moment, shape: ModelShape) -> Tensor:
        """``x`` with this change made where it is selected."""
        chosen = select(moment, self.positions, self.steps)
        if chosen is not None and not bool(chosen.any()):
            return x
        new, known = self.new(x, moment)
        if new.shape != x.shape:
            raise InputError(
                f"the intervention at '{self.site}' gave shape {tuple(new.shape)} where {tuple(x.shape)} belongs."
            )
        new = new.to(x.dtype)
        if known is not None:
            chosen = known[None] if chosen is None else chosen & known
        if chosen is None and self.heads is None:
            return new
        where = torch.ones((), dtype=torch.bool, device=x.device)
        if chosen is not None:
            where = chosen.to(x.device)[:, None, :, None] if x.ndim == 4 else chosen.to(x.device)[..., None]
        if self.heads is not None:
            where = where & self._head_mask(self.heads, shape).to(x.device)
        return torch.where(where, new, x)

    def _head_mask(self, heads: Sequence[int], shape: ModelShape) -> Bool[Tensor, "..."]:
        site = self.place
        if site.name not in _HEADED:
            raise InputError(f"site '{site}' has no heads; heads can be chosen at {', '.join(_HEADED)}.")
        n_heads: int = getattr(shape, _HEADED[site.name])
        if any(not 0 <= head < n_heads for head in heads):
            raise InputError(f"heads {list(heads)} do not all exist at '{site}'; it has heads 0 to {n_heads - 1}.")
        mask = torch.isin(torch.arange(n_heads), torch.tensor(list(heads), dtype=torch.long))
        return mask[:, None, None] if site.name == "pattern" else mask.repeat_interleave(shape.head_dim)


@dataclass(frozen=True, eq=False)
class Replace(SiteEdit):
    """Put ``value`` there: [width], [pos, width] or [batch, pos, width], or a pattern; columns as in the
    batch."""

    value: Float[Tensor, "*shape"]

    def new(self, x: Tensor, moment: Moment) -> tuple[Tensor, Bool[Tensor, "pos"] | None]:
        value, known = aligned(self.value, x, moment, str(self.site))
        return value.expand_as(x), known


@dataclass(frozen=True, eq=False)
class Add(SiteEdit):
    """Add ``scale`` times ``value``: [width], [pos, width] or [batch, pos, width]."""

    value: Float[Tensor, "*shape"]
    scale: float = 1.0

    def new(self, x: Tensor, moment: Moment) -> tuple[Tensor, Bool[Tensor, "pos"] | None]:
        value, known = aligned(self.value, x, moment, str(self.site))
        return x + self.scale * value, known


@dataclass(frozen=True, eq=False)
class Ablate(SiteEdit):
    """Put zero there, or ``mean`` [width], the value's average over some reference texts."""

    mean: Float[Tensor, "width"] | None = None

    def new(self, x: Tensor, moment: Moment) -> tuple[Tensor, Bool[Tensor, "pos"] | None]:
        if self.mean is None:
            return torch.zeros_like(x), None
        return aligned(self.mean, x, moment, str(self.site))[0].expand_as(x), None


@dataclass(frozen=True, eq=False)
class Scale(SiteEdit):
    """Multiply by ``factor``."""

    factor: float

    def new(self, x: Tensor, moment: Moment) -> tuple[Tensor, Bool[Tensor, "pos"] | None]:
        return x * self.factor, None


@dataclass(frozen=True, eq=False)
class ProjectOut(SiteEdit):
    """Remove the component in the span of ``directions``: [width], or [n, width], which need not be
    orthogonal.

    x - x Q Q^T with Q an orthonormal basis of the directions (Arditi et al. 2024, equation 4, for one
    direction).
    """

    directions: Float[Tensor, "*n width"]

    def new(self, x: Tensor, moment: Moment) -> tuple[Tensor, Bool[Tensor, "pos"] | None]:
        compute = torch.promote_types(x.dtype, torch.float32)
        directions = self.directions.to(x.device, compute).reshape(-1, self.directions.shape[-1])
        if directions.shape[-1] != x.shape[-1]:
            raise InputError(
                f"the directions at '{self.site}' have width {directions.shape[-1]} where {x.shape[-1]} belongs."
            )
        basis, triangle = torch.linalg.qr(directions.T)
        size = triangle.diagonal().abs()
        basis = basis[:, size > 1e-6 * directions.norm(dim=-1).max()]
        y = x.to(compute)
        return y - (y @ basis) @ basis.T, None


@dataclass(frozen=True, eq=False)
class Edit(SiteEdit):
    """Put ``function`` of the value there.

    The function gets [batch, pos, width] (patterns: [batch, head, query, key]) and returns the same shape.
    During a cached generation it gets the new positions only, so it should treat each position by itself.
    """

    function: Callable[[Tensor], Tensor]

    def new(self, x: Tensor, moment: Moment) -> tuple[Tensor, Bool[Tensor, "pos"] | None]:
        return self.function(x), None


@dataclass(frozen=True, eq=False)
class Leaf(SiteEdit):
    """Cut the graph there: the value goes on unchanged, but as a leaf that requires a gradient.

    Everything computed before it no longer receives any. For use with ``capture(..., grad=True)``.
    """

    def new(self, x: Tensor, moment: Moment) -> tuple[Tensor, Bool[Tensor, "pos"] | None]:
        return x.detach().requires_grad_(), None


Intervention = SiteEdit | FreezePatterns | FreezeNorms
"""Anything that can be passed as an intervention."""


def aligned(
    value: Float[Tensor, "*shape"], x: Tensor, moment: Moment, site: str
) -> tuple[Tensor, Bool[Tensor, "pos"] | None]:
    """The part of ``value`` that lies over ``x``, and which columns it covers (None: all).

    A value with a position axis has the batch's columns; columns generated since have none. A pattern that is
    shorter than ``x`` along its keys is continued with zeros: those keys came later. Raises InputError when
    it does not fit.
    """
    value, known = value.to(x.device, x.dtype), None
    if value.ndim > 1 and value.shape[-2] != 1:
        columns, n = moment.columns, value.shape[-2]
        if n != moment.prompt:
            raise InputError(f"the value for '{site}' has {n} positions where the batch has {moment.prompt}.")
        known = None if moment.stop <= n else columns < n
        value = value[..., columns.clamp(max=n - 1).to(x.device), :] if (moment.start, moment.stop) != (0, n) else value
        if x.ndim == 4 and value.shape[-1] < x.shape[-1]:
            value = torch.nn.functional.pad(value, (0, x.shape[-1] - value.shape[-1]))
    try:
        fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(f"the value for '{site}' has shape {tuple(value.shape)} where {tuple(x.shape)} belongs.")
    return value, known
