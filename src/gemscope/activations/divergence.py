"""What a model predicts from contexts with some rows of a site replaced, against what it predicts by itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import kl_div

from gemscope.core.arrays import Float, Int, Tensor
from gemscope.core.sites import Site
from gemscope.models.gemma import Gemma
from gemscope.models.interventions import Edit
from gemscope.models.tokens import Batch

_AT_ONCE = 1 << 26
"""Logits in memory at a time, of each of the two models."""
FINAL = Site("final_in")
"""What the model predicts from."""


@dataclass(frozen=True, eq=False)
class Given:
    """One rectangle of contexts that the model was run on, and where in it the rows of a batch are."""

    batch: Batch
    flat: Int[Tensor, "rows"]
    """Places of the rows in the flattened rectangle, in the order of the batch."""
    final: Float[Tensor, "rows d_model"]
    """``final_in`` at the rows."""


def divergence(gemma: Gemma, given: Sequence[Given], site: Site, recon: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """Mean over a batch's rows of KL(model ‖ spliced) of the next token, in nats, with its gradient to ``recon``.

    ``recon`` (raw) takes the place of ``site`` at the rows of ``given``, nowhere else. The way back through the model
    is gone here, one rectangle after the other, so that one at a time is in memory; what is returned has that value and
    is linear in ``recon`` with that slope, so it can be differentiated once.
    """
    sizes = [len(one.flat) for one in given]
    found = [_rectangle(gemma, one, site, rows) for one, rows in zip(given, recon.split(sizes), strict=True)]
    slope = torch.cat([slope for _, slope in found]) / len(recon)
    value = torch.stack([value for value, _ in found]).sum().to(recon) / len(recon)
    return value + (slope * (recon - recon.detach())).sum()


@torch.enable_grad()
def _rectangle(
    gemma: Gemma, one: Given, site: Site, recon: Float[Tensor, "rows d"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows d"]]:
    """Sum of the rows' divergences, and its gradient; layers before ``site`` are in no graph."""
    recon = recon.detach().requires_grad_()

    def put(x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_copy(0, one.flat.to(x.device), recon.to(x.device, x.dtype)).view_as(x)

    changes = [Edit("embed", Tensor.detach), Edit(site, put)]
    last = rows_at(gemma.capture(one.batch, [FINAL], interventions=changes, grad=True)[FINAL], one.flat)
    step = max(1, _AT_ONCE // gemma.shape.vocab_size)
    parts = [_predictions(gemma, *two) for two in zip(one.final.split(step), last.split(step), strict=True)]
    (slope,) = torch.autograd.grad(last, recon, torch.cat([slope for _, slope in parts]))
    return torch.stack([value for value, _ in parts]).sum(), slope


def _predictions(
    gemma: Gemma, before: Float[Tensor, "rows d_model"], after: Float[Tensor, "rows d_model"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows d_model"]]:
    """Sum over rows of KL(before ‖ after) of what is predicted from two values of ``final_in``, log-softmax in fp32 or
    better, and its gradient to ``after``.
    """
    after = after.detach().requires_grad_()
    p, q = (_log_probabilities(gemma, x) for x in (before, after))
    value = kl_div(q, p, reduction="sum", log_target=True)
    (slope,) = torch.autograd.grad(value, after)
    return value.detach().double(), slope


def _log_probabilities(gemma: Gemma, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
    logits = gemma.unembed(x)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def rows_at(x: Float[Tensor, "batch pos width"], flat: Int[Tensor, "rows"]) -> Float[Tensor, "rows width"]:
    """The values at some places of the flattened rectangle."""
    return x.flatten(0, 1).index_select(0, flat.to(x.device))
