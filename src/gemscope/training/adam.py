"""Adam without momentum, one tensor at a time: what a decoder table needs while its gradient is at hand.

The first moment of Gemma Scope's Adam is the gradient itself (beta1 = 0, Kingma and Ba 2015, algorithm 1), so only
the second is kept: 4 bytes a weight, or 2 in bf16. A bf16 moment is rounded stochastically, for its steps of 1 - beta2
are far below bf16's resolution; the bits drawn are a function of the tensor's name and the step, so that a run goes on
exactly where it was stopped.
"""

import zlib
from collections.abc import Mapping
from typing import Literal

import torch

from gemscope.core.arrays import Tensor

_CHUNK = 1 << 20
"""Elements updated at a time: temporary memory stays small."""


class StreamedAdam:
    """Second moments by name; ``begin`` each step, then ``update`` each tensor once."""

    def __init__(self, beta2: float = 0.999, eps: float = 1e-8, dtype: Literal["float32", "bfloat16"] = "float32"):
        self.beta2, self.eps = beta2, eps
        self.dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        self.steps = 0
        self.squares: dict[str, Tensor] = {}

    def begin(self) -> None:
        """A new step."""
        self.steps += 1

    @torch.no_grad()
    def update(self, name: str, weight: Tensor, grad: Tensor, rate: float) -> None:
        """``weight -= rate * grad / (sqrt(v / (1 - beta2^t)) + eps)`` in place, v being the decayed mean of grad^2."""
        if name not in self.squares:
            self.squares[name] = torch.zeros_like(weight, dtype=self._kept(weight))
        squares = self.squares[name]
        correction = 1 - self.beta2**self.steps
        flat = (t.reshape(-1).split(_CHUNK) for t in (weight, grad.contiguous(), squares))
        for number, (w, g, v) in enumerate(zip(*flat, strict=True)):
            g = g.to(w.device)
            exact = v if v.dtype == w.dtype else v.to(w.dtype)
            exact.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            w.addcdiv_(g, (exact / correction).sqrt_().add_(self.eps), value=-rate)
            if exact is not v:
                v.copy_(_rounded(exact, f"{name}.{self.steps}.{number}"))

    def _kept(self, weight: Tensor) -> torch.dtype:
        """Vectors and matrices of one row stay exact: they are small, and thresholds need it."""
        return self.dtype if weight.ndim > 1 else weight.dtype

    def state_dict(self) -> dict[str, object]:
        """Moments and the number of steps."""
        return {"steps": self.steps, "squares": dict(self.squares)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from there."""
        steps, squares = state["steps"], state["squares"]
        assert isinstance(steps, int)
        assert isinstance(squares, Mapping)
        self.steps = steps
        self.squares = {str(name): tensor.clone() for name, tensor in squares.items()}


def _rounded(x: Tensor, seed: str) -> Tensor:
    """fp32 to bf16, up or down with the probability that makes it right in the mean."""
    generator = torch.Generator(x.device).manual_seed(zlib.crc32(seed.encode()))
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & -65536).view(torch.float32).to(torch.bfloat16)
