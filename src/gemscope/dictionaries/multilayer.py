"""Several layers at once: weakly causal crosscoders and cross-layer transcoders.

One encoder per position l = 0 ... n-1, and for each a decoder to every position m >= l; nothing below is stored:

    acts_l  = activation(x_l W_enc[l] + b_enc[l])
    recon_m = b_dec[m] + sum over l <= m of acts_l W_dec[l][m - l]   (+ x_m W_skip[m])

(McDougall et al. 2025, "Gemma Scope 2"; Ameisen et al. 2025, "Circuit Tracing", section 2; Lindsey et al. 2024,
"Sparse Crosscoders".)
"""

from collections.abc import Sequence
from typing import ClassVar, TypeVar

import torch
from torch import nn

from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.dictionaries.activation import JUMPRELU, Activation
from gemscope.dictionaries.base import (
    Dictionary,
    Latents,
    check_gain,
    check_scale,
    check_tensors,
    check_threshold,
    decode_entries,
    prefix_sizes,
    product,
)
from gemscope.dictionaries.sparse import Support

Matrices = Sequence[Float[Tensor, "_ _"]]
Vectors = Sequence[Float[Tensor, " _"]]

_Multi = TypeVar("_Multi", bound="MultiLayer")


class MultiLayer(Dictionary):
    """What crosscoders and CLTs share; ``x`` is [*batch, n, d_in], the reconstruction [*batch, n, d_out]."""

    threshold: nn.ParameterList | None
    W_skip: nn.ParameterList | None

    def __init__(
        self,
        W_enc: Matrices,
        b_enc: Vectors,
        W_dec: Sequence[Float[Tensor, "_ _ _"]],
        b_dec: Vectors,
        threshold: Vectors | None = None,
        W_skip: Matrices | None = None,
        *,
        activation: Activation = JUMPRELU,
        prefixes: Sequence[int] = (),
    ) -> None:
        """Take the tensors as they are: ``W_dec[l]`` is [n - l, d_sae, d_out], its row m - l the table to position m.

        Raises InputError when numbers, shapes or dtypes do not belong together.
        """
        super().__init__(activation, prefixes)
        lists = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        lists |= {name: given for name, given in (("threshold", threshold), ("W_skip", W_skip)) if given is not None}
        for name, given in lists.items():
            if len(given) != len(W_enc) or not given:
                raise InputError(f"{name} has {len(given)} tensors, but W_enc {len(W_enc)}; give one per position.")
        check_threshold(activation, threshold is not None)
        (d_in, d_sae), d_out, n = W_enc[0].shape, W_dec[0].shape[2], len(W_enc)
        shapes = {
            "W_enc": (d_in, d_sae),
            "b_enc": (d_sae,),
            "b_dec": (d_out,),
            "threshold": (d_sae,),
            "W_skip": (d_in, d_out),
        }
        for name, given in lists.items():
            expected = [(n - i, d_sae, d_out) if name == "W_dec" else shapes[name] for i in range(n)]
            tensors = {f"{name}[{i}]": (t, expected[i]) for i, t in enumerate(given)}
            check_tensors(tensors, W_enc[0].dtype, f"W_enc[0] {(d_in, d_sae)} with {n} positions")
        self.W_enc, self.b_enc = _parameters(W_enc), _parameters(b_enc)
        self.W_dec, self.b_dec = _parameters(W_dec), _parameters(b_dec)
        self.threshold = None if threshold is None else _parameters(threshold)
        self.W_skip = None if W_skip is None else _parameters(W_skip)

    @property
    def n_positions(self) -> int:
        """Number of positions: layers that are read, and written."""
        return len(self.W_enc)

    @property
    def d_in(self) -> int:
        """Width of the vectors that are read."""
        return self.W_enc[0].shape[0]

    @property
    def d_out(self) -> int:
        """Width of the vectors that are written."""
        return self.W_dec[0].shape[2]

    @property
    def d_sae(self) -> int:
        """Number of latents per position."""
        return self.W_enc[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weights."""
        return self.W_enc[0].dtype

    def pre_acts(self, x: Float[Tensor, "*batch n d_in"]) -> Float[Tensor, "*batch n d_sae"]:
        """x_l W_enc[l] + b_enc[l] at every position l."""
        return self._dense(self._rows(x)).view(*x.shape[:-1], self.d_sae)

    def encode(
        self, x: Float[Tensor, "*batch n d_in"], latents: Latents | None = None
    ) -> Float[Tensor, "*batch n d_sae"] | Float[Tensor, "*batch chosen"]:
        """Activations of all latents, or [*batch, chosen] of those given by their index over all positions,
        ``position * d_sae + latent``.
        """
        rows = self._rows(x)
        if latents is None:
            return self._activate(self._dense(rows)).view(*x.shape[:-1], self.d_sae)
        acts = self._chosen(rows, self._indices(latents, self.n_latents))
        return acts.view(*x.shape[:-2], acts.shape[1])

    def encode_sparse(self, x: Float[Tensor, "batch n d_in"]) -> tuple[Support, Float[Tensor, " active"]]:
        """The active latents only, row by row, by their index over all positions, and their activations."""
        return self._select(self._rows(x))

    def decode(self, acts: Float[Tensor, "*batch n d_sae"]) -> Float[Tensor, "*batch n d_out"]:
        """What the latents write, and b_dec; what ``x`` itself adds (a skip connection) is not part of it."""
        acts = acts.to(self.compute_dtype)
        recon: list[Tensor] = []
        for m in range(self.n_positions):
            tables = [self.W_dec[at][m - at] for at in range(m + 1)]
            parts = [product(acts[..., at, :], table) for at, table in enumerate(tables)]
            recon.append(torch.stack(parts).sum(0) + self.b_dec[m].to(self.compute_dtype))
        return torch.stack(recon, dim=-2)

    def decode_sparse(self, support: Support, values: Float[Tensor, " active"]) -> Float[Tensor, "batch n d_out"]:
        """The same from ``encode_sparse``; reads only the decoder rows of the latents that are there."""
        return self._decode_rows(support, values) + torch.stack(list(self.b_dec)).to(self.compute_dtype)

    def forward(self, x: Float[Tensor, "*batch n d_in"]) -> Float[Tensor, "*batch n d_out"]:
        """The reconstruction at every position."""
        rows = self._rows(x)
        recon = self._decode_rows(*self._select(rows)) + self._without_latents(rows)
        return recon.view(*x.shape[:-1], self.d_out)

    def error(
        self, x: Float[Tensor, "*batch n d_in"], target: Float[Tensor, "*batch n d_out"]
    ) -> Float[Tensor, "*batch n d_out"]:
        """target - recon: what the dictionary leaves unexplained."""
        return target.to(self.compute_dtype) - self(x)

    def decoder_rows(self, layer: int, latents: Latents, out: int) -> Float[Tensor, "chosen d_out"]:
        """What latents of position ``layer`` write to position ``out`` per unit of activation.

        Raises InputError when ``out`` is below ``layer``: later layers write to no earlier one.
        """
        self._check_position(layer)
        self._check_position(out)
        if out < layer:
            raise InputError(f"latents of position {layer} write to positions {layer} and later, not to {out}.")
        table = self.W_dec[layer][out - layer]
        return table.index_select(0, self._indices(latents, self.d_sae)).to(self.compute_dtype)

    def encoder_columns(self, layer: int, latents: Latents) -> Float[Tensor, "chosen d_in"]:
        """What latents of position ``layer`` read: columns of W_enc, one per row of the result."""
        self._check_position(layer)
        return self._columns(self._indices(latents, self.d_sae) + layer * self.d_sae)

    def prefix(self: _Multi, n: int) -> _Multi:
        """The dictionary of the first ``n`` latents of every position; a TopK keeps its k, at most all of them."""
        kept = prefix_sizes(n, self.d_sae, self.prefixes)
        activation = self.activation
        if activation.top is not None:
            activation = Activation("topk", min(activation.top, n * self.n_positions))
        tensors = {
            "W_enc": [t[:, :n] for t in self.W_enc],
            "b_enc": [t[:n] for t in self.b_enc],
            "W_dec": [t[:, :n] for t in self.W_dec],
        }
        if self.threshold is not None:
            tensors["threshold"] = [t[:n] for t in self.threshold]
        return self._with(tensors, activation, kept)

    def fold_scale(
        self: _Multi, scale_in: float | Sequence[float], scale_out: float | Sequence[float] | None = None
    ) -> _Multi:
        """From a dictionary for x_l / scale_in[l] -> y_m / scale_out[m] to the same one for x -> y; one number
        stands for all positions, ``scale_out`` is ``scale_in`` unless given, and the inverses go back.

        Raises InputError unless the scales are positive, one per position, and for a TopK with several input
        scales: it compares activations between positions, so the same latents would not stay active.
        """
        into = self._scales(scale_in)
        out = into if scale_out is None else self._scales(scale_out)
        if self.activation.top is not None and len(set(into)) > 1:
            raise InputError("a TopK over all positions cannot absorb a scale per position; train it with one scale.")
        tensors = {
            "b_enc": [t * s for t, s in zip(self.b_enc, into, strict=True)],
            "b_dec": [t * s for t, s in zip(self.b_dec, out, strict=True)],
        }
        if self.threshold is not None:
            tensors["threshold"] = [t * s for t, s in zip(self.threshold, into, strict=True)]
        if len({*into, *out}) > 1:
            ratios = [torch.tensor([o / s for o in out[at:]], dtype=torch.float64) for at, s in enumerate(into)]
            tensors["W_dec"] = [t * r.to(t)[:, None, None] for t, r in zip(self.W_dec, ratios, strict=True)]
            if self.W_skip is not None:
                tensors["W_skip"] = [t * (o / s) for t, s, o in zip(self.W_skip, into, out, strict=True)]
        return self._with(tensors)

    def fold_pre_bias(self: _Multi, bias: Vectors | None = None) -> _Multi:
        """From pre-activations (x_l - bias[l]) W_enc[l] + b_enc[l], as in training, to x_l W_enc[l] + b_enc'[l].

        ``bias`` is b_dec for a crosscoder; a CLT's b_dec lives in its output space, so it has to be given there.
        """
        return self._with({"b_enc": [b - r for b, r in zip(self.b_enc, self._read(bias), strict=True)]})

    def unfold_pre_bias(self: _Multi, bias: Vectors | None = None) -> _Multi:
        """The way back from ``fold_pre_bias``."""
        return self._with({"b_enc": [b + r for b, r in zip(self.b_enc, self._read(bias), strict=True)]})

    def fold_input_gain(self: _Multi, gain: Vectors) -> _Multi:
        """From a dictionary that reads norms' outputs without their gains to one that reads them with (one gain per
        position); the inverse gains go back. Raises InputError when a gain has a zero.
        """
        inverse = [1 / check_gain(g).to(self.W_enc[0])[:, None] for g in gain]
        tensors = {"W_enc": [t * i for t, i in zip(self.W_enc, inverse, strict=True)]}
        if self.W_skip is not None:
            tensors["W_skip"] = [t * i for t, i in zip(self.W_skip, inverse, strict=True)]
        return self._with(tensors)

    def _default_bias(self) -> Sequence[Tensor]:
        raise InputError(
            "a clt's b_dec belongs to its output; give the biases that were subtracted before the encoder."
        )

    def _read(self, bias: Sequence[Tensor] | None) -> list[Tensor]:
        given = self._default_bias() if bias is None else bias
        pairs = zip(given, self.W_enc, strict=True)
        return [product(b.to(self.compute_dtype), W).to(self.dtype) for b, W in pairs]

    def _scales(self, scale: float | Sequence[float]) -> list[float]:
        scales = list(scale) if isinstance(scale, Sequence) else [scale] * self.n_positions
        if len(scales) != self.n_positions:
            raise InputError(f"{len(scales)} scales were given for {self.n_positions} positions; give one for each.")
        return [check_scale(s) for s in scales]

    def _check_position(self, position: int) -> None:
        if not 0 <= position < self.n_positions:
            raise InputError(f"there is no position {position}; this dictionary has 0 to {self.n_positions - 1}.")

    def _with(
        self: _Multi,
        tensors: dict[str, list[Tensor]],
        activation: Activation | None = None,
        prefixes: tuple[int, ...] | None = None,
    ) -> _Multi:
        """A copy with some tensors replaced."""
        own = {name: list(child) for name, child in self.named_children() if isinstance(child, nn.ParameterList)}
        given = {name: [t.detach().clone() for t in group] for name, group in {**own, **tensors}.items()}
        prefixes = self.prefixes if prefixes is None else prefixes
        return type(self)(**given, activation=activation or self.activation, prefixes=prefixes)

    def _rows(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != (wanted := (self.n_positions, self.d_in)):
            raise InputError(f"x has shape {tuple(x.shape)}, but the last two axes must be {wanted}: position, width.")
        return x.to(self.compute_dtype).reshape(-1, *wanted)

    def _encoder(self, position: int) -> tuple[Tensor, Tensor, Tensor | None]:
        threshold = None if self.threshold is None else self.threshold[position]
        return self.W_enc[position], self.b_enc[position], threshold

    def write_at(
        self, position: int, codes: Sequence[tuple[Support, Tensor]], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_out"]:
        """b_dec, what the latents of ``position`` and the earlier ones write there, and the skip of ``x``."""
        own = [self._own(at, *codes[at]) for at in range(position + 1)]
        recon = self._written(position, own) + self.b_dec[position].to(self.compute_dtype)
        return recon if self.W_skip is None else recon + product(x.to(recon.dtype), self.W_skip[position])

    def _own(self, at: int, support: Support, values: Tensor) -> tuple[Support, Tensor]:
        """The entries of one position, by their index in it."""
        mine = (torch.div(support.latents, self.d_sae, rounding_mode="floor") == at).nonzero()[:, 0]
        latents = support.latents[mine] - at * self.d_sae
        return Support(support.rows[mine], latents, support.batch, self.d_sae), values[mine]

    def _written(self, m: int, own: Sequence[tuple[Support, Tensor]]) -> Tensor:
        parts = [decode_entries(*own[at], self.W_dec[at][m - at]) for at in range(m + 1)]
        return torch.stack(parts).sum(0)

    def _decode_rows(self, support: Support, values: Tensor) -> Tensor:
        own = [self._own(at, support, values) for at in range(self.n_positions)]
        return torch.stack([self._written(m, own) for m in range(self.n_positions)], dim=1)

    def _without_latents(self, x: Tensor) -> Tensor:
        bias = torch.stack(list(self.b_dec)).to(self.compute_dtype)
        if self.W_skip is None:
            return bias
        return torch.stack([product(x[:, m], W) for m, W in enumerate(self.W_skip)], dim=1) + bias


class Crosscoder(MultiLayer):
    """Reads and reconstructs the same site of several layers; each latent reads one and writes it and later ones."""

    kind: ClassVar[str] = "crosscoder"

    def __init__(
        self,
        W_enc: Matrices,
        b_enc: Vectors,
        W_dec: Sequence[Float[Tensor, "_ _ _"]],
        b_dec: Vectors,
        threshold: Vectors | None = None,
        *,
        activation: Activation = JUMPRELU,
        prefixes: Sequence[int] = (),
    ) -> None:
        """See ``MultiLayer``; there is no skip connection."""
        super().__init__(W_enc, b_enc, W_dec, b_dec, threshold, activation=activation, prefixes=prefixes)

    def error(
        self, x: Float[Tensor, "*batch n d_in"], target: Float[Tensor, "*batch n d_in"] | None = None
    ) -> Float[Tensor, "*batch n d_in"]:
        """x - recon, or ``target`` - recon."""
        return super().error(x, x if target is None else target)

    def _default_bias(self) -> Sequence[Tensor]:
        return list(self.b_dec)


class CrossLayerTranscoder(MultiLayer):
    """Reads what every MLP reads and writes what they write, with a skip connection within a layer if it has one."""

    kind: ClassVar[str] = "clt"


def _parameters(tensors: Sequence[Tensor]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in tensors)
