"""The JumpReLU sparse autoencoder.

Notable:
- row vectors, ``x @ W``; the five tensors and their names are those of Gemma Scope;
- applies to raw activations: what training normalises or centres is folded into the weights (``fold_scale``,
  ``fold_pre_bias``), exactly and reversibly;
- a finished instrument: its weights ask for no gradient, and gradients to ``x`` pass through the active
  latents.
"""

import torch
from torch import nn

from gemscope.core.arrays import Float, Int, Tensor
from gemscope.core.errors import InputError
from gemscope.dictionaries.activations import mask_above
from gemscope.dictionaries.sparse import encode_above

TENSORS: dict[str, tuple[str, ...]] = {
    "W_enc": ("d_in", "d_sae"),
    "b_enc": ("d_sae",),
    "W_dec": ("d_sae", "d_in"),
    "b_dec": ("d_in",),
    "threshold": ("d_sae",),
}
"""Name and shape of each tensor of an SAE."""


class SAE(nn.Module):
    """acts = JumpReLU(x W_enc + b_enc), recon = acts W_dec + b_dec (Lieberum et al. 2024, "Gemma Scope",
    section 2).

    Computes in the dtype of its weights, to which ``x`` is converted; ``x`` may have any leading axes.
    """

    def __init__(
        self,
        W_enc: Float[Tensor, "_ _"],
        b_enc: Float[Tensor, " _"],
        W_dec: Float[Tensor, "_ _"],
        b_dec: Float[Tensor, " _"],
        threshold: Float[Tensor, " _"],
    ) -> None:
        """Take the tensors as they are; raises InputError when their shapes or dtypes do not belong together."""
        super().__init__()
        given = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
        sizes = dict(zip(TENSORS["W_enc"], W_enc.shape, strict=True))
        for name, tensor in given.items():
            if tuple(tensor.shape) != (expected := tuple(sizes[axis] for axis in TENSORS[name])):
                raise InputError(
                    f"{name} has shape {tuple(tensor.shape)}, but W_enc {tuple(W_enc.shape)} asks for {expected}."
                )
            if tensor.dtype != W_enc.dtype:
                raise InputError(f"{name} is {tensor.dtype} but W_enc is {W_enc.dtype}; give all tensors one dtype.")
        self.W_enc = nn.Parameter(W_enc, requires_grad=False)
        self.b_enc = nn.Parameter(b_enc, requires_grad=False)
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)
        self.b_dec = nn.Parameter(b_dec, requires_grad=False)
        self.threshold = nn.Parameter(threshold, requires_grad=False)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """x W_enc + b_enc."""
        return x.to(self.W_enc.dtype) @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Activations of the latents: the pre-activation where it is above the latent's threshold, else 0."""
        return mask_above(self.pre_acts(x), self.threshold)

    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> tuple[Int[Tensor, "2 active"], Float[Tensor, " active"]]:
        """The active latents only: (row, latent) pairs in row order, and their activations; never a dense
        matrix.
        """
        support, values = encode_above(x.to(self.W_enc.dtype), self.W_enc, self.b_enc, self.threshold)
        return torch.stack([support.rows, support.latents]), values

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """acts W_dec + b_dec."""
        return acts @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction of ``x``."""
        return self.decode(self.encode(x))

    def fold_scale(self, scale: float) -> "SAE":
        """From a dictionary for x / scale to the same dictionary for x; ``fold_scale(1 / scale)`` goes back.

        Pre-activations, thresholds and reconstructions grow by ``scale``, so the same latents are active and
        recon(x) = scale * self(x / scale) (Gemma Scope, appendix B). Raises InputError unless ``scale`` is
        positive.
        """
        if not scale > 0:
            raise InputError(f"scale {scale} is not positive; give the factor by which raw activations are larger.")
        W_enc, W_dec = self.W_enc.detach().clone(), self.W_dec.detach().clone()
        return SAE(
            W_enc,
            self.b_enc.detach() * scale,
            W_dec,
            self.b_dec.detach() * scale,
            self.threshold.detach() * scale,
        )

    def fold_pre_bias(self) -> "SAE":
        """From pre-activations (x - b_dec) W_enc + b_enc, as in training, to x W_enc + b_enc'."""
        return self._with_b_enc(self.b_enc.detach() - self.b_dec.detach() @ self.W_enc.detach())

    def unfold_pre_bias(self) -> "SAE":
        """The way back from ``fold_pre_bias``."""
        return self._with_b_enc(self.b_enc.detach() + self.b_dec.detach() @ self.W_enc.detach())

    def _with_b_enc(self, b_enc: Tensor) -> "SAE":
        tensors = {name: tensor.detach().clone() for name, tensor in self.named_parameters()}
        return SAE(**(tensors | {"b_enc": b_enc}))

    def extra_repr(self) -> str:
        """Shown by ``repr``."""
        return f"d_in={self.d_in}, d_sae={self.d_sae}, dtype={self.W_enc.dtype}"
