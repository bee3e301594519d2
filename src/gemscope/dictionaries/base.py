"""What all five kinds share: the sparse codes of rows of vectors, one vector per position.

A single-layer kind has one position, a multi-layer kind one per layer it reads. Latents are counted over all
positions: latent ``i`` of position ``l`` has the index ``l * d_sae + i``.

Notable:
- a finished instrument: its weights ask for no gradient, and gradients to ``x`` pass through the active latents;
- stored in fp32, or in bf16 to halve the memory; computed in fp32 (in fp64 where the weights are), to which ``x``
  is converted;
- applies to raw activations: what training normalises or centres is folded into the weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from gemscope.core.arrays import Float, Int, Tensor
from gemscope.core.errors import InputError
from gemscope.dictionaries.activation import JUMPRELU, Activation
from gemscope.dictionaries.sparse import Slice, Support, attach, decode_sparse, select

SLICE = 1 << 14
"""Latents whose encoder is multiplied at a time."""

Latents = Int[Tensor, " chosen"] | Sequence[int]
"""Indices of some latents."""


class Dictionary(nn.Module, ABC):
    """The common core; use ``SAE``, ``Transcoder``, ``SkipTranscoder``, ``Crosscoder``, ``CrossLayerTranscoder``."""

    kind: ClassVar[str]
    """``sae``, ``transcoder``, ``skip_transcoder``, ``crosscoder`` or ``clt``."""

    def __init__(self, activation: Activation = JUMPRELU, prefixes: Sequence[int] = ()) -> None:
        super().__init__()
        self.activation = activation
        self.prefixes = tuple(prefixes)
        """Numbers of first latents (per position) that training made dictionaries of their own (Matryoshka)."""

    @property
    @abstractmethod
    def n_positions(self) -> int:
        """Vectors per row."""

    @property
    @abstractmethod
    def d_in(self) -> int:
        """Width of the vectors that are read."""

    @property
    @abstractmethod
    def d_out(self) -> int:
        """Width of the vectors that are written."""

    @property
    @abstractmethod
    def d_sae(self) -> int:
        """Number of latents, per position."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the stored weights."""

    @property
    def n_latents(self) -> int:
        """Number of latents over all positions."""
        return self.n_positions * self.d_sae

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of every product and result: float64 where the weights are, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @abstractmethod
    def _encoder(self, position: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """W_enc [d_in, d_sae], b_enc and threshold of one position."""

    @abstractmethod
    def _decode_rows(self, support: Support, values: Tensor) -> Tensor:
        """[batch, positions, d_out], without what does not depend on the codes."""

    @abstractmethod
    def write_at(
        self, position: int, codes: Sequence[tuple[Support, Tensor]], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_out"]:
        """The reconstruction at one position, from ``codes_at`` of it and all earlier ones; ``x`` is what it reads."""

    @abstractmethod
    def _without_latents(self, x: Tensor) -> Tensor:
        """b_dec, and the skip connection of ``x`` [batch, positions, d_in] where there is one."""

    def codes(self, x: Float[Tensor, "batch n d_in"]) -> tuple[Support, Float[Tensor, " active"]]:
        """The active latents of rows with their axis of positions, whatever the kind, by index over all positions."""
        return self._select(x.to(self.compute_dtype))

    def reconstruct(
        self, x: Float[Tensor, "batch n d_in"], support: Support, values: Float[Tensor, " active"]
    ) -> Float[Tensor, "batch n d_out"]:
        """What ``forward`` gives, from codes that are there already: all of ``codes(x)``, or some."""
        return self._decode_rows(support, values) + self._without_latents(x.to(self.compute_dtype))

    def codes_at(self, position: int, x: Float[Tensor, "batch d_in"]) -> tuple[Support, Float[Tensor, " active"]]:
        """``codes`` of one position alone, for when the later ones are not computed yet.

        Raises InputError for a TopK over several positions: which latents are active depends on all of them.
        """
        if self.activation.top is not None and self.n_positions > 1:
            raise InputError("a TopK over several positions needs all of them; use codes().")
        with torch.no_grad():
            own = (replace(part, position=0) for part in self._slices() if part.position == position)
            rows = x.to(self.compute_dtype)[:, None]
            return select(rows.detach(), own, self.n_latents, self.activation.top)

    def _slices(self) -> Iterator[Slice]:
        for position in range(self.n_positions):
            W_enc, b_enc, threshold = self._encoder(position)
            for first in range(0, self.d_sae, SLICE):
                part = slice(first, first + SLICE)
                floor = None if threshold is None else threshold[part]
                yield Slice(position, position * self.d_sae + first, W_enc[:, part], b_enc[part], floor)

    def _columns(self, latents: Tensor) -> Tensor:
        """Encoder columns by index over all positions, as rows [latents, d_in]."""
        found = torch.empty(len(latents), self.d_in, dtype=self.compute_dtype, device=latents.device)
        owner = torch.div(latents, self.d_sae, rounding_mode="floor")
        for position in range(self.n_positions):
            at = (owner == position).nonzero()[:, 0]
            W_enc = self._encoder(position)[0]
            found[at] = W_enc.T.index_select(0, latents[at] - position * self.d_sae).to(found.dtype)
        return found

    def _select(self, x: Tensor) -> tuple[Support, Tensor]:
        """Codes of ``x`` [batch, positions, d_in]."""
        with torch.no_grad():
            support, values = select(x.detach(), self._slices(), self.n_latents, self.activation.top)
        return support, attach(x, support, values, self._columns)

    def _dense(self, x: Tensor) -> Tensor:
        """Pre-activations [batch, positions, d_sae] of ``x`` [batch, positions, d_in]."""
        parts = [product(x[:, i], *self._encoder(i)[:2]) for i in range(self.n_positions)]
        return torch.stack(parts, dim=1)

    def _activate(self, pre_acts: Tensor) -> Tensor:
        """Activations [batch, positions, d_sae]; TopK chooses among all positions."""
        thresholds = [self._encoder(i)[2] for i in range(self.n_positions)]
        flat = None if thresholds[0] is None else torch.cat([t for t in thresholds if t is not None])
        flat = None if flat is None else flat.to(pre_acts.dtype)
        return self.activation(pre_acts.flatten(1), flat).view(pre_acts.shape)

    def _chosen(self, x: Tensor, latents: Tensor) -> Tensor:
        """Activations [batch, chosen] of some latents; without the others, except where they compete (TopK)."""
        if self.activation.top is not None:
            return pick(*self._select(x), latents)
        owner = torch.div(latents, self.d_sae, rounding_mode="floor")
        found: dict[int, Tensor] = {}
        for position in owner.unique().tolist():
            at = (owner == position).nonzero()[:, 0]
            which = latents[at] - position * self.d_sae
            W_enc, b_enc, threshold = self._encoder(position)
            pre_acts = product(x[:, position], W_enc.index_select(1, which), b_enc[which])
            acts = self.activation(pre_acts, None if threshold is None else threshold[which].to(x.dtype))
            found |= {int(i): acts[:, n] for n, i in enumerate(at.tolist())}
        return torch.stack([found[i] for i in range(len(latents))], dim=1) if found else x.new_zeros(len(x), 0)

    def _indices(self, latents: Latents, count: int) -> Tensor:
        """As a tensor; raises InputError when one is out of range."""
        return chosen(latents, count).to(self._encoder(0)[1].device)

    def extra_repr(self) -> str:
        """Shown by ``repr``."""
        sizes = f"d_in={self.d_in}, d_out={self.d_out}, d_sae={self.d_sae}"
        positions = f"positions={self.n_positions}, " if self.n_positions > 1 else ""
        return f"{positions}{sizes}, activation={self.activation.kind}, dtype={self.dtype}"


def chosen(latents: Latents, count: int) -> Tensor:
    """Indices as a tensor; raises InputError when one is not below ``count``."""
    index = torch.as_tensor(latents, dtype=torch.int64)
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < count:
        bad = int(index.min()) if int(index.min()) < 0 else int(index.max())
        raise InputError(f"there is no latent {bad}; this dictionary has latents 0 to {count - 1}.")
    return index


def product(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W + b in the dtype of ``x``; weights in another dtype are converted slice by slice."""
    if W.dtype == x.dtype:
        return x @ W if b is None else x @ W + b
    parts = [x @ part.to(x.dtype) for part in W.split(SLICE, dim=1)]
    found = torch.cat(parts, dim=-1)
    return found if b is None else found + b.to(x.dtype)


def decode_entries(support: Support, values: Tensor, table: Tensor) -> Tensor:
    """``decode_sparse`` for a table in any dtype: only the rows that are used are converted."""
    if table.dtype == values.dtype:
        return decode_sparse(support, values, table)
    used, local = support.latents.unique(return_inverse=True)
    rows = table.index_select(0, used).to(values.dtype)
    return decode_sparse(Support(support.rows, local, support.batch, len(used)), values, rows)


def pick(support: Support, values: Tensor, latents: Tensor) -> Tensor:
    """The columns ``latents`` of a sparse matrix, dense [batch, chosen]."""
    wanted, place = latents.unique(return_inverse=True)
    lookup = torch.full((support.d_sae,), -1, dtype=torch.int64, device=latents.device)
    lookup[wanted] = torch.arange(len(wanted), device=latents.device)
    at = lookup[support.latents]
    keep = at >= 0
    found = values.new_zeros(support.batch, len(wanted)).index_put((support.rows[keep], at[keep]), values[keep])
    return found[:, place]


def check_tensors(given: Mapping[str, tuple[Tensor, tuple[int, ...]]], dtype: torch.dtype, why: str) -> None:
    """Raise InputError at the first tensor whose shape or dtype does not belong to the others."""
    for name, (tensor, expected) in given.items():
        if tuple(tensor.shape) != expected:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, but {why} asks for {expected}.")
        if tensor.dtype != dtype:
            raise InputError(f"{name} is {tensor.dtype} but W_enc is {dtype}; give all tensors one dtype.")


def check_threshold(activation: Activation, present: bool) -> None:
    """Raise InputError when a threshold is missing or superfluous."""
    if activation.has_threshold and not present:
        raise InputError(f"activation {activation.kind!r} needs a threshold per latent; give the tensor.")
    if present and not activation.has_threshold:
        raise InputError(f"activation {activation.kind!r} has no threshold; leave the tensor out.")


def check_scale(scale: float) -> float:
    """Raise InputError unless ``scale`` is a positive finite number."""
    if not 0 < scale < float("inf"):
        raise InputError(f"scale {scale} is not positive; give the factor by which raw activations are larger.")
    return scale


def check_gain(gain: Tensor) -> Tensor:
    """Raise InputError when a gain has a zero: what it removes cannot be read."""
    if not bool((gain != 0).all()):
        raise InputError("the gain has a zero, so the input before it cannot be had from the one after it.")
    return gain


def prefix_sizes(n: int, d_sae: int, prefixes: Iterable[int]) -> tuple[int, ...]:
    """The prefixes that a dictionary of the first ``n`` latents still has; raises InputError for an ``n`` too big."""
    if not 0 < n <= d_sae:
        known = f"; it was trained with the prefixes {', '.join(map(str, prefixes))}" if prefixes else ""
        raise InputError(f"a prefix of {n} latents was asked for, but the dictionary has {d_sae}{known}.")
    return tuple(p for p in prefixes if p < n)
