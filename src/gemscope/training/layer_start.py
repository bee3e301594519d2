"""First weights over several layers: fresh, led by the data, or taken from a finished dictionary.

The names of the weights are those of ``multilayer``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.multilayer import MultiLayer
from gemscope.dictionaries.single import SingleLayer
from gemscope.training.data import Moments
from gemscope.training.layer_config import MultiLayerConfig
from gemscope.training.layer_gradients import Layers
from gemscope.training.sharding import Mesh
from gemscope.training.start import unit_rows

_LATENTS = 1024
"""Latents whose first activations are held at a time."""
_ALIKE = 1e-3
"""Relative distance up to which decoders to different targets are one."""


@dataclass(frozen=True)
class Place:
    """Where the weights are going to be."""

    config: MultiLayerConfig
    mesh: Mesh
    device: torch.device

    def decoder(self, table: Tensor) -> Tensor:
        """This process's rows of a decoder, where decoders are kept."""
        table = self.mesh.own(table)
        return table.cpu() if self.config.offload else table.to(self.device)


def counts_latents(name: str) -> bool:
    """Whether the first axis of a weight is that of the latents, which are spread over processes."""
    return name.startswith(("W_enc", "b_enc", "threshold", "W_dec"))


def read_moments(found: Mapping[Site, Moments], config: MultiLayerConfig) -> list[Moments]:
    """Of the sites that are read: what rows are centred by and scaled with.

    A TopK over several layers has one common scale. Where a bias is frozen nothing is centred, for the biases of the
    finished dictionary would move with the weights that read the centre.
    """
    read = [found[site] for site in config.reads]
    if config.activation == "topk":
        scale = (sum(m.scale**2 for m in read) / len(read)) ** 0.5
        read = [Moments(m.mean, scale, m.spread * m.scale**2 / scale**2) for m in read]
    if "b_enc" in config.frozen or ("b_dec" in config.frozen and config.has_skip):
        read = [Moments(torch.zeros_like(m.mean), m.scale, m.spread) for m in read]
    return read


def fresh(place: Place, read: Sequence[Moments], write: Sequence[Moments]) -> dict[str, Tensor]:
    """Encoders of random unit rows, and decoders that are the same or, in another space, other such rows."""
    config, mesh, device, n = place.config, place.mesh, place.device, len(read)
    d_in, d_out = len(read[0].mean), len(write[0].mean)
    weights: dict[str, Tensor] = {}
    for layer in range(n):
        rows = unit_rows(config.d_sae, d_in, config.seed * 1000 + layer)
        weights[f"W_enc.{layer}"] = mesh.own(rows).to(device)
        weights[f"b_enc.{layer}"] = torch.zeros(config.d_sae // mesh.latents, device=device)
        for target in [layer] if config.tied else range(layer, n):
            seed = config.seed * 1000 + 100 * (layer + 1) + target + 1
            table = rows if config.reconstructs else unit_rows(config.d_sae, d_out, seed)
            name = f"W_dec.{layer}" if config.tied else f"W_dec.{layer}.{target}"
            weights[name] = place.decoder(table / (n - layer) ** 0.5)
        weights[f"b_dec.{layer}"] = write[layer].mean.to(device) / write[layer].scale
        if config.has_skip:
            weights[f"W_skip.{layer}"] = torch.zeros(d_in, d_out, device=device)
    return weights


@torch.no_grad()
def lead(layers: Layers, x: Sequence[Tensor], y: Sequence[Tensor], share: float) -> None:
    """Let every latent write the sum of y - E[y] times its activations, were it active on ``share`` of the rows.

    A latent whose sum is 0 keeps its random row.
    """
    count = max(1, round(len(x[0]) * share))
    y = [rows - rows.mean(0) for rows in y]
    for layer in range(layers.n):
        encoder = layers.weights[f"W_enc.{layer}"]
        for first in range(0, layers.d_sae, _LATENTS):
            part = slice(first, first + _LATENTS)
            pre = x[layer] @ encoder[part].T
            acts = torch.where(pre >= pre.topk(count, dim=0)[0][-1], pre, 0).clamp_(min=0)
            found = [acts.T @ y[target] for target in range(layer, layers.n)]
            if layers.tied:
                found = [torch.stack(found).sum(0)]
            some = torch.stack([rows.norm(dim=1) for rows in found]).amin(0)[:, None] > 0
            for table, rows in zip(layers.tables(layer), found, strict=True):
                table[part] = torch.where(some, rows, table[part].to(rows)).to(table.device)
    layers.divide(layers.norms())


def taken(place: Place, start: Dictionary, read: Sequence[Moments], write: Sequence[Moments]) -> dict[str, Tensor]:
    """The weights of a dictionary for raw activations, scaled and centred."""
    whole = _parts(start, place.config, [m.scale for m in read], [m.scale for m in write])
    weights: dict[str, Tensor] = {}
    for name, tensor in whole.items():
        tensor = tensor.to(place.device, torch.float32)
        if name.startswith("W_dec"):
            weights[name] = place.decoder(tensor).clone()
        else:
            weights[name] = (place.mesh.own(tensor) if counts_latents(name) else tensor).clone()
    for layer, m in enumerate(read):
        centre = m.mean.to(place.device) / m.scale
        weights[f"b_enc.{layer}"] += weights[f"W_enc.{layer}"] @ centre
        if (skip := weights.get(f"W_skip.{layer}")) is not None:
            weights[f"b_dec.{layer}"] += centre @ skip
    return weights


@torch.no_grad()
def normalise(layers: Layers) -> None:
    """Make what each latent writes of norm 1 by making it as much more active."""
    norms = layers.norms()
    layers.divide(norms)
    for layer, size in enumerate(norms):
        for name in ("W_enc", "b_enc", "threshold"):
            if (tensor := layers.weights.get(f"{name}.{layer}")) is not None:
                tensor *= size.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1))


def _parts(
    start: Dictionary, config: MultiLayerConfig, scale_in: Sequence[float], scale_out: Sequence[float]
) -> dict[str, Tensor]:
    """The weights by name of a dictionary for raw activations, for x_l / scale_in[l] -> y_m / scale_out[m].

    Raises InputError when the dictionary is not what ``config`` asks for.
    """
    n = len(scale_in)
    if start.kind != config.kind or start.n_positions != n or start.d_sae != config.d_sae:
        raise InputError(
            f"the dictionary to start from is a {start.kind} of {start.n_positions} x {start.d_sae} latents, but a"
            f" {config.kind} of {n} x {config.d_sae} was asked for; ask for the same kind and size."
        )
    if isinstance(start, MultiLayer):
        folded = start.fold_scale([1 / s for s in scale_in], [1 / s for s in scale_out])
        found = {f"{name}.{i}": t for name in ("W_enc", "b_enc", "b_dec") for i, t in enumerate(getattr(folded, name))}
        if config.tied:
            found |= {f"W_dec.{i}": _one(tables) for i, tables in enumerate(folded.W_dec)}
        else:
            found |= {f"W_dec.{i}.{i + j}": t for i, tables in enumerate(folded.W_dec) for j, t in enumerate(tables)}
        for name in ("threshold", "W_skip"):
            found |= {f"{name}.{i}": t for i, t in enumerate(getattr(folded, name, None) or [])}
    else:
        assert isinstance(start, SingleLayer)
        one = start.fold_scale(1 / scale_in[0], 1 / scale_out[0])
        found = {f"{name}.0": t for name, t in one.named_parameters() if name != "W_dec"} | {"W_dec.0.0": one.W_dec}
    found = {name: t.detach().T.contiguous() if name.startswith("W_enc") else t.detach() for name, t in found.items()}
    if config.activation != "jumprelu":
        found = {name: t for name, t in found.items() if not name.startswith("threshold")}
    return found


def _one(tables: Float[Tensor, "targets d_sae d_out"]) -> Float[Tensor, "d_sae d_out"]:
    """The decoder that several targets share, up to the scales of their activations."""
    tables = tables.float()
    mean = tables.mean(0)
    for table in tables:
        if (table / table.norm() - mean / mean.norm()).norm() > _ALIKE:
            raise InputError("the dictionary to start from has a decoder for every target; go on without 'tied'.")
    return mean
