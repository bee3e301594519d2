"""The evidence that Gemma Scope 2 ships beside most dictionaries: ``examples.safetensors``.

For every latent its strongest activations with the sequences they occurred in, its density, and the tokens it promotes
and suppresses. The file is larger than the weights (800 MB for 16k latents), so only the rows asked for are read.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from gemscope.artifacts.reading import Axes, check_names, check_shapes, shapes_of
from gemscope.core.arrays import Float, Int, Tensor
from gemscope.core.errors import FormatError, InputError
from gemscope.core.tensor_files import TensorFile

FILE = "examples.safetensors"

LAYOUT: dict[str, Axes] = {
    "activations": ("d_sae", "kept"),
    "seq_ids": ("d_sae", "kept"),
    "positions": ("d_sae", "kept"),
    "logit_effects": ("d_sae", "kept"),
    "top_logits": ("d_sae", "shown"),
    "bottom_logits": ("d_sae", "shown"),
    "top_tokens": ("d_sae", "shown"),
    "bottom_tokens": ("d_sae", "shown"),
    "feature_frequencies": ("d_sae",),
    "tokens": ("sequences", "pos"),
}
"""Tensors of ``examples.safetensors``; ``seq_ids`` is -1 where a latent has fewer than ``kept`` examples."""

_INTEGERS = ("seq_ids", "positions", "top_tokens", "bottom_tokens", "tokens")


@dataclass(frozen=True, eq=False)
class LatentExamples:
    """What the file says of one latent, strongest first."""

    latent: int
    density: float
    """Share of tokens on which it is active."""
    activations: Float[Tensor, " examples"]
    tokens: Int[Tensor, "examples pos"]
    """The whole sequence of each example, as token ids."""
    positions: Int[Tensor, " examples"]
    """Where in its sequence each activation is."""
    promoted: tuple[tuple[int, float], ...]
    """Token ids with the largest logit effects."""
    suppressed: tuple[tuple[int, float], ...]
    """Token ids with the smallest."""


@dataclass(frozen=True)
class Examples:
    """An ``examples.safetensors``; made by ``Examples.open``, which reads its header only."""

    path: Path
    d_sae: int
    kept: int
    """Examples per latent at most."""
    sequences: int
    pos: int
    """Tokens per sequence."""

    @classmethod
    def open(cls, folder: Path | str) -> "Examples":
        """The evidence in a dictionary's folder; raises FormatError when it is missing or damaged."""
        path = Path(folder) / FILE
        with TensorFile(path) as file:
            check_names(shapes_of(file), LAYOUT, (), path)
            sizes = check_shapes(shapes_of(file), LAYOUT, path)
            for name, entry in file.entries.items():
                if entry.dtype.is_floating_point == (name in _INTEGERS) or entry.dtype == torch.bool:
                    wanted = "whole numbers" if name in _INTEGERS else "floats"
                    raise FormatError(f"{name} in {path} is {entry.dtype}, but it should be {wanted}; fetch it again.")
        return cls(path, sizes["d_sae"], sizes["kept"], sizes["sequences"], sizes["pos"])

    def of(self, latent: int, top: int = 20) -> LatentExamples:
        """The ``top`` strongest examples of one latent; raises InputError for one that does not exist, FormatError for
        a sequence or position that does not.
        """
        if not 0 <= latent < self.d_sae:
            raise InputError(f"there is no latent {latent}; {self.path} has latents 0 to {self.d_sae - 1}.")
        with TensorFile(self.path) as file:
            row = {name: _row(file, name, latent) for name in LAYOUT if name != "tokens"}
            found = (row["seq_ids"] >= 0).nonzero()[:, 0]
            order = row["activations"][found].double().argsort(descending=True, stable=True)[:top]
            chosen = found[order]
            sequences, positions = row["seq_ids"][chosen].long(), row["positions"][chosen].long()
            if bool((sequences >= self.sequences).any()) or bool(((positions < 0) | (positions >= self.pos)).any()):
                raise FormatError(f"latent {latent} in {self.path} points outside its sequences; fetch it again.")
            rows = [file.block("tokens", at, at + 1).long() for at in sequences.tolist()]
            tokens = torch.cat(rows) if rows else torch.empty(0, self.pos, dtype=torch.long)
        return LatentExamples(
            latent,
            float(row["feature_frequencies"]),
            row["activations"][chosen].float(),
            tokens,
            positions,
            _pairs(row["top_tokens"], row["top_logits"]),
            _pairs(row["bottom_tokens"], row["bottom_logits"]),
        )


def _row(file: TensorFile, name: str, latent: int) -> Tensor:
    """What a tensor says of one latent: a vector, or one number."""
    if len(file.entry(name).shape) == 1:
        return file.read(name)[latent]
    return file.block(name, latent, latent + 1)[0]


def _pairs(tokens: Tensor, logits: Tensor) -> tuple[tuple[int, float], ...]:
    return tuple(zip(tokens.tolist(), logits.tolist(), strict=True))
