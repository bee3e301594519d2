"""Gemma's chat format, rendered as the published template renders it.

Notable: there is no system role. A system text is put, untrimmed and followed by an empty line, in front of
the first user turn; all other content is trimmed; the assistant is spelled ``model``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gemscope.core.errors import InputError
from gemscope.models.tokens import END_OF_TURN, START_OF_TURN


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Literal["user", "model", "system"]
    text: str


def render(turns: str | Sequence[Turn], *, answer: bool = True) -> str:
    """The conversation as text, without ``<bos>``; a str is one user turn.

    ``answer`` opens the model's turn after a user turn; a conversation that ends with the model's turn is
    left as it is. Raises InputError when there is no user turn, a turn is empty, or the roles do not
    alternate user, model, user.
    """
    if isinstance(turns, str):
        turns = [Turn("user", turns)]
    prefix = ""
    if turns and turns[0].role == "system":
        prefix, turns = turns[0].text + "\n\n", turns[1:]
    if not turns:
        raise InputError("the conversation has no user turn; begin it with Turn('user', ...).")
    parts: list[str] = []
    for i, turn in enumerate(turns):
        wanted = "user" if i % 2 == 0 else "model"
        if turn.role != wanted:
            raise InputError(
                f"turn {i + 1} has role {turn.role!r} where {wanted!r} belongs; roles alternate user, model,"
                f" user"
                " (a system text comes first, once)."
            )
        text = turn.text.strip()
        if not text:
            raise InputError(f"turn {i + 1} ({turn.role}) is empty; give at least one character.")
        parts.append(f"{START_OF_TURN}{turn.role}\n{prefix if i == 0 else ''}{text}{END_OF_TURN}\n")
    if answer and turns[-1].role == "user":
        parts.append(f"{START_OF_TURN}model\n")
    return "".join(parts)
