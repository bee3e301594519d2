"""What an index holds of each latent, as one value."""

from dataclasses import asdict, dataclass
from typing import Any

from gemscope.core.errors import InputError


@dataclass(frozen=True)
class IndexConfig:
    """The defaults take about 1 KB a latent on disk and 14 KB in memory while the index is made."""

    top: int = 20
    """Contexts with the strongest activations, one example for each context."""
    groups: int = 5
    """Quantile groups of a latent's activations, each with the same share of its active tokens, as far as ``sample``
    tells within a bin of the histogram."""
    per_group: int = 5
    """Random examples of each group."""
    sample: int = 64
    """Random active tokens, of which the groups' examples are taken: enough that a group hardly ever lacks one."""
    window: int = 12
    """Tokens before and after an example whose activations are kept too."""
    promoted: int = 10
    """Tokens that a latent promotes most, and as many that it suppresses."""
    nearest: int = 5
    """Latents with the nearest decoder direction, in the same dictionary and in all others."""
    partners: int = 5
    """Latents that are active on the same tokens."""
    partner_rows: int = 1 << 15
    """Random tokens on which partners are counted."""
    seed: int = 0
    """Of the random choices, which depend on it, the document, the position and the latent only."""

    def __post_init__(self) -> None:
        for name in ("top", "groups", "per_group", "sample", "promoted", "nearest", "partners", "partner_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; an index keeps at least 1.")
        if not 0 <= self.window <= 127:
            raise InputError(f"a window of {self.window} tokens cannot be kept; give 0 to 127.")
        if self.groups > 255 or self.per_group > 255 or self.top > 255:
            raise InputError("at most 255 examples of a kind are kept; ask for fewer.")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
