"""What is known of a dictionary beside its tensors, whatever format it came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gemscope.core.errors import FormatError
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.multilayer import Crosscoder, CrossLayerTranscoder
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.transcoder import SkipTranscoder, Transcoder

AnyDictionary = SAE | Transcoder | SkipTranscoder | Crosscoder | CrossLayerTranscoder
KINDS: dict[str, type[AnyDictionary]] = {
    cls.kind: cls for cls in (SAE, Transcoder, SkipTranscoder, Crosscoder, CrossLayerTranscoder)
}
"""The class of each kind."""

MULTI = ("crosscoder", "clt")
"""Kinds with several positions."""

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What weights may be stored in."""


@dataclass(frozen=True)
class DictionaryConfig:
    """One dictionary: what it is, where it belongs, how it came about.

    Raises FormatError when the fields contradict one another.
    """

    kind: str
    """``sae``, ``transcoder``, ``skip_transcoder``, ``crosscoder`` or ``clt``."""
    activation: Activation
    """Which latents are active."""
    d_in: int
    """Width of the activations that are read."""
    d_out: int
    """Width of those that are written."""
    d_sae: int
    """Number of latents, per position for the multi-layer kinds."""
    dtype: str
    """Of all tensors: ``float32`` or ``bfloat16``."""
    reads: tuple[Site, ...]
    """Where in the model the activations are taken; one site per position."""
    writes: tuple[Site, ...]
    """What is reconstructed: as many sites; for an SAE or crosscoder the same."""
    model: str
    """Name of the model: a hub id, or the name of a built-in one."""
    revision: str | None = None
    """Revision of the model, if it is known."""
    l0: int | float | None = None
    """Active latents per row that training aimed for, if it is known."""
    prefixes: tuple[int, ...] = ()
    """Numbers of first latents that training made dictionaries of their own (Matryoshka)."""
    read_gain: bool = True
    """Whether what is read from a norm includes the norm's gain; not so for the transcoders of Gemma Scope 1."""
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How the dictionary was made: versions, command, seeds, hashes of the inputs."""
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Whatever else was kept; ``training`` holds the trainer's summary, ``evaluation`` what was measured."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FormatError(f"'kind' is {self.kind!r}, but this gemscope knows only {', '.join(KINDS)}.")
        if self.dtype not in DTYPES:
            raise FormatError(f"'dtype' is {self.dtype!r}, but weights are stored in {' or '.join(DTYPES)}.")
        for name in ("d_in", "d_out", "d_sae"):
            if getattr(self, name) < 1:
                raise FormatError(f"{name!r} is {getattr(self, name)}, but a size is at least 1.")
        if not self.reads or len(self.reads) != len(self.writes):
            raise FormatError(f"{len(self.reads)} sites are read and {len(self.writes)} written; name one of each.")
        if self.kind not in MULTI and len(self.reads) != 1:
            raise FormatError(f"a dictionary of kind {self.kind!r} reads one site, not {len(self.reads)}.")
        if self.kind in ("sae", "crosscoder"):
            if self.reads != self.writes:
                raise FormatError(f"a dictionary of kind {self.kind!r} writes what it reads, not {self.writes[0]}.")
            if self.d_in != self.d_out:
                raise FormatError(
                    f"a dictionary of kind {self.kind!r} writes what it reads, but its widths are {self.d_in} and"
                    f" {self.d_out}."
                )

    @property
    def site(self) -> Site:
        """The first site that is read."""
        return self.reads[0]

    @classmethod
    def of(
        cls,
        dictionary: Dictionary,
        reads: Site | Sequence[Site],
        writes: Site | Sequence[Site] | None = None,
        *,
        model: str,
        dtype: str | None = None,
        **about: Any,
    ) -> "DictionaryConfig":
        """Describe ``dictionary``: sizes and activation are taken from it, ``about`` are the other fields.

        ``writes`` is ``reads`` unless given; ``dtype`` is bfloat16 for weights in it, else float32.
        """
        into = (reads,) if isinstance(reads, Site) else tuple(reads)
        out = into if writes is None else (writes,) if isinstance(writes, Site) else tuple(writes)
        return cls(
            kind=dictionary.kind,
            activation=dictionary.activation,
            d_in=dictionary.d_in,
            d_out=dictionary.d_out,
            d_sae=dictionary.d_sae,
            dtype=dtype or ("bfloat16" if dictionary.dtype == torch.bfloat16 else "float32"),
            reads=into,
            writes=out,
            model=model,
            prefixes=dictionary.prefixes,
            **about,
        )


@dataclass(frozen=True)
class Loaded:
    """A dictionary read from files."""

    dictionary: AnyDictionary
    config: DictionaryConfig
    format: str = "gemscope"
    """Name of the format it was read from."""
    warnings: tuple[str, ...] = ()
    """What was odd, and how it was understood; one sentence each."""
