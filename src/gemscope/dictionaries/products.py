"""The one dense product of every dictionary, by the fastest routine at hand."""

from functools import cache

import torch

from gemscope.core.arrays import Float, Tensor


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Affine:
    """x -> x W + b without gradients, for one block of rows after the other.

    In fp32 and bf16 on a CPU by oneDNN, which takes four fifths of the time of ``torch.addmm`` in fp32, or less; in
    bf16 the weights are brought into its layout once.
    """

    def __init__(self, W: Float[Tensor, "d_in width"], b: Float[Tensor, " width"]) -> None:
        self._W, self._b = W.detach(), b.detach()
        self._onednn = W.device.type == "cpu" and W.dtype in (torch.float32, torch.bfloat16) and _has_onednn()
        self._rows = self._W.T
        if self._onednn and W.dtype == torch.bfloat16:
            self._rows = torch.ops.mkldnn._reorder_linear_weight(self._rows.contiguous())

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch width"]:
        """Its pre-activations."""
        if self._onednn and len(x):
            return torch.ops.mkldnn._linear_pointwise(x.detach(), self._rows, self._b, "none", [], "")
        return torch.addmm(self._b, x.detach(), self._W)
