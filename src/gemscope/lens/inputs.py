"""What the lens is given: a text or tokens, a padded batch, a word that must be one token."""

from dataclasses import dataclass
from typing import Any

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.models.gemma import Gemma
from gemscope.models.pieces import shown
from gemscope.models.tokens import Batch, Tokens

Asked = str | int
"""A next token that is asked about: a word, or the token's id."""


@dataclass(frozen=True)
class Target:
    """A next token that is asked about, perhaps against another one."""

    token: int
    piece: str
    other: int | None = None
    other_piece: str | None = None

    def __str__(self) -> str:
        other = "" if self.other_piece is None else f" − {shown(self.other_piece)}"
        return shown(self.piece) + other

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"token": self.token, "piece": self.piece, "other": self.other, "other_piece": self.other_piece}


def identity(gemma: Gemma) -> str:
    """The model's name, and for one from the hub the revision: ``google/gemma-3-1b-it@005ad34...``."""
    return gemma.name if gemma.revision is None else f"{gemma.name}@{gemma.revision}"


def as_tokens(gemma: Gemma, text: str | Tokens) -> Tokens:
    """The text as tokens; raises InputError, ContextLengthError."""
    return gemma.tokens(text) if isinstance(text, str) else text


def padded(gemma: Gemma, tokens: Tokens, width: int) -> Batch:
    """``tokens`` alone in a batch, filled up on the right to ``width`` columns.

    Nothing looks ahead, so the padding changes no value; but two texts that share a beginning then run through kernels
    of one shape, and their values there are equal to the bit.
    """
    assert width >= len(tokens)
    ids = torch.full((1, width), gemma.vocabulary.pad_id, dtype=torch.long)
    ids[0, : len(tokens)] = tokens.ids
    return Batch(ids=ids, mask=(torch.arange(width) < len(tokens))[None], items=(tokens,), side="right")


def place_in(tokens: Tokens, position: int) -> int:
    """``position`` counted from the start (negative: from the end); raises InputError when there is none."""
    n = len(tokens)
    if not -n <= position < n:
        raise InputError(f"position {position} is outside a text of {n} tokens; give 0 to {n - 1}, or -1 for the last.")
    return position % n


def find_target(
    gemma: Gemma, logits: Float[Tensor, " vocab"], target: Asked | None, other: Asked | None = None
) -> Target:
    """The token that ``target`` names (None: the most likely one) and the one ``other`` names, if any.

    A word may be meant with or without a space in front: of the two that are single tokens, the more likely one.
    Raises InputError when a word is not one token, there is no token of an id, or both are the same.
    """
    token = int(logits.argmax()) if target is None else _one(gemma, logits, target)
    second = None if other is None else _one(gemma, logits, other)
    if token == second:
        raise InputError(f"{target or piece_of(gemma, token)!r} and {other!r} are the same token; give another one.")
    return Target(token, piece_of(gemma, token), second, None if second is None else piece_of(gemma, second))


def piece_of(gemma: Gemma, token: int) -> str:
    """The vocabulary's spelling of a token; a row of the embedding that spells nothing is written ``<id>``."""
    piece = gemma.tokenizer.convert_ids_to_tokens(token)
    return piece if isinstance(piece, str) else f"<{token}>"


def _one(gemma: Gemma, logits: Tensor, word: Asked) -> int:
    if isinstance(word, int):
        if not 0 <= word < len(logits):
            raise InputError(f"there is no token {word}; give an id of the vocabulary, 0 to {len(logits) - 1}.")
        return word
    if not word:
        raise InputError("the token asked about is empty; give a word.")
    spellings = [word] if word[0].isspace() else [" " + word, word]
    items = [gemma.tokens(spelling) for spelling in spellings]
    found = [int(item.ids[1]) for item in items if len(item) == 2]
    if not found:
        pieces = " ".join(items[0].pieces[1:])
        raise InputError(f"{word!r} is {len(items[0]) - 1} tokens ({pieces}); give a word that is one token.")
    return max(found, key=lambda token: float(logits[token]))
