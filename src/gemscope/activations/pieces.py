"""Documents cut into what the model reads at once, and batches of them in which little is padding.

Notable:
- a document longer than the context is cut; every piece begins with a <bos> of its own, and a row's position
  still counts from the beginning of the whole document;
- an activation never depends on a piece's neighbours: where pieces share a row of the batch (packing), each has
  its own positions and sees itself only;
- padding is kept down by bringing together pieces of similar length, or by packing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from gemscope.activations.sources import Text
from gemscope.core.arrays import Bool, Int, Tensor
from gemscope.core.errors import InputError
from gemscope.models.chat import render
from gemscope.models.gemma import Gemma
from gemscope.models.layout import ModelShape
from gemscope.models.tokens import Batch

MAX_PADDING = 0.05
"""No batch holds a larger share of padding than this."""


_PACKED_ATTENTION = 0.25


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

    @cached_property
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
    upward = torch.arange(context)
    encoded = gemma.vocabulary.content_ids([_plain(text) for text in texts], vocab_size=gemma.shape.vocab_size)
    for number, found in enumerate(encoded, first):
        if found is None:
            skipped += 1
            continue
        ids, content = found
        if len(ids) <= context and content.any():
            parts.append((ids, content, upward[: len(ids)]))
            doc.append(number)
            continue
        for start, stop in _cuts(len(ids), context):
            if content[start:stop].any():
                parts.append(_part(ids, content, start, stop))
                doc.append(number)
    none = torch.empty(0, dtype=torch.long)
    ids, content, pos = (torch.cat([none, *column]) for column in zip(*parts, strict=True)) if parts else 3 * (none,)
    bounds = np.concatenate([[0], np.cumsum([len(part[0]) for part in parts], dtype=np.int64)])
    return Pieces(ids, content.bool(), pos, bounds.astype(np.int64), np.array(doc, dtype=np.int64), skipped)


def row_tokens(shape: ModelShape, context: int) -> int:
    """How long a row that holds several pieces is: as long as it can be (at most ``context``) while attention over the
    whole row, most of it masked, costs at most a quarter of the block's matrix products.

    A token costs 4 x length x d_q for attention and 2 a weight for the products (Hoffmann et al. 2022, appendix F).
    """
    weights = shape.d_model * (2 * shape.d_q + 2 * shape.d_kv + 3 * shape.d_mlp)
    length = int(_PACKED_ATTENTION * 2 * weights / (4 * shape.d_q))
    return max(2, min(context, length // 64 * 64))


def batches(
    gemma: Gemma, pieces: Pieces, chosen: npt.NDArray[np.int64], batch_tokens: int, packed: int | None = None
) -> Iterator[PieceBatch]:
    """Right-padded batches of the chosen pieces, longest first, every piece once.

    At most ``batch_tokens`` positions, padding included; a single piece may be longer. Each piece has a row for itself
    and at most 5 % are padding; with ``packed``, the pieces of at most that many tokens, where they are, share rows of
    that length, and only what is longer has rows for itself. A function of the pieces only, so the same documents
    always meet in the same batches.
    """
    lengths = (pieces.bounds[1:] - pieces.bounds[:-1])[chosen]
    order = np.argsort(-lengths, kind="stable")
    long = order if packed is None else order[lengths[order] > packed]
    start = 0
    while start < len(long):
        width = int(lengths[long[start]])
        stop, filled = start + 1, width
        while stop < len(long):
            filled += int(lengths[long[stop]])
            area = width * (stop + 1 - start)
            if area > batch_tokens or filled < (1 - MAX_PADDING) * area:
                break
            stop += 1
        yield _rectangle(gemma, pieces, [[int(p)] for p in chosen[long[start:stop]]], width)
        start = stop
    if packed is not None:
        short = order[len(long) :]
        rows = [[int(p) for p in chosen[short[row]]] for row in _packed(lengths[short].tolist(), packed)]
        height = max(1, batch_tokens // packed)
        for start in range(0, len(rows), height):
            yield _rectangle(gemma, pieces, rows[start : start + height], packed)


def _packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Items, longest first, in rows with room for so many tokens: each in the fullest row where it still fits.

    Best fit decreasing, which needs at most 11/9 of the fewest rows (Johnson et al. 1974).
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]
    for item, length in enumerate(lengths):
        left = next((left for left in range(length, room + 1) if with_room[left]), None)
        if left is None:
            rows.append([])
            row, left = len(rows) - 1, room
        else:
            row = with_room[left].pop()
        rows[row].append(item)
        with_room[left - length].append(row)
    return rows


def _rectangle(gemma: Gemma, pieces: Pieces, rows: Sequence[Sequence[int]], width: int) -> PieceBatch:
    """One piece or several in a row, one after the other."""
    members, counts = np.array([p for row in rows for p in row]), np.array([len(row) for row in rows])
    low = pieces.bounds[members]
    length = pieces.bounds[members + 1] - low
    begin = np.cumsum(length) - length
    row_begin = begin[np.cumsum(counts) - counts]
    filled = np.add.reduceat(length, np.cumsum(counts) - counts)
    each = np.arange(length.sum())
    source = torch.from_numpy(each + np.repeat(low - begin, length))
    target = torch.from_numpy(each + np.repeat(np.repeat(np.arange(len(rows)) * width - row_begin, counts), length))
    column = torch.arange(width).expand(len(rows), -1)
    mask = column < torch.from_numpy(filled)[:, None]
    ids = torch.full((len(rows), width), gemma.vocabulary.pad_id)
    ids.view(-1)[target] = pieces.ids[source]
    places = None
    if len(members) > len(rows):
        places = column - torch.from_numpy(filled)[:, None]
        places.view(-1)[target] = torch.from_numpy(each - np.repeat(begin, length))
    return PieceBatch(Batch(ids, mask, (), "right", places), members, target[pieces.content[source]])


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
