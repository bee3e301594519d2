"""Array types: ``Float[Tensor, "batch d_in"]``; checked at run time when the tests run."""

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Shaped", "Tensor"]
