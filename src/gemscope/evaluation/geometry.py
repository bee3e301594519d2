"""The weights of a dictionary: what can be said without any text.

A latent's decoder is everything it writes, at all positions one after the other; its encoder what it reads at its own.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from gemscope.artifacts.config import AnyDictionary
from gemscope.core.arrays import Float, Tensor
from gemscope.dictionaries.multilayer import MultiLayer

DUPLICATE = 0.95
"""Two latents are duplicates when their decoders have a cosine above this."""

MOST = 1 << 16
"""Dictionaries with more latents are compared with the first so many of them only."""

_BLOCK = 2048


@dataclass(frozen=True)
class Geometry:
    """One entry per latent, in the order of their indices, and summaries."""

    encoder_norm: tuple[float, ...]
    encoder_bias: tuple[float, ...]
    decoder_norm: tuple[float, ...]
    encoder_decoder_cosine: tuple[float, ...]
    """With what it writes at the position it reads; empty when the widths differ."""
    max_decoder_cosine: tuple[float, ...]
    """Largest cosine with the decoder of another latent."""
    max_encoder_cosine: tuple[float, ...]
    """Largest cosine with the encoder of another latent of the same position."""
    duplicates: int
    """Latents with another one above ``DUPLICATE``."""
    effective_rank: float
    """exp of the entropy of the unit decoders' squared singular values: how many directions they spread over
    (Roy and Vetterli 2007).
    """

    @property
    def mean_max_decoder_cosine(self) -> float:
        """Mean of ``max_decoder_cosine``."""
        return sum(self.max_decoder_cosine) / len(self.max_decoder_cosine)

    @property
    def mean_max_encoder_cosine(self) -> float:
        """Mean of ``max_encoder_cosine``."""
        return sum(self.max_encoder_cosine) / len(self.max_encoder_cosine)


@torch.no_grad()
def geometry(dictionary: AnyDictionary) -> Geometry:
    """Measured in the dictionary's own computing precision."""
    encoders, biases, decoders, own = _weights(dictionary)
    rows, width = torch.cat(encoders), torch.cat(decoders)
    unit = normalize(width, dim=1)
    nearest = _nearest(unit)
    cosine = (
        torch.cosine_similarity(rows, torch.cat(own), dim=1) if own[0].shape[1] == rows.shape[1] else rows.new_zeros(0)
    )
    squares = torch.linalg.eigvalsh(unit.double().T @ unit.double()).clamp_min(0.0)
    share = squares / squares.sum().clamp_min(1e-300)
    return Geometry(
        encoder_norm=_numbers(rows.norm(dim=1)),
        encoder_bias=_numbers(torch.cat(biases)),
        decoder_norm=_numbers(width.norm(dim=1)),
        encoder_decoder_cosine=_numbers(cosine),
        max_decoder_cosine=_numbers(nearest),
        max_encoder_cosine=_numbers(torch.cat([_nearest(normalize(part, dim=1)) for part in encoders])),
        duplicates=int((nearest > DUPLICATE).sum()),
        effective_rank=float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum())),
    )


def _weights(dictionary: AnyDictionary) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Per position: encoder rows, biases, decoders over all positions, decoders at the own position."""
    dtype = dictionary.compute_dtype
    if not isinstance(dictionary, MultiLayer):
        W_dec = dictionary.W_dec.to(dtype)
        return [dictionary.W_enc.T.to(dtype)], [dictionary.b_enc.to(dtype)], [W_dec], [W_dec]
    n = dictionary.n_positions
    decoders: list[Tensor] = []
    for at in range(n):
        table = dictionary.W_dec[at].to(dtype)
        nothing = table.new_zeros(at, *table.shape[1:])
        decoders.append(torch.cat([nothing, table]).transpose(0, 1).flatten(1))
    encoders = [dictionary.W_enc[at].T.to(dtype) for at in range(n)]
    return (
        encoders,
        [b.to(dtype) for b in dictionary.b_enc],
        decoders,
        [dictionary.W_dec[at][0].to(dtype) for at in range(n)],
    )


def _nearest(unit: Float[Tensor, "latents width"]) -> Float[Tensor, " latents"]:
    """Largest cosine of each row with another one; 0 for a row on its own."""
    found = unit.new_zeros(len(unit))
    if len(unit) < 2:
        return found
    for start in range(0, len(unit), _BLOCK):
        cosines = unit[start : start + _BLOCK] @ unit[:MOST].T
        own = torch.arange(start, min(start + _BLOCK, len(unit)), device=unit.device)
        inside = own < cosines.shape[1]
        cosines[(own - start)[inside], own[inside]] = -1.0
        found[start : start + _BLOCK] = cosines.max(1).values
    return found


def _numbers(values: Float[Tensor, " latents"]) -> tuple[float, ...]:
    return tuple(values.double().cpu().tolist())
