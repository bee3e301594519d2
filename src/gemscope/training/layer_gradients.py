"""Objective and gradients of a dictionary over several layers, written out so that decoders can be streamed.

The reconstruction of each target is decoded, compared and propagated back to its own tables before the next target
is touched: a table's gradient is complete, and handed over, while it is the only one in memory. What reaches the
latents is accumulated over the targets and goes through every encoder once (Ameisen et al. 2025, "Circuit Tracing",
appendix D, has the dense form; Gao et al. 2024 the sparse products).

    error     sum over targets m, mean over rows and nested prefixes, of ||recon_m - y_m||^2
    sparsity  weight (2 / L) mean over rows of (l0 - L)^2, l0 over all layers (Gemma Scope 2, eq. 5)
    frequency weight sum over latents of p (1 + p / scale)
    dead      weight mean over rows of the sum over dead latents of relu(threshold - pre_act)
    aux       weight sum over targets m, mean over rows, of ||y_m - recon_m - dead_recon_m||^2, recon_m a constant

The second and fourth are JumpReLU's, the last TopK's and BatchTopK's, whose latents are counted softly, by
``tanh``, in the third. Gradients to thresholds are the straight-through estimates of ``dictionaries.activations``.
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
    aux: float
    bandwidth: float
    soft: float
    """Slope at 0 of the ``tanh`` that counts a latent which has no threshold."""
    ste_to_input: bool = False
    prefixes: tuple[int, ...] = ()
    """Ascending numbers of first latents per layer, over all shards; the whole is added."""


@dataclass(frozen=True)
class Codes:
    """The entries that matter of one batch, over all layers."""

    support: Support
    pre_acts: Float[Tensor, " entries"]
    active: Bool[Tensor, " entries"]
    dead: Bool[Tensor, " latents"]
    threshold: Float[Tensor, " latents"] | None
    """None where thresholds are not learned (TopK, BatchTopK)."""
    has_aux: bool = False
    """Whether there are, without thresholds, entries that are not active: what AuxK takes of dead latents."""


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
    """The entries of one layer, by row, and by nested group and row: row ``group * batch + row`` of a taller matrix."""

    at: Int[Tensor, " entries"]
    """Which of all entries they are."""
    flat: Support
    tall_at: Int[Tensor, " entries"]
    """The same in the order of ``tall``."""
    tall: Support
    """What AuxK takes is a group of its own, the last."""


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

    def tables(self, source: int) -> list[Tensor]:
        """All decoders from ``source``."""
        targets = [source] if self.tied else range(source, self.n)
        return [self.weights[self.table(source, target)] for target in targets]

    def norms(self) -> list[Float[Tensor, " d_sae"]]:
        """Norm of what each latent writes, over all targets; layer by layer."""
        squares = [torch.stack([t.square().sum(1) for t in self.tables(layer)]).sum(0) for layer in range(self.n)]
        times = [self.n - layer if self.tied else 1 for layer in range(self.n)]
        return [(one * count).sqrt().clamp_min(1e-12) for one, count in zip(squares, times, strict=True)]

    def divide(self, norms: Sequence[Float[Tensor, " d_sae"]]) -> None:
        """Divide the rows of all decoders by the numbers of their latents, in place."""
        for layer, size in enumerate(norms):
            for table in self.tables(layer):
                table /= size[:, None]


def parts_of(codes: Codes, layers: Layers, prefixes: Sequence[int], mesh: Mesh) -> list[_Part]:
    """The entries, layer by layer."""
    support = codes.support
    owner = torch.div(support.latents, layers.d_sae, rounding_mode="floor")
    bounds = torch.tensor(prefixes, device=owner.device)
    found: list[_Part] = []
    for layer in range(layers.n):
        at = (owner == layer).nonzero()[:, 0]
        latents, rows = support.latents[at] - layer * layers.d_sae, support.rows[at]
        flat = Support(rows, latents, support.batch, layers.d_sae)
        if not prefixes and not codes.has_aux:
            found.append(_Part(at, flat, at, flat))
            continue
        group = torch.bucketize(latents * mesh.latents + mesh.shard, bounds, right=True)
        if codes.has_aux:
            group = torch.where(codes.active[at], group, len(prefixes) + 1)
        order = torch.argsort(group, stable=True)
        tall_rows = (group * support.batch + rows)[order]
        tall = Support(tall_rows, latents[order], (len(prefixes) + 1 + codes.has_aux) * support.batch, layers.d_sae)
        found.append(_Part(at, flat, at[order], tall))
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
    acts = codes.pre_acts if codes.threshold is None else codes.pre_acts * codes.active
    grad_acts = torch.zeros_like(acts)
    rows, groups = len(x[0]) * mesh.data, len(terms.prefixes) + 1
    tables: dict[str, Tensor] = {}
    loss = error = aux = acts.new_zeros(())
    for m in range(layers.n):
        residuals = _residuals(layers, x[m], y[m], m, parts, acts, groups, mesh)
        squares = residuals.square().sum((1, 2)) / rows
        loss, error = loss + squares[:groups].mean(), error + squares[groups - 1]
        aux = aux + terms.aux * squares[groups:].sum()
        grad = residuals[:groups] * (2 / (rows * groups))
        whole = grad.sum(0)
        apply(f"b_dec.{m}", whole.sum(0))
        if f"W_skip.{m}" in layers.weights:
            apply(f"W_skip.{m}", x[m].T @ whole)
        grad = grad.flip(0).cumsum(0).flip(0) if groups > 1 else grad
        if codes.has_aux:
            grad = torch.cat([grad, residuals[groups:] * (2 * terms.aux / rows)])
        tall = grad.flatten(0, 1)
        for source in range(m + 1):
            name, part = layers.table(source, m), parts[source]
            table = layers.on(layers.weights[name])
            grad_acts[part.tall_at] += dots(part.tall, tall, table)
            gradient = times_rows(part.tall, acts[part.tall_at], tall)
            if layers.tied:
                tables[name] = gradient if name not in tables else tables[name].add_(gradient)
            else:
                apply(name, gradient)
    for name, gradient in tables.items():
        apply(name, gradient)
    named = {"error": mesh.sum_over_data(loss)}
    if codes.has_aux:
        named["aux"] = mesh.sum_over_data(aux)
    l0, more = _through_encoders(layers, x, codes, parts, grad_acts, terms, apply, mesh)
    named |= more
    return Found(torch.stack(list(named.values())).sum(), mesh.sum_over_data(error), l0, named)


def _residuals(
    layers: Layers,
    x: Tensor,
    y: Tensor,
    m: int,
    parts: Sequence[_Part],
    acts: Tensor,
    groups: int,
    mesh: Mesh,
) -> Float[Tensor, "groups batch d_out"]:
    """recon - y of every nested dictionary; with AuxK one more, what its latents leave of the last."""
    recon = y.new_zeros(parts[0].tall.batch, y.shape[1])
    for source in range(m + 1):
        table = layers.on(layers.weights[layers.table(source, m)])
        recon += times_latents(parts[source].tall, acts[parts[source].tall_at], table)
    recon = mesh.sum_over_latents(recon).view(-1, *y.shape)
    base = layers.weights[f"b_dec.{m}"] - y
    if (skip := layers.weights.get(f"W_skip.{m}")) is not None:
        base = base + x @ skip
    nested = recon[:groups].cumsum(0) + base
    return nested if len(nested) == len(recon) else torch.cat([nested, recon[groups:] + nested[-1]])


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
    drawn = grad_acts.new_zeros(())
    for layer, part in enumerate(parts):
        found = {
            f"W_enc.{layer}": times_rows(part.flat, grad_pre[part.at], x[layer]),
            f"b_enc.{layer}": _added(part, grad_pre, layers.d_sae),
        }
        if grad_threshold is not None:
            found[f"threshold.{layer}"] = _added(part, grad_threshold, layers.d_sae)
        if terms.dead and codes.threshold is not None:
            drawn = drawn + _draw(layers, layer, x[layer], codes, terms.dead / rows, found, mesh)
        for name, gradient in found.items():
            apply(name, gradient)
    if terms.dead and codes.threshold is not None:
        named["dead"] = mesh.sum_over_latents(drawn)
    return mean_l0, named


def _sparsity(
    codes: Codes, grad_acts: Tensor, terms: Terms, rows: int, mesh: Mesh
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
    """The mean L0, the gradients at the entries' pre-activations and thresholds, and the terms."""
    support, counted = codes.support, codes.active.to(grad_acts.dtype)
    l0 = mesh.sum_over_latents(support.per_row(counted))
    mean_l0 = mesh.sum_over_data(l0.sum()) / rows
    named: dict[str, Tensor] = {}
    if codes.threshold is None:
        if terms.frequency:
            soft = (terms.soft * codes.pre_acts).tanh() * counted
            named["frequency"], slope = _frequency(support, soft, terms, rows, mesh)
            grad_acts = grad_acts + slope * terms.soft * (1 - soft.square()) * counted
        return mean_l0, grad_acts, None, named
    off = l0 - terms.target_l0
    named["sparsity"] = mesh.sum_over_data(terms.sparsity * (2 / terms.target_l0) * off.square().sum() / rows)
    grad_step = (terms.sparsity * (4 / terms.target_l0) / rows * off)[support.rows]
    if terms.frequency:
        named["frequency"], slope = _frequency(support, counted, terms, rows, mesh)
        grad_step = grad_step + slope
    threshold, grad_pre = codes.threshold[support.latents], grad_acts * codes.active
    window = in_window(codes.pre_acts, threshold, terms.bandwidth) / terms.bandwidth
    through = window * (threshold * grad_acts + grad_step)
    return mean_l0, grad_pre + through if terms.ste_to_input else grad_pre, -through, named


def _frequency(
    support: Support, counted: Tensor, terms: Terms, rows: int, mesh: Mesh
) -> tuple[Tensor, Float[Tensor, " entries"]]:
    """The penalty on how often latents fire, and its gradient at each entry's count."""
    share = mesh.sum_over_data(support.latents.bincount(counted, minlength=support.d_sae) / rows)
    penalty = terms.frequency * (share * (1 + share / terms.frequency_scale)).sum()
    slope = terms.frequency * (1 + 2 * share / terms.frequency_scale) / rows
    return mesh.sum_over_latents(penalty), slope[support.latents]


def _draw(
    layers: Layers, layer: int, x: Tensor, codes: Codes, weight: float, found: Mapping[str, Tensor], mesh: Mesh
) -> Tensor | float:
    """The dead latents' term, over all rows at once, for none is active on any; adds its gradients to ``found``."""
    assert codes.threshold is not None
    which = codes.dead.view(layers.n, -1)[layer].nonzero()[:, 0]
    if not len(which):
        return 0.0
    weight *= len(x)
    mean = x.mean(0)
    pre = layers.weights[f"W_enc.{layer}"][which] @ mean + layers.weights[f"b_enc.{layer}"][which]
    found[f"W_enc.{layer}"][which] -= weight * mean
    found[f"b_enc.{layer}"][which] -= weight
    found[f"threshold.{layer}"][which] += weight
    return mesh.sum_over_data(weight * (codes.threshold.view(layers.n, -1)[layer][which] - pre).sum())


def _added(part: _Part, values: Tensor, d_sae: int) -> Float[Tensor, " d_sae"]:
    return values.new_zeros(d_sae).index_add_(0, part.flat.latents, values[part.at])
