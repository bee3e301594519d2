"""The sparse autoencoder: reconstructs what it reads."""

from typing import ClassVar

from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.dictionaries.single import SingleLayer


class SAE(SingleLayer):
    """acts = activation(x W_enc + b_enc), recon = acts W_dec + b_dec (Lieberum et al. 2024, "Gemma Scope",
    section 2); the tensors and their names are those of Gemma Scope.
    """

    kind: ClassVar[str] = "sae"

    def error(
        self, x: Float[Tensor, "*batch d_in"], target: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """x - recon, or ``target`` - recon."""
        return super().error(x, x if target is None else target)

    def fold_scale(self, scale_in: float, scale_out: float | None = None) -> "SAE":
        """From a dictionary for x / scale_in to the same one for x: recon(x) = scale_in * self(x / scale_in).

        Raises InputError unless the scale is positive, and when the output is given another one.
        """
        if scale_out is not None and scale_out != scale_in:
            raise InputError(f"an SAE reads and writes one space, so scales {scale_in} and {scale_out} cannot differ.")
        return super().fold_scale(scale_in)

    def _default_bias(self) -> Tensor:
        return self.b_dec
