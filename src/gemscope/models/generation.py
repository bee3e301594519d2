"""Generating token by token over the model's forward pass, with interventions, with or without a key/value
cache.

Notable: each item samples with its own random stream, so its text does not depend on what else is in the
batch. When patterns are changed the cache of the local layers is kept whole, so that column j is token j in
every layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import DynamicCache

from gemscope.core.arrays import Float, Int, Tensor
from gemscope.core.errors import ContextLengthError, InputError
from gemscope.models.forward import Pass, lock_of, run
from gemscope.models.freeze import FreezePatterns
from gemscope.models.interventions import Intervention, SiteEdit
from gemscope.models.layout import Decoder
from gemscope.models.positions import Moment
from gemscope.models.tokens import Batch, Tokens


@dataclass(frozen=True, eq=False)
class Generation:
    """One generated continuation."""

    text: str
    """What was generated, without the token that ended it."""
    ids: Int[Tensor, "new"]
    """Its tokens, without the one that ended it."""
    prompt: Tokens
    tokens: Tokens
    """Prompt and continuation together, ready to be captured."""
    finish: Literal["stop", "length"]
    """``stop``: the model ended it (end of text or of turn). ``length``: max_new_tokens were reached."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0: the most likely token; above 0: a draw from softmax(logits / temperature)."""
    seed: int | None = None
    """Seed of the draws; item i of a batch uses seed + i. None: a seed from torch's global generator."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"temperature {self.temperature} is negative; use 0 for greedy, above 0 to sample.")

    def streams(self, n: int) -> list[torch.Generator]:
        """One random stream an item."""
        seed = int(torch.randint(2**31, ())) if self.seed is None else self.seed
        return [torch.Generator().manual_seed(seed + i) for i in range(n)]

    def choose(self, logits: Float[Tensor, "batch vocab"], streams: Sequence[torch.Generator]) -> Int[Tensor, "batch"]:
        """The next token of each item."""
        if self.temperature == 0:
            return logits.argmax(dim=-1).cpu()
        chances = torch.softmax(logits.float() / self.temperature, dim=-1).cpu()
        draws = [torch.multinomial(row, 1, generator=g) for row, g in zip(chances, streams, strict=True)]
        return torch.cat(draws)


def steps(
    decoder: Decoder,
    batch: Batch,
    *,
    max_new_tokens: int,
    interventions: Sequence[Intervention],
    sampling: Sampling,
    cache: bool,
) -> Iterator[Int[Tensor, "batch"]]:
    """The next token of every item, again and again; runs until the caller stops or max_new_tokens are out.

    ``batch`` must be padded on the left. Raises ContextLengthError when the longest result would not fit.
    """
    assert batch.side == "left"
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; ask for at least 1.")
    n, longest = batch.ids.shape[0], int(batch.lengths.max())
    if longest + max_new_tokens > decoder.shape.context:
        raise ContextLengthError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of"
            f" {decoder.shape.context}; shorten the prompt or ask for fewer tokens."
        )
    device = next(decoder.trunk.parameters()).device
    ids, mask, start = batch.ids.to(device), batch.mask, 0
    past, streams = _cache(decoder, interventions) if cache else None, sampling.streams(n)
    for _ in range(max_new_tokens):
        moment = Moment(batch, start, ids.shape[1], generating=True)
        this = Pass(moment, ids[:, start:], mask, interventions=interventions, final=True, past=past)
        _, last = run(decoder, this)
        assert last is not None
        with lock_of(decoder.trunk), torch.no_grad():
            logits = decoder.unembed(last[:, -1])
        chosen = sampling.choose(logits, streams)
        yield chosen
        ids = torch.cat([ids, chosen[:, None].to(device)], dim=1)
        mask = torch.cat([mask, torch.ones(n, 1, dtype=torch.bool)], dim=1)
        start = ids.shape[1] - 1 if cache else 0


def until_stopped(
    stream: Iterator[Int[Tensor, "batch"]], n: int, stop_ids: frozenset[int]
) -> list[tuple[list[int], bool]]:
    """For each of ``n`` items its new tokens up to a stop token, and whether one came."""
    ids: list[list[int]] = [[] for _ in range(n)]
    stopped = [False] * n
    for chosen in stream:
        for i, token in enumerate(chosen.tolist()):
            if stopped[i]:
                continue
            if token in stop_ids:
                stopped[i] = True
            else:
                ids[i].append(token)
        if all(stopped):
            break
    return list(zip(ids, stopped, strict=True))


def _cache(decoder: Decoder, interventions: Sequence[Intervention]) -> DynamicCache:
    """A cache; local layers keep only their window unless patterns are changed."""
    whole = any(
        isinstance(i, FreezePatterns) or (isinstance(i, SiteEdit) and i.place.name == "pattern") for i in interventions
    )
    return DynamicCache() if whole else DynamicCache(config=decoder.config)
