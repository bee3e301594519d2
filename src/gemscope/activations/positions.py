"""Which token positions count, and batches in which little is padding.

One rule for harvesting and for every measure: a position counts when its token is *content*. What gemscope or
the chat template added (<bos>, turn markers, the "user" and "model" headers) and padding stay in the model's
input, because the model was trained to see them, and are left out of every row, mean and loss: the <bos>
position's norm is orders of magnitude above the others' and would swamp any of them.
"""

from collections.abc import Iterator, Sequence

import torch

from gemscope.core.arrays import Bool, Tensor
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Batch, Tokens

RULE = "content tokens; special tokens, the chat template and padding are in the input and left out here"


def content_mask(batch: Batch) -> Bool[Tensor, "batch pos"]:
    """Where a batch holds content tokens: not special, not template, not padding."""
    mask = torch.zeros_like(batch.mask)
    for row, tokens in enumerate(batch.items):
        length = len(tokens.ids)
        start = 0 if batch.side == "right" else mask.shape[1] - length
        mask[row, start : start + length] = tokens.content_mask.to(mask.device)
    return mask


def bucketed(gemma: Gemma, items: Sequence[Tokens], batch_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """Right-padded batches of documents of similar length, longest first, with the place of each document in
    ``items``.

    A batch has at most ``batch_tokens`` positions, padding included, or a single document when that one is
    longer. The order depends on the lengths only, so that the same documents always make the same batches.
    """
    order = sorted(range(len(items)), key=lambda i: -len(items[i].ids))
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // len(items[order[start]].ids))
        chosen = order[start : start + count]
        yield chosen, gemma.batch([items[i] for i in chosen], side="right")
        start += count
