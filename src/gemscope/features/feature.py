"""What an index knows of one latent, as plain values."""

from dataclasses import asdict, dataclass
from typing import Any

from gemscope.features.database import Label


@dataclass(frozen=True)
class FeatureId:
    """One latent of an index."""

    dictionary: str
    latent: int

    def __str__(self) -> str:
        return f"{self.dictionary}/{self.latent}"


@dataclass(frozen=True)
class Example:
    """A context with a marked token."""

    tokens: tuple[str, ...]
    """What each token adds to the text; the bytes of a character after its first are empty."""
    values: tuple[float, ...]
    """Activation of the latent on each; known within the index's window around the marked token, else 0."""
    marked: int
    value: float
    """Activation on the marked token."""
    special: tuple[bool, ...]
    """Which tokens are control tokens."""
    doc: int
    """The document's number in what was read."""
    position: int
    """Of the first token that is given, in the context."""


@dataclass(frozen=True)
class Relative:
    """A latent with something in common."""

    feature: str
    value: float
    """Cosine, or Jaccard index."""
    count: int | None = None
    """Tokens on which both were active, of those that were sampled."""


@dataclass(frozen=True)
class Feature:
    """Everything an index knows of a latent."""

    id: str
    labels: tuple[Label, ...]
    count: int
    """Content tokens on which it is active."""
    density: float
    """Their share of all content tokens."""
    peak: float
    """The largest activation."""
    special_count: int
    special_peak: float
    """The same on control tokens and the chat template, where they were read."""
    steps: tuple[int, ...]
    """Active tokens by their position in the context: 0, 1-2, 3-6, 7-14, ..."""
    histogram: tuple[tuple[float, int], ...]
    """(middle of a bin, activations in it)."""
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    """(token, change of its logit per unit of activation, up to one positive factor)."""
    by_output: tuple[tuple[tuple[str, float], ...], ...]
    """Of a multi-layer kind: promoted tokens by output layer."""
    suppressed_by_output: tuple[tuple[tuple[str, float], ...], ...]
    """Those suppressed; empty in an index that was made before they were kept."""
    nearest: tuple[Relative, ...]
    elsewhere: tuple[Relative, ...]
    """By decoder cosine: in the same dictionary, in all others."""
    partners: tuple[Relative, ...]
    top: tuple[Example, ...]
    groups: tuple[tuple[Example, ...], ...]
    """Random examples of each quantile group, from the weakest to the strongest."""
    bounds: tuple[tuple[float, float], ...] = ()
    """Of an import, whose groups need not be quantiles: lowest and highest activation of each group."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
