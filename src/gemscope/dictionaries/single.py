"""One layer in, one layer out: what SAEs and transcoders share."""

from collections.abc import Sequence
from typing import TypeVar

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

_Single = TypeVar("_Single", bound="SingleLayer")


class SingleLayer(Dictionary):
    """acts = activation(x W_enc + b_enc), recon = acts W_dec + b_dec (+ x W_skip); ``x`` may have any leading axes."""

    threshold: nn.Parameter | None
    W_skip: nn.Parameter | None

    def __init__(
        self,
        W_enc: Float[Tensor, "_ _"],
        b_enc: Float[Tensor, " _"],
        W_dec: Float[Tensor, "_ _"],
        b_dec: Float[Tensor, " _"],
        threshold: Float[Tensor, " _"] | None = None,
        *,
        activation: Activation = JUMPRELU,
        prefixes: Sequence[int] = (),
    ) -> None:
        """Take the tensors as they are; raises InputError when their shapes or dtypes do not belong together."""
        super().__init__(activation, prefixes)
        d_in, d_sae = W_enc.shape
        given = {
            "b_enc": (b_enc, (d_sae,)),
            "W_dec": (W_dec, (d_sae, W_dec.shape[1])),
            "b_dec": (b_dec, (W_dec.shape[1],)),
        }
        if threshold is not None:
            given["threshold"] = (threshold, (d_sae,))
        check_tensors(given, W_enc.dtype, f"W_enc {(d_in, d_sae)}")
        check_threshold(activation, threshold is not None)
        self.W_enc = nn.Parameter(W_enc, requires_grad=False)
        self.b_enc = nn.Parameter(b_enc, requires_grad=False)
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)
        self.b_dec = nn.Parameter(b_dec, requires_grad=False)
        self.threshold = None if threshold is None else nn.Parameter(threshold, requires_grad=False)
        self.W_skip = None

    @property
    def n_positions(self) -> int:
        """1."""
        return 1

    @property
    def d_in(self) -> int:
        """Width of the vectors that are read."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the vectors that are written."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weights."""
        return self.W_enc.dtype

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """x W_enc + b_enc."""
        return product(x.to(self.compute_dtype), self.W_enc, self.b_enc)

    def encode(self, x: Float[Tensor, "*batch d_in"], latents: Latents | None = None) -> Float[Tensor, "*batch chosen"]:
        """Activations of all latents, or of the chosen ones only, in the order given."""
        if latents is None:
            rows = self._rows(x)
            return self._activate(self._dense(rows)).view(*x.shape[:-1], self.d_sae)
        acts = self._chosen(self._rows(x), self._indices(latents, self.d_sae))
        return acts.view(*x.shape[:-1], acts.shape[1])

    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> tuple[Support, Float[Tensor, " active"]]:
        """The active latents only, row by row, and their activations; never a dense matrix."""
        return self._select(self._rows(x))

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """acts W_dec + b_dec; what ``x`` itself adds (a skip connection) is not part of it."""
        return product(acts.to(self.compute_dtype), self.W_dec, self.b_dec)

    def decode_sparse(self, support: Support, values: Float[Tensor, " active"]) -> Float[Tensor, "batch d_out"]:
        """The same from ``encode_sparse``; reads only the decoder rows of the latents that are there."""
        return self._decode_rows(support, values)[:, 0] + self.b_dec.to(self.compute_dtype)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction."""
        rows = self._rows(x)
        recon = self._decode_rows(*self._select(rows)) + self._without_latents(rows)
        return recon.view(*x.shape[:-1], self.d_out)

    def error(
        self, x: Float[Tensor, "*batch d_in"], target: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch d_out"]:
        """target - recon: what the dictionary leaves unexplained."""
        return target.to(self.compute_dtype) - self(x)

    def decoder_rows(self, latents: Latents) -> Float[Tensor, "chosen d_out"]:
        """What each of some latents writes per unit of activation."""
        return self.W_dec.index_select(0, self._indices(latents, self.d_sae)).to(self.compute_dtype)

    def encoder_columns(self, latents: Latents) -> Float[Tensor, "chosen d_in"]:
        """What each of some latents reads: columns of W_enc, one per row of the result."""
        return self._columns(self._indices(latents, self.d_sae))

    def prefix(self: _Single, n: int) -> _Single:
        """The dictionary of the first ``n`` latents; a TopK keeps its k, at most ``n``."""
        kept = prefix_sizes(n, self.d_sae, self.prefixes)
        activation = self.activation
        if activation.top is not None:
            activation = Activation("topk", min(activation.top, n))
        tensors = {"W_enc": self.W_enc[:, :n], "b_enc": self.b_enc[:n], "W_dec": self.W_dec[:n]}
        if self.threshold is not None:
            tensors["threshold"] = self.threshold[:n]
        return self._with(tensors, activation, kept)

    def fold_scale(self: _Single, scale_in: float, scale_out: float | None = None) -> _Single:
        """From a dictionary for x / scale_in -> y / scale_out to the same one for x -> y; ``scale_out`` is
        ``scale_in`` unless given, and the inverses go back.

        Pre-activations, thresholds and activations grow by ``scale_in``, so the same latents are active (Gemma
        Scope, appendix B). Raises InputError unless the scales are positive.
        """
        scale_in = check_scale(scale_in)
        scale_out = scale_in if scale_out is None else check_scale(scale_out)
        tensors = {"b_enc": self.b_enc * scale_in, "b_dec": self.b_dec * scale_out}
        if self.threshold is not None:
            tensors["threshold"] = self.threshold * scale_in
        if scale_out != scale_in:
            tensors["W_dec"] = self.W_dec * (scale_out / scale_in)
            if self.W_skip is not None:
                tensors["W_skip"] = self.W_skip * (scale_out / scale_in)
        return self._with(tensors)

    def fold_pre_bias(self: _Single, bias: Float[Tensor, " d_in"] | None = None) -> _Single:
        """From pre-activations (x - bias) W_enc + b_enc, as in training, to x W_enc + b_enc'.

        ``bias`` is b_dec for an SAE. A transcoder's b_dec lives in its output space, so it has to be given there;
        raises InputError when it is not.
        """
        return self._with({"b_enc": self.b_enc - self._read_by_encoder(bias)})

    def unfold_pre_bias(self: _Single, bias: Float[Tensor, " d_in"] | None = None) -> _Single:
        """The way back from ``fold_pre_bias``."""
        return self._with({"b_enc": self.b_enc + self._read_by_encoder(bias)})

    def fold_input_gain(self: _Single, gain: Float[Tensor, " d_in"]) -> _Single:
        """From a dictionary that reads a norm's output without its gain to one that reads it with its gain.

        ``gain`` is 1 + w in Gemma. The inverse gain goes back. Raises InputError when the gain has a zero.
        """
        inverse = 1 / check_gain(gain).to(self.W_enc)[:, None]
        tensors = {"W_enc": self.W_enc * inverse}
        if self.W_skip is not None:
            tensors["W_skip"] = self.W_skip * inverse
        return self._with(tensors)

    def _default_bias(self) -> Tensor:
        raise InputError(
            f"a {self.kind} has no bias of its own input space: its b_dec belongs to the output; give the bias that"
            " was subtracted before the encoder."
        )

    def _read_by_encoder(self, bias: Tensor | None) -> Tensor:
        bias = self._default_bias() if bias is None else bias
        return product(bias.to(self.compute_dtype), self.W_enc).to(self.dtype)

    def _with(
        self: _Single,
        tensors: dict[str, Tensor],
        activation: Activation | None = None,
        prefixes: tuple[int, ...] | None = None,
    ) -> _Single:
        """A copy with some tensors replaced."""
        given = {name: t.detach().clone() for name, t in ({**dict(self.named_parameters()), **tensors}).items()}
        prefixes = self.prefixes if prefixes is None else prefixes
        return type(self)(**given, activation=activation or self.activation, prefixes=prefixes)

    def _rows(self, x: Tensor) -> Tensor:
        return x.to(self.compute_dtype).reshape(-1, 1, self.d_in)

    def _encoder(self, position: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.W_enc, self.b_enc, self.threshold

    def write_at(
        self, position: int, codes: Sequence[tuple[Support, Tensor]], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_out"]:
        """The reconstruction from the codes at the only position there is."""
        return self.reconstruct(x[:, None], *codes[position])[:, 0]

    def _decode_rows(self, support: Support, values: Tensor) -> Tensor:
        return decode_entries(support, values, self.W_dec)[:, None]

    def _without_latents(self, x: Tensor) -> Tensor:
        bias = self.b_dec.to(self.compute_dtype)
        return bias if self.W_skip is None else product(x, self.W_skip, self.b_dec)
