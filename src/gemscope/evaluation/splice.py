"""Delta loss: what the model loses when a dictionary's reconstruction takes the place of an activation.

The rule, the same for the dictionary and for both ablations:

- the input is whole: <bos> and chat markers stay in it;
- the activation is replaced at content positions only; special, template and padding positions keep the
  model's own;
- a prediction is counted when its target is a content token other than the first of its document. The first
  one is predicted before anything was replaced, so it cannot change, and counting it would dilute the
  difference; targets that are special tokens, template or padding are never counted.

Losses are cross-entropies in nats per counted prediction, log-softmax in fp32, summed in fp64. A dictionary
that returns its input changes no bit of the forward pass and so has a delta loss of exactly 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from gemscope.activations.harvest import Progress
from gemscope.activations.positions import bucketed, content_mask
from gemscope.core.arrays import Bool, Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.models.gemma import Gemma
from gemscope.models.interventions import Edit
from gemscope.models.tokens import Batch, Tokens

Replacement = Callable[[Tensor], Tensor]
"""From activations [batch, pos, width] to what is put in their place."""


@dataclass(frozen=True)
class SpliceLoss:
    """Cross-entropies over the same predictions, in nats."""

    predictions: int
    """Number of counted predictions."""
    original: float
    """The model as it is."""
    spliced: float
    """With the dictionary's reconstruction in place of the activation."""
    zero: float
    """With zeros in its place."""
    mean: float
    """With the mean activation in its place."""

    @property
    def delta_loss(self) -> float:
        """spliced − original."""
        return self.spliced - self.original

    @property
    def recovered_zero(self) -> float | None:
        """Share of the loss of zero ablation that the dictionary recovers; None where zero ablation costs
        nothing.
        """
        return _recovered(self.spliced, self.zero, self.original)

    @property
    def recovered_mean(self) -> float | None:
        """The same against mean ablation, which is the harder comparison."""
        return _recovered(self.spliced, self.mean, self.original)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the derived numbers."""
        derived = {
            "delta_loss": self.delta_loss,
            "recovered_zero": self.recovered_zero,
            "recovered_mean": self.recovered_mean,
        }
        return asdict(self) | derived


def _recovered(spliced: float, ablated: float, original: float) -> float | None:
    return (ablated - spliced) / (ablated - original) if ablated > original else None


@torch.no_grad()
def splice_loss(
    gemma: Gemma,
    reconstruct: Replacement,
    site: Site | str,
    items: Sequence[Tokens],
    mean: Float[Tensor, "width"],
    *,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> SpliceLoss:
    """Losses of the model, with the reconstruction, with zeros and with ``mean`` spliced in at ``site``.

    Four forward passes per document. Raises SiteError for a site the model does not have and InputError when
    no document has two content tokens.
    """
    site = gemma.check_site(site)
    replacements: list[Replacement | None] = [
        None,
        reconstruct,
        torch.zeros_like,
        lambda x: mean.to(x).expand_as(x),
    ]
    sums = [0.0] * len(replacements)
    predictions, done = 0, 0
    total = sum(len(item.ids) for item in items)
    for _, batch in bucketed(gemma, items, batch_tokens):
        spliced_at, counted = content_mask(batch), counted_targets(batch)
        predictions += int(counted.sum())
        for which, replace in enumerate(replacements):
            edits = [] if replace is None else [Edit(site, replace, positions=spliced_at)]
            sums[which] += _loss_sum(gemma.logits(batch, interventions=edits), batch, counted)
        done += int(batch.mask.sum())
        if progress is not None:
            progress(done, total)
    if predictions == 0:
        raise InputError("no document has two content tokens, so there is no prediction to measure a loss on.")
    return SpliceLoss(predictions, *(total / predictions for total in sums))


def counted_targets(batch: Batch) -> Bool[Tensor, "batch pos"]:
    """Positions whose token is a counted target: content, and not the first content token of its document."""
    mask = content_mask(batch)
    return mask & (mask.cumsum(1) > 1)


def _loss_sum(logits: Float[Tensor, "batch pos vocab"], batch: Batch, counted: Bool[Tensor, "batch pos"]) -> float:
    """Sum of −log p(target) over the counted targets; one document at a time, for the fp32 copy is large."""
    total = 0.0
    for row in range(len(logits)):
        at = counted[row].nonzero()[:, 0].to(logits.device)
        targets = batch.ids[row].to(logits.device)[at]
        losses = cross_entropy(logits[row, at - 1].float(), targets, reduction="none")
        total += float(losses.double().sum())
    return total
