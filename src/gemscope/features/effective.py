"""Which features to steer with, and how strongly: those that raise the chance of some next tokens most, found by
trying them.

A direction that promotes a token through the final norm is often read by later layers as something else, so of every
dictionary the features that promise most, by the final norm or by the gradient of the tokens' log-probability, are
added to some prompts one by one, and ordered by what happens. Judge the one chosen on other prompts than it was chosen
on, beside random latents with as large a push.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from gemscope.activations.positions import content_mask
from gemscope.artifacts.config import Loaded
from gemscope.core.arrays import Float, Int, Tensor
from gemscope.core.errors import InputError
from gemscope.dictionaries.logit_effects import logit_effects
from gemscope.features.effects import directions, stream_directions, writes_to_stream
from gemscope.features.index import FeatureIndex
from gemscope.features.passing import check_widths
from gemscope.features.search import Hit, hits_of, indexed, spelled
from gemscope.features.steering import Steer, interventions
from gemscope.models.gemma import Gemma
from gemscope.models.interventions import Intervention
from gemscope.models.tokens import Batch, Tokens

STRENGTHS = (2.0, 3.0, 4.0, 6.0, 8.0)
"""In units of a feature's largest activation."""
EACH = 4
"""Features of a dictionary that are tried for what they promise, in either way."""
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


def _last(prompts: Batch) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Where each prompt ends."""
    return torch.arange(len(prompts.items)), (prompts.first + prompts.lengths - 1).flatten()


def _log_chances(gemma: Gemma, last: Float[Tensor, "batch d_model"], tokens: Sequence[int]) -> Float[Tensor, " batch"]:
    scores = gemma.unembed(last).float().log_softmax(-1)
    return scores[:, torch.tensor(list(tokens), device=scores.device)].logsumexp(-1)


@torch.no_grad()
def chance(gemma: Gemma, prompts: Batch, tokens: Sequence[int], changes: Sequence[Intervention] = ()) -> float:
    """Mean over the prompts of the probability that one of ``tokens`` comes next."""
    stream = gemma.capture(prompts, ["final_in"], interventions=changes)["final_in"]
    return float(_log_chances(gemma, stream[_last(prompts)], tokens).exp().mean())


def _candidates(index: FeatureIndex, dictionaries: Mapping[str, Loaded]) -> dict[str, Loaded]:
    """Dictionaries of one layer that write to the residual stream."""
    return {
        name: one
        for name, one in indexed(index, dictionaries).items()
        if one.dictionary.n_positions == 1 and writes_to_stream(one.config.writes[0])
    }


def _peaks(index: FeatureIndex, name: str) -> Float[Tensor, " latents"]:
    return torch.from_numpy(index.latents(name).records["peak"].copy()).float()


@torch.no_grad()
def promised(
    gemma: Gemma, index: FeatureIndex, dictionaries: Mapping[str, Loaded], tokens: Sequence[int], prompts: Batch
) -> dict[str, Float[Tensor, " latents"]]:
    """The share of the next token that ``tokens`` would have, were twice a latent's largest activation added to the
    mean prediction at the prompts' ends, through the final norm's gain.

    Latents that were never active have the share without them.
    """
    stream = gemma.capture(prompts, ["final_in"])["final_in"][_last(prompts)]
    mean = gemma.unembed(stream).float().softmax(-1).mean(0).clamp(min=1e-9).log()
    size = stream.float().square().mean(-1).sqrt().mean()
    gain, table = gemma.final_gain().float(), gemma.unembedding().float()
    which = torch.tensor(list(tokens), device=mean.device)
    block, found = max(1, _BLOCK // len(table)), dict[str, Tensor]()
    for name, one in _candidates(index, dictionaries).items():
        peak, parts = _peaks(index, name).to(mean.device), list[Tensor]()
        for first in range(0, len(peak), block):
            last = min(first + block, len(peak))
            rows = stream_directions(gemma, one, first, last).to(mean.device)
            effects = _PROMISED * peak[first:last, None] * logit_effects(rows, gain, table) / size
            parts.append((mean + effects).softmax(-1)[:, which].sum(1).cpu())
        found[name] = torch.cat(parts)
    return found


def slopes(
    gemma: Gemma, index: FeatureIndex, dictionaries: Mapping[str, Loaded], tokens: Sequence[int], prompts: Batch
) -> dict[str, Float[Tensor, " latents"]]:
    """How fast the log-probability of ``tokens`` after the prompts rises with the strength at which a latent is added
    to their content: the gradient at strength 0, mean over the prompts, through all later layers.
    """
    chosen = _candidates(index, dictionaries)
    sites = {name: one.config.writes[0] for name, one in chosen.items()}
    with torch.enable_grad():
        captured = gemma.capture(prompts, [*sites.values(), "final_in"], grad=True)
        value = _log_chances(gemma, captured["final_in"][_last(prompts)], tokens).mean()
        unique = list(dict.fromkeys(sites.values()))
        gradients = torch.autograd.grad(value, [captured[site] for site in unique])
    mask = content_mask(prompts)
    summed = {site: one[mask].float().sum(0) for site, one in zip(unique, gradients, strict=True)}
    found = dict[str, Tensor]()
    for name, one in chosen.items():
        rows = directions(one, 0, one.dictionary.n_latents).float()
        found[name] = _peaks(index, name) * (rows @ summed[sites[name]].to(rows.device)).cpu()
    return found


def shortlist(
    gemma: Gemma,
    index: FeatureIndex,
    dictionaries: Mapping[str, Loaded],
    tokens: Sequence[int],
    prompts: Batch,
    each: int = EACH,
) -> list[Steer]:
    """Features worth trying: of every dictionary the ``each`` that promise most and the ``each`` with the steepest
    slopes, of those that were ever active.

    The promises of two layers do not compare, so none is left out for the promises of another.
    """
    ways = [way(gemma, index, dictionaries, tokens, prompts) for way in (promised, slopes)]
    found = dict[str, None]()
    for name in ways[0]:
        never = _peaks(index, name) == 0
        for values in ways:
            best = values[name].masked_fill(never, -torch.inf).topk(min(each, int((~never).sum())))
            found |= dict.fromkeys(f"{name}/{latent}" for latent in best.indices.tolist())
    return [Steer.of(index, feature) for feature in found]


def tried(
    gemma: Gemma,
    dictionaries: Mapping[str, Loaded],
    steers: Sequence[Steer],
    tokens: Sequence[int],
    prompts: Batch,
) -> list[Raised]:
    """Each change made in the prompts' content, by itself; the one that raises the tokens most first."""
    before = chance(gemma, prompts, tokens)
    found = [
        Raised(one, before, chance(gemma, prompts, tokens, interventions(dictionaries, [one], "content", "prefill")))
        for one in steers
    ]
    return sorted(found, key=lambda one: -one.after)


def best_to_steer(
    gemma: Gemma,
    index: FeatureIndex,
    dictionaries: Mapping[str, Loaded],
    tokens: Sequence[int],
    prompts: Sequence[str | Tokens],
    *,
    each: int = EACH,
    count: int = 6,
    strengths: Sequence[float] = STRENGTHS,
) -> list[Raised]:
    """Features that raise the chance of ``tokens`` after the prompts most when added, each with the strength that does
    so, the best first.

    The shortlist is tried at the middle strength, and the ``count`` best of it at all. Raises InputError without tokens
    or prompts, for a dictionary of another width than the model's, or where none of the index writes to the residual
    stream.
    """
    if not tokens or not prompts or not strengths:
        raise InputError("features are tried on at least one prompt, for at least one token; give some.")
    candidates = _candidates(index, dictionaries)
    if not candidates:
        raise InputError("no dictionary of one layer writes to the residual stream; index one that does.")
    check_widths(gemma, candidates)
    batch = gemma.batch([gemma.tokens(text) if isinstance(text, str) else text for text in prompts])
    listed = shortlist(gemma, index, dictionaries, tokens, batch, each)
    middle = sorted(strengths)[len(strengths) // 2]
    first = tried(gemma, dictionaries, [replace(one, strength=middle) for one in listed], tokens, batch)[:count]
    more = [replace(one.steer, strength=other) for one in first for other in strengths if other != middle]
    found = [*first, *tried(gemma, dictionaries, more, tokens, batch)]
    best = dict[tuple[str, int], Raised]()
    for one in sorted(found, key=lambda one: (-one.after, one.steer.strength)):
        best.setdefault((one.steer.dictionary, one.steer.latent), one)
    return list(best.values())


def by_effect(
    index: FeatureIndex,
    gemma: Gemma,
    dictionaries: Mapping[str, Loaded],
    token: str,
    prompts: Sequence[str],
    top: int = 10,
) -> list[Hit]:
    """Features that, added to the prompts, raise the chance that a token comes next most, with the strength that does;
    the score says how many times as likely it is. Raises the errors of ``best_to_steer``, and InputError when no token
    is spelled so.
    """
    found = best_to_steer(gemma, index, dictionaries, spelled(index, token), prompts, each=max(EACH, top), count=top)
    hits = hits_of(index, [(index.firsts[one.steer.dictionary] + one.steer.latent, one.factor) for one in found])
    return [replace(hit, strength=one.steer.strength) for hit, one in zip(hits, found, strict=True)]
