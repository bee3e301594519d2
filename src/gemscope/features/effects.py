"""What is known of a latent without its activations: the tokens it promotes, the latents that point where it does; and
its partners, from the tokens that were sampled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from gemscope.artifacts.config import Loaded
from gemscope.core.arrays import Float, Int, Tensor
from gemscope.core.sites import SITE_KINDS, Site
from gemscope.dictionaries.logit_effects import logit_effects
from gemscope.dictionaries.multilayer import MultiLayer
from gemscope.dictionaries.single import SingleLayer
from gemscope.models.gemma import Gemma

_BLOCK = 1 << 25
"""Numbers of a block of logit effects, cosines or counts."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """The k best of something for each latent, the best first; -1 where there are fewer."""

    ids: Int[Tensor, "latents k"]
    values: Float[Tensor, "latents k"]


def directions(loaded: Loaded, first: int, last: int, out: int | None = None) -> Float[Tensor, "latents d_out"]:
    """What latents ``first`` to ``last`` - 1 write per unit of activation.

    Of a multi-layer kind: to output ``out``, zero where they do not write there; None: all that a CLT's latent writes
    to the stream, and what a crosscoder's writes to the last layer, which is what is left of it there.
    """
    dictionary = loaded.dictionary
    if isinstance(dictionary, SingleLayer):
        return dictionary.W_dec[first:last].to(dictionary.compute_dtype)
    found = dictionary.W_dec[0].new_zeros(last - first, dictionary.d_out, dtype=dictionary.compute_dtype)
    for latent, at, rows in _by_layer(dictionary, first, last):
        for one, _ in _outputs(loaded, out):
            if one >= latent:
                found[rows] += dictionary.W_dec[latent][one - latent, at].to(found.dtype)
    return found


def _outputs(loaded: Loaded, out: int | None) -> list[tuple[int, Site]]:
    """The outputs whose directions are summed, each with the site it writes to."""
    last = loaded.dictionary.n_positions - 1
    chosen = [out] if out is not None else range(last + 1) if loaded.config.kind == "clt" else [last]
    return [(one, loaded.config.writes[one]) for one in chosen]


def _by_layer(dictionary: MultiLayer, first: int, last: int) -> list[tuple[int, slice, slice]]:
    """(layer, latents of that layer, rows of the result) for a range of latents over all layers."""
    d_sae, found = dictionary.d_sae, list[tuple[int, slice, slice]]()
    for layer in range(first // d_sae, -(-last // d_sae)):
        low, high = max(first, layer * d_sae), min(last, (layer + 1) * d_sae)
        found.append((layer, slice(low - layer * d_sae, high - layer * d_sae), slice(low - first, high - first)))
    return found


def writes_to_stream(site: Site) -> bool:
    """Whether what is written at a site is, or is added to, the residual stream."""
    return site.name in ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "final_in", "z")


def stream_directions(
    gemma: Gemma, loaded: Loaded, first: int, last: int, out: int | None = None
) -> Float[Tensor, "latents d_model"]:
    """``directions`` in the residual stream, float32: every output through its own site before they are summed."""
    parts = (_to_stream(gemma, site, directions(loaded, first, last, one)) for one, site in _outputs(loaded, out))
    return reduce(torch.add, parts).float()


def _to_stream(gemma: Gemma, site: Site, x: Float[Tensor, "latents width"]) -> Float[Tensor, "latents d_model"]:
    """The direction in the residual stream of one at ``site``: for ``z``, through the output projection and the gain of
    the norm behind it (the norm's own scale, one positive number, is left out).
    """
    if site.name != "z":
        return x
    layer = gemma.decoder.trunk.get_submodule(f"layers.{site.layer}")
    weight = layer.get_submodule("self_attn.o_proj").get_parameter("weight")
    gain = 1.0 + layer.get_submodule("post_attention_layernorm").get_parameter("weight").float()
    return (x @ weight.to(x.device, x.dtype).T) * gain.to(x.device, x.dtype)


@torch.no_grad()
def promoted(gemma: Gemma, loaded: Loaded, k: int, out: int | None = None) -> tuple[Ranked, Ranked] | None:
    """(tokens whose logits rise most, those whose logits fall most) per unit of activation, through the final norm's
    gain; None where the dictionary does not write to the residual stream.
    """
    dictionary = loaded.dictionary
    if not all(writes_to_stream(site) for _, site in _outputs(loaded, out)):
        return None
    device = next(dictionary.parameters()).device
    gain, table = gemma.final_gain().to(device), gemma.unembedding().to(device, torch.float32)
    k, block = min(k, len(table)), max(1, _BLOCK // len(table))
    best: list[tuple[Tensor, Tensor]] = []
    worst: list[tuple[Tensor, Tensor]] = []
    for first in range(0, dictionary.n_latents, block):
        last = min(first + block, dictionary.n_latents)
        effects = logit_effects(stream_directions(gemma, loaded, first, last, out), gain, table)
        for into, largest in ((best, True), (worst, False)):
            found = effects.topk(k, dim=1, largest=largest)
            into.append((found.values, found.indices))
    return _ranked(best), _ranked(worst)


def _ranked(parts: Sequence[tuple[Tensor, Tensor]]) -> Ranked:
    values, ids = (torch.cat(column) for column in zip(*parts, strict=True))
    return Ranked(ids.int().cpu(), values.float().cpu())


@torch.no_grad()
def nearest(
    loaded: Loaded, others: Mapping[int, Loaded], k: int, *, same: bool
) -> tuple[Ranked, Int[Tensor, "latents k"]]:
    """(latents of ``others`` with the largest decoder cosine, the dictionary of each by its key in ``others``).

    With ``same``, ``others`` is the dictionary itself and no latent is its own neighbour. Dictionaries that write
    vectors of another width have none.
    """
    count = loaded.dictionary.n_latents
    values = torch.full((count, k), -2.0)
    ids, which = torch.full((count, k), -1), torch.full((count, k), -1)
    for number, other in others.items():
        if _space(other) != _space(loaded):
            continue
        block = max(1, _BLOCK // other.dictionary.n_latents)
        theirs = _unit(other, 0, other.dictionary.n_latents)
        for first in range(0, count, block):
            last = min(first + block, count)
            cosines = _unit(loaded, first, last) @ theirs.T
            if same:
                cosines[torch.arange(last - first), torch.arange(first, last)] = -2.0
            found = cosines.topk(min(k, cosines.shape[1]), dim=1)
            both = torch.cat([values[first:last], found.values.cpu()], dim=1)
            best = both.topk(k, dim=1)
            both_ids = torch.cat([ids[first:last], found.indices.cpu()], dim=1)
            both_which = torch.cat([which[first:last], torch.full_like(found.indices.cpu(), number)], dim=1)
            values[first:last] = best.values
            ids[first:last] = both_ids.gather(1, best.indices)
            which[first:last] = both_which.gather(1, best.indices)
    gone = values < -1.5
    return Ranked(ids.masked_fill(gone, -1).int(), values.masked_fill(gone, 0.0)), which.masked_fill(gone, -1).int()


def _space(loaded: Loaded) -> tuple[str, int]:
    """Vectors in one space can be compared: the residual stream, or else the same sites of the same layers."""
    sites = [site for _, site in _outputs(loaded, None)]
    if all(writes_to_stream(site) and site.name != "z" for site in sites):
        return SITE_KINDS[sites[0].name].width, loaded.dictionary.d_out
    return " ".join(map(str, sites)), loaded.dictionary.d_out


def _unit(loaded: Loaded, first: int, last: int) -> Float[Tensor, "latents d_out"]:
    rows = directions(loaded, first, last).float()
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)


def partners(
    place: Int[Tensor, " entries"], latent: Int[Tensor, " entries"], latents: int, k: int
) -> tuple[Ranked, Int[Tensor, "latents k"]]:
    """(latents with the largest Jaccard index, tokens on which both are active), from some tokens' active latents.

    Jaccard: tokens with both over tokens with either; of equal ones the lower latent.
    """
    rows = torch.unique_consecutive(place, return_inverse=True)[1]
    by_latent = latent.argsort(stable=True)
    count = torch.bincount(latent, minlength=latents)
    row_count = torch.bincount(rows) if len(rows) else torch.zeros(0, dtype=torch.int64)
    row_start = row_count.cumsum(0) - row_count
    ends = count.cumsum(0)
    ids, joint = torch.full((latents, k), -1), torch.zeros(latents, k, dtype=torch.int64)
    index = torch.zeros(latents, k)
    block = max(1, (1 << 24) // latents)
    for first in range(0, latents, block):
        last = min(first + block, latents)
        entries = by_latent[int(ends[first] - count[first]) : int(ends[last - 1])]
        both = torch.zeros(last - first, latents, dtype=torch.int32)
        for part in entries.split(1 << 14):
            size = row_count[rows[part]]
            mine = torch.repeat_interleave(latent[part].long() - first, size)
            begin = torch.repeat_interleave(row_start[rows[part]] - (size.cumsum(0) - size), size)
            theirs = latent[begin + torch.arange(len(begin))].long()
            both.view(-1).index_add_(0, mine * latents + theirs, torch.ones_like(mine, dtype=torch.int32))
        at = torch.arange(last - first)
        both[at, at + first] = 0
        either = count[first:last, None] + count[None] - both
        score = both.float() / either.clamp(min=1)
        best = _first_of_equals(score, k)
        index[first:last, : best.shape[1]] = score.gather(1, best).float()
        ids[first:last, : best.shape[1]] = best
        joint[first:last, : best.shape[1]] = both.gather(1, best).long()
    none = joint == 0
    return Ranked(ids.masked_fill(none, -1).int(), index.masked_fill(none, 0.0)), joint.int()


def _first_of_equals(score: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, of equal ones the lower columns; any columns where the rest is 0."""
    k = min(k, score.shape[1])
    found = score.topk(min(k + 1, score.shape[1]), dim=1)
    columns, floor = found.indices[:, :k], found.values[:, k - 1]
    if found.values.shape[1] > k:  # equal ones that are left out: look at these rows as a whole
        tied = ((found.values[:, k] == floor) & (floor > 0)).nonzero()[:, 0]
        above, level = score[tied] > floor[tied, None], score[tied] == floor[tied, None]
        keep = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
        columns[tied] = keep.nonzero()[:, 1].view(-1, k)
    columns = columns.sort(dim=1).values
    return columns.gather(1, score.gather(1, columns).argsort(dim=1, descending=True, stable=True))
