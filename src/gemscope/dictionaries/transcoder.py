"""Transcoders: from what an MLP reads to what it writes, with and without a linear path beside the latents."""

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from gemscope.core.arrays import Float, Tensor
from gemscope.dictionaries.activation import JUMPRELU, Activation
from gemscope.dictionaries.base import check_tensors
from gemscope.dictionaries.single import SingleLayer


class Transcoder(SingleLayer):
    """acts = activation(x W_enc + b_enc), recon = acts W_dec + b_dec, for y rather than x (Dunefsky et al. 2024)."""

    kind: ClassVar[str] = "transcoder"


class SkipTranscoder(SingleLayer):
    """A transcoder plus the linear map x W_skip, ``W_skip [d_in, d_out]``, not transposed (Paulo et al. 2025)."""

    kind: ClassVar[str] = "skip_transcoder"

    def __init__(
        self,
        W_enc: Float[Tensor, "_ _"],
        b_enc: Float[Tensor, " _"],
        W_dec: Float[Tensor, "_ _"],
        b_dec: Float[Tensor, " _"],
        threshold: Float[Tensor, " _"] | None = None,
        *,
        W_skip: Float[Tensor, "_ _"],
        activation: Activation = JUMPRELU,
        prefixes: Sequence[int] = (),
    ) -> None:
        """Take the tensors as they are; raises InputError when their shapes or dtypes do not belong together."""
        super().__init__(W_enc, b_enc, W_dec, b_dec, threshold, activation=activation, prefixes=prefixes)
        shape = (self.d_in, self.d_out)
        check_tensors({"W_skip": (W_skip, shape)}, W_enc.dtype, f"W_enc with {shape[0]} rows and W_dec with {shape[1]}")
        self.W_skip = nn.Parameter(W_skip, requires_grad=False)

    def skip(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """x W_skip."""
        assert self.W_skip is not None
        return x.to(self.compute_dtype) @ self.W_skip.to(self.compute_dtype)
