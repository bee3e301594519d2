"""What a dictionary of any kind costs the model when it takes the place of what it reconstructs.

Every layer is replaced in one forward pass: what a layer reads is taken where it is computed, with all earlier layers
already replaced, encoded there, and written in the place of what the model itself wrote. Positions that are no content
(<bos>, turn markers) keep the model's own values.
"""

from collections.abc import Mapping, Sequence

import torch

from gemscope.activations.positions import bucketed, content_mask
from gemscope.core.arrays import Bool, Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.multilayer import MultiLayer
from gemscope.evaluation.splice import SpliceLoss, _loss_sum, counted_targets  # pyright: ignore[reportPrivateUsage]
from gemscope.models.gemma import Gemma
from gemscope.models.interventions import Edit
from gemscope.models.tokens import Tokens


@torch.no_grad()
def replacement_loss(
    gemma: Gemma,
    dictionary: Dictionary,
    reads: Sequence[Site],
    writes: Sequence[Site],
    items: Sequence[Tokens],
    means: Mapping[Site, Float[Tensor, " width"]],
    *,
    batch_tokens: int = 4096,
) -> SpliceLoss:
    """Losses of the model, and with all ``writes`` replaced by the reconstruction, by zeros and by ``means``.

    Raises SiteError for a site that the model does not have, InputError when there is no prediction to measure or when
    a TopK would compare latents of layers that are not computed yet.
    """
    for site in (*reads, *writes):
        gemma.check_site(site)
    if isinstance(dictionary, MultiLayer) and dictionary.activation.top is not None:
        raise InputError(
            "a TopK over several layers needs all of them before it can write; measure another activation."
        )
    sums, predictions = [0.0] * 4, 0
    for _, batch in bucketed(gemma, items, batch_tokens):
        where, counted = content_mask(batch), counted_targets(batch)
        predictions += int(counted.sum())
        variants = (
            [],
            _edits(dictionary, reads, writes, where),
            [Edit(site, torch.zeros_like, positions=where) for site in writes],
            [Edit(site, lambda x, m=means[site]: m.to(x).expand_as(x), positions=where) for site in writes],
        )
        for which, edits in enumerate(variants):
            sums[which] += _loss_sum(gemma.logits(batch, interventions=edits), batch, counted)
    if predictions == 0:
        raise InputError("no document has two content tokens, so there is no prediction to measure a loss on.")
    return SpliceLoss(predictions, *(total / predictions for total in sums))


def _edits(
    dictionary: Dictionary, reads: Sequence[Site], writes: Sequence[Site], where: Bool[Tensor, "batch pos"]
) -> list[Edit]:
    """For each layer one that notes what is read, and one that writes."""
    if not isinstance(dictionary, MultiLayer):
        seen: dict[str, Tensor] = {}

        def note(x: Tensor) -> Tensor:
            seen["x"] = x
            return x

        def write(x: Tensor) -> Tensor:
            return dictionary(seen["x"]).to(x.dtype)

        return [Edit(reads[0], note, positions=where), Edit(writes[0], write, positions=where)]
    live = _Live(dictionary)
    found: list[Edit] = []
    for layer, (read, target) in enumerate(zip(reads, writes, strict=True)):
        found.append(Edit(read, lambda x, at=layer: live.note(at, x), positions=where))
        found.append(Edit(target, lambda x, at=layer: live.write(at, x), positions=where))
    return found


class _Live:
    """The latents of the layers that have been computed."""

    def __init__(self, dictionary: MultiLayer) -> None:
        self._dictionary = dictionary
        self._acts: dict[int, Tensor] = {}
        self._x: dict[int, Tensor] = {}

    def note(self, layer: int, x: Tensor) -> Tensor:
        one, rows = self._dictionary, x.float()
        pre_acts = rows @ one.W_enc[layer].float() + one.b_enc[layer].float()
        threshold = None if one.threshold is None else one.threshold[layer].float()
        self._acts[layer], self._x[layer] = one.activation(pre_acts, threshold), rows
        return x

    def write(self, layer: int, x: Tensor) -> Tensor:
        one = self._dictionary
        parts = [self._acts[at] @ one.W_dec[at][layer - at].float() for at in range(layer + 1)]
        recon = torch.stack(parts).sum(0) + one.b_dec[layer].float()
        if one.W_skip is not None:
            recon = recon + self._x[layer] @ one.W_skip[layer].float()
        return recon.to(x.dtype)
