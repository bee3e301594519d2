"""Chats that end with the model's own reply: what a dictionary of a tuned model is finetuned on.

Notable: documents are answered in batches of a fixed size and order, sampling draws by a document's number, and
every finished batch is on disk; so a run that was stopped goes on, and the file is the same as without the stop.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gemscope.activations.sources import Source, Text
from gemscope.core.errors import InputError
from gemscope.core.files import atomic_path, storage_error
from gemscope.models.chat import Turn
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import END_OF_TURN, START_OF_TURN, Tokens

_TURN = re.compile(f"{START_OF_TURN}(user|model)\n(.*?)(?:{END_OF_TURN}|$)", re.DOTALL)
_NAMES = {"user": "user", "model": "assistant", "system": "system"}
Progress = Callable[[int, int], None]
"""Called with (documents done, total) after each batch."""


@dataclass(frozen=True)
class ReplyConfig:
    """How to answer."""

    documents: int | None = None
    """How many of the source's documents; None: all of them."""
    max_new_tokens: int = 256
    """A longer reply is cut there."""
    batch: int = 32
    """Documents answered at once."""
    temperature: float = 1.0
    """0 is greedy."""
    seed: int = 0
    """Of the draws; each document has a stream of its own."""


def asked(document: Text) -> tuple[Turn, ...]:
    """The conversation up to the user's last turn; running text is one such turn, a rendered chat is taken apart."""
    if isinstance(document, str):
        found = [Turn(role, text) for role, text in _TURN.findall(document)]
        document = tuple(found) or (Turn("user", document),)
    last = max((i for i, turn in enumerate(document) if turn.role == "user"), default=-1)
    return document[: last + 1]


def write_replies(
    gemma: Gemma, source: Source, out: Path | str, config: ReplyConfig, progress: Progress | None = None
) -> int:
    """Write one chat a line, ``{"messages": [{"role", "content"}, ...]}``, with the model's reply last; gives their
    number.

    A document that cannot be asked (empty, a malformed chat, too long for the model) is left out. While it runs, the
    lines are in ``out`` with ``.part`` at the end, and the same command goes on from there. Raises InputError when
    ``out`` is there already or the source has no end and ``documents`` is None, StorageError when it cannot be written.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} is there already; choose another file with --out.")
    total = source.count() if config.documents is None else config.documents
    if total is None:
        raise InputError("this text never ends; say how many documents to answer with --documents.")
    part = out.with_name(f"{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with part.open("a+b") as file:
            about = {"source": source.describe(), "config": asdict(config)}
            done = _resume(file, about)
            while batch := list(source.read(done, min(done + config.batch, total))):
                lines = _answers(gemma, batch, config, done)
                done += len(batch)
                file.write(b"".join(lines) + _mark(done, about))
                file.flush()
                os.fsync(file.fileno())
                if progress is not None:
                    progress(done, total)
        count = 0
        with part.open("rb") as lines, atomic_path(out) as path, path.open("wb") as whole:
            for line in lines:
                if line.startswith(b'{"messages"'):
                    whole.write(line)
                    count += 1
        part.unlink()
    except OSError as error:
        raise storage_error(out, error) from error
    return count


def _mark(done: int, about: dict[str, Any]) -> bytes:
    """The line behind each batch: how many documents are through, and of what."""
    return json.dumps({"done": done} | about).encode() + b"\n"


def _resume(file: BinaryIO, about: dict[str, Any]) -> int:
    """Cut off what follows the last whole batch; gives the documents that are through."""
    file.seek(0)
    end = done = 0
    for line in file:
        if line.startswith(b'{"done"') and line.endswith(b"\n"):
            done = int(json.loads(line)["done"])
            if line != _mark(done, about):
                raise InputError(f"{file.name} is of other text or settings; remove it, or choose another --out.")
            end = file.tell()
    file.truncate(end)
    return done


def _answers(gemma: Gemma, documents: Sequence[Text], config: ReplyConfig, first: int) -> Iterator[bytes]:
    """The lines of those that can be asked."""
    chats: list[tuple[Turn, ...]] = []
    prompts: list[Tokens] = []
    for document in documents:
        turns = asked(document)
        with suppress(InputError):  # of which a text that is too long is one
            prompts.append(gemma.chat(turns))
            chats.append(turns)
    if not chats:
        return
    room = gemma.shape.context - max(len(prompt.ids) for prompt in prompts)
    new = min(config.max_new_tokens, room)
    found = gemma.generate(prompts, max_new_tokens=new, temperature=config.temperature, seed=config.seed + first)
    for turns, reply in zip(chats, found, strict=True):
        turns = (*turns, Turn("model", reply.text)) if reply.text.strip() else turns
        messages = [{"role": _NAMES[turn.role], "content": turn.text} for turn in turns]
        yield json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n"
