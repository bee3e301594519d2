"""Which positions of which items, at which step: the part of an activation that an intervention changes.

Notable: a position is an index into the item's own tokens, whatever the padding, and a step is the one at
which that position is first processed (0 for the prompt, k for the k-th new token). Both are properties of
the token, so a selection means the same with a key/value cache as without, where every pass computes every
position again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from gemscope.core.arrays import Bool, Int, Tensor
from gemscope.core.errors import InputError
from gemscope.models.tokens import Batch

Positions = Sequence[int] | slice | Bool[Tensor, "batch prompt"] | Literal["content", "last"] | None
"""None: all. Indices and slices count within each item, negative ones from the end of its prompt. ``last``:
the last token of the prompt. ``content``: content roles of the prompt, and every new token. A mask: columns
of the batch."""

Steps = Sequence[int] | Literal["all", "prefill", "new"]
"""``prefill``: the prompt (step 0). ``new``: generated tokens (steps 1, 2, ...). Numbers: those steps."""


@dataclass(frozen=True, eq=False)
class Moment:
    """The part of a batch that one forward pass processes: columns ``start`` to ``stop``."""

    batch: Batch
    """The prompts; columns beyond them are tokens generated since."""
    start: int
    stop: int
    generating: bool = False

    @property
    def columns(self) -> Int[Tensor, "pos"]:
        """Column numbers of this pass."""
        return torch.arange(self.start, self.stop)

    @property
    def prompt(self) -> int:
        """Number of columns of the prompts."""
        return self.batch.ids.shape[1]


def select(moment: Moment, positions: Positions, steps: Steps) -> Bool[Tensor, "batch pos"] | None:
    """True where an intervention applies, for the columns of this pass; None when it applies everywhere.

    Padding is selected only by None. Raises InputError for an index outside an item, or a mask of another
    shape.
    """
    at_step = _at_steps(moment, steps)
    at_position = _at_positions(moment, positions)
    if at_step is None or at_position is None:
        return at_position if at_step is None else at_step.expand(len(moment.batch.items), -1)
    return at_position & at_step


def _at_steps(moment: Moment, steps: Steps) -> Bool[Tensor, "1 pos"] | None:
    step = (moment.columns - moment.prompt + 1).clamp(min=0)[None]
    if isinstance(steps, str):
        return None if steps == "all" else (step == 0 if steps == "prefill" else step > 0)
    return torch.isin(step, torch.tensor(list(steps), dtype=torch.long))


def _at_positions(moment: Moment, positions: Positions) -> Bool[Tensor, "batch pos"] | None:
    if positions is None:
        return None
    batch = moment.batch
    if isinstance(positions, Tensor):
        if positions.shape != batch.ids.shape:
            raise InputError(
                f"the position mask has shape {tuple(positions.shape)} but the batch"
                f" {tuple(batch.ids.shape)};"
                " make the mask from the same batch."
            )
        return _prompt_columns(moment, positions)
    if positions == "content":
        return _prompt_columns(moment, _content(batch)) | (moment.columns >= moment.prompt)[None]
    index, lengths = moment.columns[None] - batch.first, batch.lengths
    exists = (index >= 0) & ((index < lengths) | (moment.columns >= moment.prompt)[None])
    if positions == "last":
        return exists & (index == lengths - 1)
    if isinstance(positions, slice):
        return exists & _in_slice(index, lengths, positions)
    return exists & _among(moment, index, list(positions))


def _among(moment: Moment, index: Tensor, wanted: list[int]) -> Tensor:
    lengths = moment.batch.lengths
    rows: list[Tensor] = []
    for row, length in zip(index, lengths.flatten().tolist(), strict=True):
        beyond = [i for i in wanted if i < -length or (i >= length and not moment.generating)]
        if beyond:
            raise InputError(f"position {beyond[0]} is outside a text of {length} tokens; give 0 to {length - 1}.")
        rows.append(torch.isin(row, torch.tensor([i + length if i < 0 else i for i in wanted], dtype=torch.long)))
    return torch.stack(rows)


def _in_slice(index: Tensor, lengths: Tensor, wanted: slice) -> Tensor:
    step = 1 if wanted.step is None else int(wanted.step)
    if step < 1:
        raise InputError(f"positions {wanted} run backwards; give a slice with a step of 1 or more.")

    def bound(value: int) -> Tensor:
        return (lengths + value).clamp(min=0) if value < 0 else torch.full_like(lengths, value)

    start = bound(0 if wanted.start is None else int(wanted.start))
    inside = (index >= start) & ((index - start) % step == 0)
    return inside if wanted.stop is None else inside & (index < bound(int(wanted.stop)))


def _content(batch: Batch) -> Tensor:
    content = torch.zeros_like(batch.mask)
    content[batch.mask] = torch.cat([item.content_mask for item in batch.items])
    return content


def _prompt_columns(moment: Moment, mask: Tensor) -> Tensor:
    """This pass' columns of a mask over the prompts; False for tokens generated since."""
    columns = moment.columns
    inside = columns < moment.prompt
    return mask.cpu()[:, columns.clamp(max=moment.prompt - 1)] & inside
