"""Where token positions belong: to a document, to a stretch of positions, to a speaker.

Every sum that an average is made from is kept per document, so that documents can be drawn anew for an interval, and
per group, so that an average can be given by position and, on chats, by who speaks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

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
        self.documents: Float[Tensor, "documents names"] = torch.zeros(documents, len(names), dtype=torch.float64)
        self.groups: dict[int, Float[Tensor, "documents names"]] = {}
        """Group -> the same over the rows of that group; groups without rows are absent."""

    def add(self, places: Places, *values: Shaped[Tensor, " rows"]) -> None:
        """Add one value per row for every name."""
        table = torch.stack([value.double().cpu() for value in values], dim=1)
        self.documents.index_add_(0, places.document, table)
        for index in (places.stretch, places.speaker):
            for group in index.unique().tolist():
                part = self.groups.setdefault(group, torch.zeros_like(self.documents))
                inside = (index == group).nonzero()[:, 0]
                part.index_add_(0, places.document[inside], table[inside])

    def per_document(self, name: str, group: int | None = None) -> Float[Tensor, " documents"]:
        """Sum over the rows of each document, or over those of a group in it."""
        table = self.documents if group is None else self.groups[group]
        return table[:, self.names.index(name)]

    def total(self, name: str, group: int | None = None) -> float:
        """Sum over all rows, or over those of a group."""
        return float(self.per_document(name, group).sum())
