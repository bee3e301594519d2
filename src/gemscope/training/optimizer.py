"""Adam for the two large tables, some latents at a time.

The gradient of a few hundred latents is made, projected, squared into the moments, applied and forgotten while it
is in the cache: four passes over memory per table instead of a dozen, and no dense gradient at all. The
arithmetic is that of torch.optim.Adam.
"""

from collections.abc import Mapping
from typing import Any

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.training.outer import OuterGradient

BLOCK = {"cpu": 256}
"""Latents updated at a time: few enough for a processor's cache; elsewhere all."""
EPSILON = 1e-8


class TableAdam:
    """Adam on one table [d_sae, d], one row per latent; moments in fp32."""

    def __init__(self, table: Float[Tensor, "d_sae d"], betas: tuple[float, float], unit_rows: bool = False) -> None:
        """With ``unit_rows`` the rows keep norm 1: the part of a gradient along its row is taken out before the
        moments see it, and the rows are normalised after every update (Gemma Scope, section 3.2).
        """
        self.table, self.unit_rows = table, unit_rows
        self.beta1, self.beta2 = betas
        self.first = torch.zeros_like(table) if self.beta1 > 0 else None
        self.second = torch.zeros_like(table)
        self.steps = 0
        self._block = min(BLOCK.get(table.device.type, len(table)), len(table))
        self._scratch = torch.zeros_like(table[: self._block])

    @torch.no_grad()
    def step(self, gradient: OuterGradient, rate: float) -> None:
        """One update."""
        self.steps += 1
        self._count = torch.tensor(float(self.steps), device=self.table.device)
        for number, block in enumerate(gradient.blocks(self._block)):
            part = slice(number * self._block, (number + 1) * self._block)
            table, second = self.table[part], self.second[part]
            first = None if self.first is None else self.first[part]
            self._update(table, block, first, second, rate)

    def _update(
        self, table: Tensor, gradient: Tensor | None, first: Tensor | None, second: Tensor, rate: float
    ) -> None:
        if gradient is None and first is None:
            second.mul_(self.beta2)
            return
        gradient = torch.zeros_like(table) if gradient is None else gradient
        if self.unit_rows:
            remove_parallel(gradient, table)
        if first is None:  # with beta1 = 0 it is the gradient, in memory that nobody reads again
            first = self._scratch[: len(table)]
        torch._fused_adam_(  # pyright: ignore[reportPrivateUsage]  # what torch.optim.Adam calls, for part of a tensor
            [table],
            [gradient],
            [first],
            [second],
            [],
            [self._count],
            lr=rate,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=0.0,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )
        if self.unit_rows:
            table.div_(torch.linalg.vector_norm(table, dim=1, keepdim=True))

    def state_dict(self) -> dict[str, Any]:
        """Moments and the number of updates."""
        moments = {"second": self.second} if self.first is None else {"first": self.first, "second": self.second}
        return moments | {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.second.copy_(state["second"])
        if self.first is not None:
            self.first.copy_(state["first"])
        self.steps = int(state["steps"])


def remove_parallel(gradient: Float[Tensor, "latents d"], table: Float[Tensor, "latents d"]) -> None:
    """Take from each row of ``gradient`` its part along the unit row of ``table``, in place."""
    gradient.addcmul_((gradient * table).sum(1, keepdim=True), table, value=-1)
