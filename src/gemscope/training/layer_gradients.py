"""Objective and gradients of a dictionary over several layers, written out so that decoders can be streamed.

The reconstruction of each target is decoded, compared and propagated back to its own tables before the next target
is touched: a table's gradient is complete, and handed over, while it is the only one in memory. What reaches the
latents is accumulated over the targets and goes through every encoder once (Ameisen et al. 2025, "Circuit Tracing",
appendix D, has the dense form; Gao et al. 2024 the sparse products).

    error     sum over targets m, mean over rows and nested prefixes, of ||recon_m - y_m||^2
    sparsity  weight (2 / L) mean over rows of (l0 - L)^2, l0 over all layers (Gemma Scope 2, eq. 5)
    frequency weight sum over latents of p (1 + p / scale)
    dead      weight mean over rows of the sum over dead latents of relu(threshold - pre_act)

Gradients to thresholds are the straight-through estimates of ``dictionaries.activations``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.dictionaries.activations import in_window
from gemscope.dictionaries.sparse import Support, dots, times_latents, times_rows
from gemscope.training.sharding import Mesh

Apply = Callable[[str, Tensor], None]
"""Takes the complete gradient of one weight; it may change the weight at once."""


@dataclass(frozen=True)
class Terms:
    """Weights and constants of the objective at one step."""

    sparsity: float
    target_l0: float
    frequency: float
    frequency_scale: float
    dead: float
    bandwidth: float
    ste_to_input: bool = False
    prefixes: tuple[int, ...] = ()
    """Ascending numbers of first latents per layer, over all shards; the whole is added."""


@dataclass(frozen=True)
class Codes:
    """The entries that matter of one batch, over all layers."""

    support: Support
    pre_acts: Float[Tensor, " entries"]
    active: Bool[Tensor, " entries"]
    threshold: Float[Tensor, " entries"] | None
    """At each entry; None where thresholds are not learned (TopK, BatchTopK)."""
    dead: Bool[Tensor, " latents"]
    level: Float[Tensor, " latents"]
    """What a dead latent's pre-activation is drawn to: its threshold, or the smallest active value."""


@dataclass(frozen=True)
class Found:
    """What a step saw, over all processes."""

    loss: Float[Tensor, ""]
    error: Float[Tensor, ""]
    """Of the whole dictionary, summed over targets."""
    l0: Float[Tensor, ""]
    terms: Mapping[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class _Part:
    """The entries of one layer, by nested group and row: row ``group * batch + row`` of a taller matrix."""

    at: Int[Tensor, " entries"]
    """Which of all entries they are."""
    tall: Support
    flat: Support
    """The same entries by row alone."""


@dataclass(frozen=True)
class Layers:
    """Weights by name, and how they hang together; see ``multilayer`` for the names."""

    weights: Mapping[str, Tensor]
    n: int
    d_sae: int
    """Latents per layer in this process."""
    tied: bool
    on: Callable[[Tensor], Tensor] = lambda t: t
    """Brings an offloaded table to the device."""

    def table(self, source: int, target: int) -> str:
        """Name of the decoder from ``source`` to ``target``."""
        return f"W_dec.{source}" if self.tied else f"W_dec.{source}.{target}"


def parts_of(codes: Codes, layers: Layers, prefixes: Sequence[int], mesh: Mesh) -> list[_Part]:
    """The entries, layer by layer."""
    support = codes.support
    owner = torch.div(support.latents, layers.d_sae, rounding_mode="floor")
    found: list[_Part] = []
    for layer in range(layers.n):
        at = (owner == layer).nonzero()[:, 0]
        latents, rows = support.latents[at] - layer * layers.d_sae, support.rows[at]
        if prefixes:
            bounds = torch.tensor(prefixes, device=latents.device)
            group = torch.bucketize(latents * mesh.latents + mesh.shard, bounds, right=True)
            order = torch.argsort(group, stable=True)
            at, latents, rows, group = at[order], latents[order], rows[order], group[order]
            tall = Support(group * support.batch + rows, latents, (len(prefixes) + 1) * support.batch, layers.d_sae)
        else:
            tall = Support(rows, latents, support.batch, layers.d_sae)
        found.append(_Part(at, tall, Support(rows, latents, support.batch, layers.d_sae)))
    return found


def gradients(
    layers: Layers,
    x: Sequence[Float[Tensor, "batch d_in"]],
    y: Sequence[Float[Tensor, "batch d_out"]],
    codes: Codes,
    terms: Terms,
    apply: Apply,
    mesh: Mesh,
) -> Found:
    """The objective on one batch; every weight's gradient goes to ``apply``, decoders first.

    ``x`` and ``y`` are this process's rows, scaled and centred as the encoder sees them.
    """
    parts = parts_of(codes, layers, terms.prefixes, mesh)
    acts = codes.pre_acts * codes.active
    grad_acts = torch.zeros_like(acts)
    rows = len(x[0]) * mesh.data
    tables: dict[str, Tensor] = {}
    loss = error = acts.new_zeros(())
    for m in range(layers.n):
        residuals = _residuals(layers, x[m], y[m], m, parts, acts, terms, mesh)
        groups = len(residuals)
        squares = residuals.square().sum((1, 2)) / rows
        loss, error = loss + squares.mean(), error + squares[-1]
        grad = residuals * (2 / (rows * groups))
        whole = grad.sum(0)
        apply(f"b_dec.{m}", whole.sum(0))
        if f"W_skip.{m}" in layers.weights:
            apply(f"W_skip.{m}", x[m].T @ whole)
        tall = grad.flip(0).cumsum(0).flip(0).flatten(0, 1).contiguous() if groups > 1 else grad[0]
        for source in range(m + 1):
            name, part = layers.table(source, m), parts[source]
            table = layers.on(layers.weights[name])
            grad_acts[part.at] += dots(part.tall, tall, table)
            gradient = times_rows(part.tall, acts[part.at], tall)
            if layers.tied:
                tables[name] = gradient if name not in tables else tables[name].add_(gradient)
            else:
                apply(name, gradient)
    for name, gradient in tables.items():
        apply(name, gradient)
    loss, error = mesh.sum_over_data(loss), mesh.sum_over_data(error)
    l0, more = _through_encoders(layers, x, codes, parts, grad_acts, terms, apply, mesh)
    named = {"error": loss, **more}
    return Found(torch.stack(list(named.values())).sum(), error, l0, named)


def _residuals(
    layers: Layers,
    x: Tensor,
    y: Tensor,
    m: int,
    parts: Sequence[_Part],
    acts: Tensor,
    terms: Terms,
    mesh: Mesh,
) -> Float[Tensor, "groups batch d_out"]:
    """recon - y of every nested dictionary."""
    groups = len(terms.prefixes) + 1
    recon = y.new_zeros(groups * len(y), y.shape[1])
    for source in range(m + 1):
        table = layers.on(layers.weights[layers.table(source, m)])
        recon += times_latents(parts[source].tall, acts[parts[source].at], table)
    recon = mesh.sum_over_latents(recon).view(groups, *y.shape).cumsum(0)
    base = layers.weights[f"b_dec.{m}"] - y
    if (skip := layers.weights.get(f"W_skip.{m}")) is not None:
        base = base + x @ skip
    return recon + base


def _through_encoders(
    layers: Layers,
    x: Sequence[Tensor],
    codes: Codes,
    parts: Sequence[_Part],
    grad_acts: Tensor,
    terms: Terms,
    apply: Apply,
    mesh: Mesh,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sparsity terms, and everything that reaches encoders and thresholds; the mean L0 and the terms."""
    rows = len(x[0]) * mesh.data
    mean_l0, grad_pre, grad_threshold, named = _sparsity(codes, grad_acts, terms, rows, mesh)
    if terms.dead:
        drawn = codes.dead[codes.support.latents] & (codes.pre_acts > codes.level[codes.support.latents])
        gap = (codes.pre_acts - codes.level[codes.support.latents]) * drawn
        named["dead"] = mesh.sum_over_data(terms.dead * gap.sum() / rows)
        grad_pre = grad_pre + drawn * (terms.dead / rows)
        if grad_threshold is not None:
            grad_threshold = grad_threshold - drawn * (terms.dead / rows)
    for layer, part in enumerate(parts):
        found = {
            f"W_enc.{layer}": times_rows(part.flat, grad_pre[part.at], x[layer]),
            f"b_enc.{layer}": _added(part, grad_pre, layers.d_sae),
        }
        if grad_threshold is not None:
            found[f"threshold.{layer}"] = _added(part, grad_threshold, layers.d_sae)
        if terms.dead:
            named["dead"] = named["dead"] + _below(layers, layer, x[layer], codes, terms.dead / rows, found, mesh)
        for name, gradient in found.items():
            apply(name, gradient)
    if "dead" in named:
        named["dead"] = mesh.sum_over_latents(named["dead"])
    return mean_l0, named


def _sparsity(
    codes: Codes, grad_acts: Tensor, terms: Terms, rows: int, mesh: Mesh
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
    """The mean L0, the gradients at the entries' pre-activations and thresholds, and the terms."""
    support, counted = codes.support, codes.active.to(grad_acts.dtype)
    l0 = mesh.sum_over_latents(support.per_row(counted))
    mean_l0 = mesh.sum_over_data(l0.sum() / rows)
    named: dict[str, Tensor] = {}
    grad_pre = grad_acts * codes.active
    if codes.threshold is None:
        return mean_l0, grad_pre, None, named
    off = l0 - terms.target_l0
    named["sparsity"] = mesh.sum_over_data(terms.sparsity * (2 / terms.target_l0) * off.square().sum() / rows)
    grad_step = (terms.sparsity * (4 / terms.target_l0) / rows * off)[support.rows]
    if terms.frequency:
        share = mesh.sum_over_data(support.latents.bincount(counted, minlength=support.d_sae) / rows)
        penalty = terms.frequency * (share * (1 + share / terms.frequency_scale)).sum()
        named["frequency"] = mesh.sum_over_latents(penalty)
        slope = terms.frequency * (1 + 2 * share / terms.frequency_scale) / rows
        grad_step = grad_step + slope[support.latents]
    window = in_window(codes.pre_acts, codes.threshold, terms.bandwidth) / terms.bandwidth
    through = window * (codes.threshold * grad_acts + grad_step)
    return mean_l0, grad_pre + through if terms.ste_to_input else grad_pre, -through, named


def _below(
    layers: Layers, layer: int, x: Tensor, codes: Codes, weight: float, found: Mapping[str, Tensor], mesh: Mesh
) -> Tensor | float:
    """The dead latents' term where it is linear, over all rows at once; adds its gradients to ``found``."""
    which = codes.dead.view(layers.n, -1)[layer].nonzero()[:, 0]
    if not len(which):
        return 0.0
    weight *= len(x)
    mean = x.mean(0)
    pre = layers.weights[f"W_enc.{layer}"][which] @ mean + layers.weights[f"b_enc.{layer}"][which]
    found[f"W_enc.{layer}"][which] -= weight * mean
    found[f"b_enc.{layer}"][which] -= weight
    if (threshold := found.get(f"threshold.{layer}")) is not None:
        threshold[which] += weight
    return mesh.sum_over_data(weight * (codes.level.view(layers.n, -1)[layer][which] - pre).sum())


def _added(part: _Part, values: Tensor, d_sae: int) -> Float[Tensor, " d_sae"]:
    return values.new_zeros(d_sae).index_add_(0, part.flat.latents, values[part.at])
