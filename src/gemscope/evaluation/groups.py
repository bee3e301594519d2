"""Where token positions belong: to a document, to a stretch of positions, to a speaker.

Every sum that an average is made from is kept per document, so that documents can be drawn anew for an interval, and
per group, so that an average can be given by position and, on chats, by who speaks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from gemscope.core.arrays import Bool, Float, Int, Shaped, Tensor
from gemscope.models.tokens import Batch, Tokens

SPEAKERS = ("text", "user", "model")
"""Running text, and the turns of a chat."""

STRETCHES = 18
"""Stretch s holds the token positions 2^s to 2^(s+1) - 1 of a text; <bos> is position 0."""

GROUPS = STRETCHES + len(SPEAKERS)

_TURN = re.compile(r"<start_of_turn>(user|model)\b")


def group_name(group: int) -> str:
    """``8–15`` for a stretch, or the speaker."""
    if group >= STRETCHES:
        return SPEAKERS[group - STRETCHES]
    first, last = 1 << group, (2 << group) - 1
    return str(first) if first == last else f"{first}–{last}"


@dataclass(frozen=True)
class Places:
    """Where each of some rows belongs."""

    document: Int[Tensor, " rows"]
    """Index into the list of documents."""
    stretch: Int[Tensor, " rows"]
    """Group of its position."""
    speaker: Int[Tensor, " rows"]
    """Group of its speaker."""

    @cached_property
    def local(self) -> tuple[int, Int[Tensor, " rows"]]:
        """How many documents there are, and each row's among them."""
        found, index = self.document.unique(return_inverse=True)
        return len(found), index

    @classmethod
    def of(cls, batch: Batch, chosen: Sequence[int], mask: Bool[Tensor, "batch pos"]) -> "Places":
        """Of the positions in ``mask``, row by row of the batch; ``chosen`` are the documents' indices."""
        row, column = mask.cpu().nonzero().unbind(1)
        position = column - batch.first[row, 0]
        speaker = torch.zeros(mask.shape, dtype=torch.long)
        for i, tokens in enumerate(batch.items):
            start = int(batch.first[i])
            speaker[i, start : start + len(tokens)] = speakers(tokens)
        stretch = position.clamp(min=1).double().log2().floor().long().clamp(max=STRETCHES - 1)
        return cls(torch.tensor(list(chosen), dtype=torch.long)[row], stretch, STRETCHES + speaker[row, column])


def speakers(tokens: Tokens) -> Int[Tensor, " pos"]:
    """Who speaks at each token, as an index into ``SPEAKERS``."""
    found = torch.zeros(len(tokens), dtype=torch.long)
    turns = [(match.start(), SPEAKERS.index(match[1])) for match in _TURN.finditer(tokens.text)]
    if not turns:
        return found
    starts = torch.tensor([start for start, _ in turns])
    who = torch.tensor([0, *(index for _, index in turns)])
    at = torch.tensor([start for start, _ in tokens.offsets])
    return who[torch.bucketize(at, starts, right=True)]


class Sums:
    """Named sums over rows, per document and, within a document, per group; float64."""

    def __init__(self, names: Sequence[str], documents: int) -> None:
        self.names = tuple(names)
        self.groups: set[int] = set()
        """Groups that have rows."""
        self._table: Float[Tensor, "documents groups names"] = torch.zeros(
            documents, GROUPS, len(names), dtype=torch.float64
        )

    def add(self, places: Places, *values: Shaped[Tensor, " rows"]) -> None:
        """Add one value per row for every name."""
        table = torch.stack([value.double().cpu() for value in values], dim=1)
        for group in (places.stretch, places.speaker):
            self._table.view(-1, len(self.names)).index_add_(0, places.document * GROUPS + group, table)
            self.groups |= set(group.unique().tolist())

    def per_document(self, name: str, group: int | None = None) -> Float[Tensor, " documents"]:
        """Sum over the rows of each document, or over those of a group in it."""
        own = self._table[:, :, self.names.index(name)]
        return own[:, :STRETCHES].sum(1) if group is None else own[:, group]

    def total(self, name: str, group: int | None = None) -> float:
        """Sum over all rows, or over those of a group."""
        return float(self.per_document(name, group).sum())
