"""Which features to steer with: those that raise the chance of some next tokens most, found by trying them.

A direction that promotes a token through the final norm is often read by later layers as something else, so the
features that promise most are added to some prompts, one by one, and ordered by what happens. Judge the one chosen on
other prompts than it was chosen on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from gemscope.activations.positions import content_mask
from gemscope.artifacts.config import Loaded
from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.dictionaries.logit_effects import logit_effects
from gemscope.features.effects import directions, to_stream, writes_to_stream
from gemscope.features.index import FeatureIndex
from gemscope.features.search import Hit, hits_of, spelled
from gemscope.features.steering import Steer, interventions
from gemscope.models.gemma import Gemma
from gemscope.models.interventions import Intervention
from gemscope.models.tokens import Batch

STRENGTH = 8.0
"""In units of a feature's largest activation."""
_PROMISED = 2.0
_BLOCK = 1 << 25


@dataclass(frozen=True)
class Raised:
    """What adding a feature did to the chance that one of some tokens comes next, on average over the prompts."""

    steer: Steer
    before: float
    after: float

    @property
    def factor(self) -> float:
        """How many times as likely."""
        return self.after / max(self.before, 1e-30)


@torch.no_grad()
def chance(gemma: Gemma, prompts: Batch, tokens: Sequence[int], changes: Sequence[Intervention] = ()) -> float:
    """Mean over the prompts' content positions of the probability that one of ``tokens`` comes next."""
    logits = gemma.logits(prompts, interventions=changes)[content_mask(prompts)].float()
    return float(logits.softmax(-1)[:, torch.tensor(list(tokens), device=logits.device)].sum(-1).mean())


@torch.no_grad()
def promised(
    gemma: Gemma,
    index: FeatureIndex,
    dictionaries: Mapping[str, Loaded],
    groups: Sequence[Sequence[int]],
    prompts: Batch,
) -> dict[str, Float[Tensor, "latents groups"]]:
    """The share of the next token that each group of tokens would have, were twice a latent's largest activation added
    to the mean prediction over the prompts, through the final norm's gain.

    Of the dictionaries of one layer that write to the residual stream. Latents that were never active have their share
    without them.
    """
    mask = content_mask(prompts)
    captured = gemma.capture(prompts, ["final_in"], logits=True)
    assert captured.logits is not None
    mean = captured.logits[mask].float().softmax(-1).mean(0).clamp(min=1e-9).log()
    size = captured["final_in"][mask].float().square().mean(-1).sqrt().mean()
    gain, table = gemma.final_gain().float(), gemma.unembedding().float()
    which = [torch.tensor(list(group), device=mean.device) for group in groups]
    block, found = max(1, _BLOCK // len(table)), dict[str, Tensor]()
    for name, one in dictionaries.items():
        if name not in index.sizes or one.dictionary.n_positions > 1 or not writes_to_stream(one.config.writes[0]):
            continue
        peak = torch.from_numpy(index.latents(name).records["peak"].copy()).to(mean.device)
        parts: list[Tensor] = []
        for first in range(0, len(peak), block):
            last = min(first + block, len(peak))
            rows = to_stream(gemma, one.config.writes[0], directions(one, first, last)).float().to(mean.device)
            effects = _PROMISED * peak[first:last, None] * logit_effects(rows, gain, table) / size
            shares = (mean + effects).softmax(-1)
            parts.append(torch.stack([shares[:, ids].sum(1) for ids in which], dim=1).cpu())
        found[name] = torch.cat(parts)
    return found


def most_promising(shares: Mapping[str, Float[Tensor, " latents"]], count: int) -> list[str]:
    """Ids of the features with the largest shares, the best first."""
    every = [
        (value, name, latent)
        for name, one in shares.items()
        for value, latent in zip(*(part.tolist() for part in one.topk(min(count, len(one)))), strict=True)
    ]
    return [f"{name}/{latent}" for _, name, latent in sorted(every, key=lambda one: -one[0])[:count]]


def tried(
    gemma: Gemma,
    dictionaries: Mapping[str, Loaded],
    steers: Sequence[Steer],
    tokens: Sequence[int],
    prompts: Batch,
) -> list[Raised]:
    """Each change made everywhere in the prompts, by itself; the one that raises the tokens most first."""
    before = chance(gemma, prompts, tokens)
    found = [
        Raised(one, before, chance(gemma, prompts, tokens, interventions(dictionaries, [one], None))) for one in steers
    ]
    return sorted(found, key=lambda one: -one.after)


def best_to_steer(
    gemma: Gemma,
    index: FeatureIndex,
    dictionaries: Mapping[str, Loaded],
    tokens: Sequence[int],
    prompts: Sequence[str],
    *,
    count: int = 12,
    strength: float = STRENGTH,
) -> list[Raised]:
    """Features that raise the chance of ``tokens`` most when added, the best first, of the ``count`` that promise most.

    Raises InputError without tokens or prompts, or where no dictionary of the index writes to the residual stream.
    """
    if not tokens or not prompts:
        raise InputError("features are tried on at least one prompt, for at least one token; give some.")
    batch = gemma.batch([gemma.tokens(text) for text in prompts])
    shares = {name: one[:, 0] for name, one in promised(gemma, index, dictionaries, [tokens], batch).items()}
    if not shares:
        raise InputError("no dictionary of one layer writes to the residual stream; index one that does.")
    active = {name: one.masked_fill(_never(index, name), 0) for name, one in shares.items()}
    steers = [Steer.of(index, feature) for feature in most_promising(active, count)]
    return tried(gemma, dictionaries, [replace(one, strength=strength) for one in steers], tokens, batch)


def by_effect(
    index: FeatureIndex,
    gemma: Gemma,
    dictionaries: Mapping[str, Loaded],
    token: str,
    prompts: Sequence[str],
    top: int = 10,
) -> list[Hit]:
    """Features that, added at ``STRENGTH`` to the prompts, raise the chance of a token most; the score says how many
    times as likely it is. Twice ``top`` are tried. Raises the errors of ``best_to_steer``, and InputError when no token
    is spelled so.
    """
    found = best_to_steer(gemma, index, dictionaries, spelled(index, token), prompts, count=2 * top)
    return hits_of(index, [(index.firsts[one.steer.dictionary] + one.steer.latent, one.factor) for one in found[:top]])


def _never(index: FeatureIndex, name: str) -> Tensor:
    return torch.from_numpy(index.latents(name).records["peak"] == 0)
