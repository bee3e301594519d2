"""Which latents of a finished dictionary are active: ReLU, JumpReLU, TopK or BatchTopK."""

from dataclasses import dataclass
from typing import Literal, get_args

from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.dictionaries.activations import mask_above

Kind = Literal["relu", "jumprelu", "topk", "batchtopk"]


@dataclass(frozen=True)
class Activation:
    """From pre-activations to activations; raises InputError when ``k`` does not suit the kind.

    - ``relu``: the pre-activation where it is positive (Bricken et al. 2023);
    - ``jumprelu``: where it is above the latent's threshold (Rajamanoharan et al. 2024, eq. 3);
    - ``topk``: the ``k`` largest positive ones of a row (Gao et al. 2024, eq. 3), over all positions jointly for
      multi-layer kinds; of equal ones those of the lower index;
    - ``batchtopk``: at inference, where it is above one threshold for all latents (Bussmann et al. 2024, eq. 4).
    """

    kind: Kind
    k: int | float | None = None
    """``topk``: active latents per row, a whole number; ``batchtopk``: their mean in training; else None."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"unknown activation {self.kind!r}; use one of {', '.join(get_args(Kind))}.")
        if self.kind in ("relu", "jumprelu"):
            if self.k is not None:
                raise InputError(f"activation {self.kind!r} has no k, but k is {self.k}; leave it out.")
        elif self.k is None or not 0 < self.k < float("inf"):
            raise InputError(f"activation {self.kind!r} needs a k above 0, the active latents per row, not {self.k}.")
        elif self.kind == "topk" and self.k != int(self.k):
            raise InputError(f"activation 'topk' needs a whole k, not {self.k}.")

    @property
    def has_threshold(self) -> bool:
        """Whether a dictionary with this activation has a ``threshold`` tensor."""
        return self.kind in ("jumprelu", "batchtopk")

    @property
    def top(self) -> int | None:
        """``k`` where the activation picks the largest of a row, else None."""
        return int(self.k) if self.kind == "topk" and self.k is not None else None

    def __call__(
        self, pre_acts: Float[Tensor, "*batch latents"], threshold: Float[Tensor, " latents"] | None
    ) -> Float[Tensor, "*batch latents"]:
        """The activations of all latents; ``threshold`` is None exactly where the kind has none."""
        if threshold is not None:
            return mask_above(pre_acts, threshold)
        acts = pre_acts.relu()
        return acts if self.top is None else acts * is_largest(acts.detach(), self.top)


def is_largest(acts: Float[Tensor, "*batch latents"], k: int) -> Tensor:
    """Where the ``k`` largest of each row are, of equal ones those of the lower index; all when there are fewer."""
    k = min(k, acts.shape[-1])
    smallest = acts.topk(k, dim=-1).values[..., -1:]
    chosen = acts >= smallest
    if bool((chosen.sum(-1) > k).any()):
        tied = acts == smallest
        room = k - (acts > smallest).sum(-1, keepdim=True)
        chosen &= ~tied | (tied.cumsum(-1) <= room)
    return chosen


JUMPRELU = Activation("jumprelu")
"""The activation of Gemma Scope."""
