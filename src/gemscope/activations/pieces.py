"""Documents cut into what the model reads at once, and batches of them in which little is padding.

Notable:
- a document longer than the context is cut; every piece begins with a <bos> of its own, and a row's position
  still counts from the beginning of the whole document;
- pieces are never joined in one row of a batch: each is read alone, so an activation does not depend on its
  neighbours, and padding is kept down by bringing together pieces of similar length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gemscope.activations.sources import Text
from gemscope.core.arrays import Bool, Int, Tensor
from gemscope.core.errors import InputError
from gemscope.models.chat import render
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Batch

MAX_PADDING = 0.05
"""No batch holds a larger share of padding than this."""


_Part = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Token ids of many pieces, end to end."""

    ids: Int[Tensor, "total"]
    content: Bool[Tensor, "total"]
    """Which tokens become rows."""
    pos: Int[Tensor, "total"]
    """Position in the whole document, its <bos> being 0; so that of a later piece's own <bos> is the position
    before its first token."""
    bounds: npt.NDArray[np.int64]
    """Piece p is ``bounds[p]`` to ``bounds[p + 1]``."""
    doc: npt.NDArray[np.int64]
    """Number of the document that each piece belongs to."""
    skipped: int
    """Documents without any text that the model can read."""

    def __len__(self) -> int:
        return len(self.doc)

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Content tokens of each piece."""
        before = np.concatenate([[0], np.cumsum(self.content.numpy(), dtype=np.int64)])
        return before[self.bounds[1:]] - before[self.bounds[:-1]]


@dataclass(frozen=True, eq=False)
class PieceBatch:
    """One rectangle for the model, and which of its positions are rows."""

    batch: Batch
    pieces: npt.NDArray[np.int64]
    """Which pieces, top to bottom."""
    flat: Int[Tensor, "rows"]
    """Places of the content tokens in the flattened rectangle, piece by piece."""


def encode(gemma: Gemma, texts: Sequence[Text], first: int, context: int) -> Pieces:
    """Tokens of documents ``first``, ``first + 1``, ..., in pieces of at most ``context`` tokens.

    A document that the model cannot read (empty, no Unicode, a token without an embedding, a malformed chat)
    is skipped and counted.
    """
    parts: list[_Part] = []
    doc: list[int] = []
    skipped = 0
    encoded = gemma.vocabulary.content_ids([_plain(text) for text in texts], vocab_size=gemma.shape.vocab_size)
    for number, found in enumerate(encoded, first):
        if found is None:
            skipped += 1
            continue
        ids, content = found
        for start, stop in _cuts(len(ids), context):
            if content[start:stop].any():
                parts.append(_part(ids, content, start, stop))
                doc.append(number)
    none = torch.empty(0, dtype=torch.long)
    ids, content, pos = (torch.cat([none, *column]) for column in zip(*parts, strict=True)) if parts else 3 * (none,)
    bounds = np.concatenate([[0], np.cumsum([len(part[0]) for part in parts], dtype=np.int64)])
    return Pieces(ids, content.bool(), pos, bounds.astype(np.int64), np.array(doc, dtype=np.int64), skipped)


def batches(gemma: Gemma, pieces: Pieces, chosen: npt.NDArray[np.int64], batch_tokens: int) -> Iterator[PieceBatch]:
    """Right-padded batches of the chosen pieces, longest first, every piece once.

    At most ``batch_tokens`` positions, padding included, of which at most 5 % are padding; a single piece may
    be longer. A function of the pieces only, so the same documents always meet in the same batches.
    """
    lengths = (pieces.bounds[1:] - pieces.bounds[:-1])[chosen]
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        width = int(lengths[order[start]])
        stop, filled = start + 1, width
        while stop < len(order):
            filled += int(lengths[order[stop]])
            area = width * (stop + 1 - start)
            if area > batch_tokens or filled < (1 - MAX_PADDING) * area:
                break
            stop += 1
        yield _rectangle(gemma, pieces, chosen[order[start:stop]], width)
        start = stop


def _rectangle(gemma: Gemma, pieces: Pieces, members: npt.NDArray[np.int64], width: int) -> PieceBatch:
    ids = torch.full((len(members), width), gemma.vocabulary.pad_id, dtype=torch.long)
    mask = torch.zeros(len(members), width, dtype=torch.bool)
    content = torch.zeros(len(members), width, dtype=torch.bool)
    for row, piece in enumerate(members):
        low, high = int(pieces.bounds[piece]), int(pieces.bounds[piece + 1])
        ids[row, : high - low] = pieces.ids[low:high]
        content[row, : high - low] = pieces.content[low:high]
        mask[row, : high - low] = True
    return PieceBatch(Batch(ids, mask, (), "right"), members, content.view(-1).nonzero()[:, 0])


def _plain(text: Text) -> str:
    """The text as the model reads it; a malformed chat becomes nothing, and is skipped as such."""
    if isinstance(text, str):
        return text
    try:
        return render(text, answer=False)
    except InputError:
        return ""


def _cuts(length: int, context: int) -> Iterator[tuple[int, int]]:
    """Where to cut: the first piece holds the document's <bos>, each further one leaves room for its own."""
    yield 0, min(length, context)
    for start in range(context, length, context - 1):
        yield start, min(length, start + context - 1)


def _part(ids: Tensor, content: Tensor, start: int, stop: int) -> _Part:
    """Ids, content and positions of one piece."""
    pos = torch.arange(start, stop)
    if start == 0:
        return ids[:stop], content[:stop], pos
    no = torch.zeros(1, dtype=torch.bool)
    return torch.cat([ids[:1], ids[start:stop]]), torch.cat([no, content[start:stop]]), torch.cat([pos[:1] - 1, pos])
