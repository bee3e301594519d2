"""One released dictionary: where it lies, what it reads and writes, how large it is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

from gemscope.core.sites import Site

Kind = Literal["sae", "transcoder", "skip_transcoder", "crosscoder", "clt"]

Standing = Literal["registered", "quoted", "announced", "unregistered"]
"""How certain it is that an artefact is on the hub under this name.

``registered``: SAELens' registry lists it. ``quoted``: no registry lists it, but its path or its config.json is quoted
in published code. ``announced``: the paper's table has it and the folder rule gives its name; nobody quotes it.
``unregistered``: the rule gives it, but the registry, which lists its siblings, lacks it; it may be missing on the hub
too.
"""

Pick = Literal["canonical", "only"]
"""How the last folder of a Gemma Scope 1 path is found on the hub: the L0 next to 100, or the only one there is."""

KINDS: tuple[Kind, ...] = ("sae", "transcoder", "skip_transcoder", "crosscoder", "clt")
WIDTHS: dict[str, int] = {
    name: 1 << power
    for name, power in (("4k", 12), ("16k", 14), ("32k", 15), ("65k", 16), ("131k", 17), ("262k", 18), ("524k", 19))
} | {"1m": 1 << 20}
"""The widths of folder names; each is a power of two."""

CONFIG = "config.json"
EXAMPLES = "examples.safetensors"


@dataclass(frozen=True)
class Artifact:
    """A released dictionary; ``files`` and ``size`` follow from the rest."""

    name: str
    """Short and unique: the repository without its owner, then the folder."""
    suite: Literal["gemma-scope-1", "gemma-scope-2"]
    repo: str
    """Hub repository, ``owner/name``."""
    folder: str
    """Folder in the repository; with ``pick``, the folder whose sub-folder is to be found on the hub."""
    model: str
    """Hub id of the model it was trained on."""
    category: str
    """Gemma Scope 2: the top folder of the repository. Gemma Scope 1: ``res``, ``mlp``, ``att`` or ``transcoders``."""
    kind: Kind
    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    width_name: str
    """As in folder names: ``65k``."""
    width: int
    """Exact number in the folder's name: latents, for crosscoders and CLTs over all layers together."""
    d_in: int
    d_out: int
    d_sae: int
    """Latents of each encoder: ``width``, or its share per layer."""
    l0_name: str
    """``small``, ``medium``, ``big``; Gemma Scope 1: ``canonical``, or the number in the folder's name."""
    l0: int | None
    """Gemma Scope 2: the target of training. Gemma Scope 1: the measured mean in the folder's name, if known."""
    standing: Standing
    seed: int = 0
    """0, or 1 for a variant trained from another seed."""
    pick: Pick | None = None
    saelens: tuple[str, str] | None = None
    """Release and id in SAELens' registry."""
    neuronpedia: str | None = None
    """Model and source on Neuronpedia: ``gemma-3-1b/22-gemmascope-2-res-65k``."""
    note: str = ""
    """What is not certain about the values above."""

    @property
    def affine(self) -> bool:
        """Whether it has an affine skip connection: always for skip transcoders, CLTs by their name."""
        return self.kind == "skip_transcoder" or self.folder.endswith("_affine")

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers it reads; empty for the embedding."""
        return tuple(site.layer for site in self.reads if site.layer is not None)

    @cached_property
    def tensors(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Weights file -> tensor -> shape; all fp32."""
        if self.kind in ("crosscoder", "clt"):
            return {f"params_layer_{i}.safetensors": self._of_a_layer() for i in range(len(self.reads))}
        encoder, decoder = (self.d_in, self.d_sae), (self.d_sae, self.d_out)
        if self.suite == "gemma-scope-1":
            lone = {"b_enc": (self.d_sae,), "b_dec": (self.d_out,), "threshold": (self.d_sae,)}
            return {"params.npz": {"W_enc": encoder, "W_dec": decoder, **lone}}
        shapes = {"w_enc": encoder, "b_enc": (self.d_sae,), "threshold": (self.d_sae,), "w_dec": decoder}
        skip = {"affine_skip_connection": (self.d_in, self.d_out)} if self.affine else {}
        return {"params.safetensors": {**shapes, "b_dec": (self.d_out,), **skip}}

    def _of_a_layer(self) -> dict[str, tuple[int, ...]]:
        skip = {"affine_skip_connection": (self.d_in, self.d_out)} if self.affine else {}
        return {
            "w_enc": (self.d_in, self.d_sae),
            "b_enc": (self.d_sae,),
            "threshold": (self.d_sae,),
            "w_dec": (self.d_sae, len(self.reads), self.d_out),
            "b_dec": (self.d_out,),
            **skip,
        }

    @property
    def files(self) -> tuple[str, ...]:
        """The files without which it cannot be read."""
        return tuple(self.tensors)

    @property
    def optional_files(self) -> tuple[str, ...]:
        """Small files that are fetched when they are there."""
        return () if self.suite == "gemma-scope-1" else (CONFIG,)

    @property
    def size(self) -> int:
        """Bytes of all tensors; a file's header adds less than a kilobyte."""
        return sum(4 * prod(shape) for shapes in self.tensors.values() for shape in shapes.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {
            "reads": [str(site) for site in self.reads],
            "writes": [str(site) for site in self.writes],
            "saelens": None if self.saelens is None else list(self.saelens),
            "affine": self.affine,
            "layers": list(self.layers),
            "files": list(self.files),
            "size": self.size,
        }
