"""Text to tokens and back, with exact character offsets and a role for every position.

Notable: the offsets are found by walking the text piece by piece rather than taken from the tokenizer, whose
offsets are wrong after a character that was split into bytes. All byte pieces of one character share that
character's span.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from gemscope.core.arrays import Bool, Int, Tensor
from gemscope.core.errors import ContextLengthError, FormatError, InputError

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_TEMPLATE = re.compile(f"{re.escape(START_OF_TURN)}(?:user|model)(?:\n|\\Z)|{re.escape(END_OF_TURN)}\n")
_MARKER = re.compile(f"{re.escape(START_OF_TURN)}|{re.escape(END_OF_TURN)}")
_SPACE = "▁"
_STRAY = re.compile("[\udc80-\udcff]")

Span = tuple[int, int]


class Role(StrEnum):
    """What a position is there for."""

    SPECIAL = "special"
    """A control token: ``<bos>``, a turn marker, padding."""
    TEMPLATE = "template"
    """The chat template's own words: ``user``, ``model`` and the newlines around the markers."""
    CONTENT = "content"
    """Everything else."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """A text as the model reads it; every field but ``text`` has one entry a position."""

    text: str
    """The text; a ``<bos>`` that was added is not in it."""
    ids: Int[Tensor, "pos"]
    pieces: tuple[str, ...]
    """The vocabulary's spelling of each token."""
    offsets: tuple[Span, ...]
    """Character span of each token in ``text``; (0, 0) for a ``<bos>`` that was added."""
    roles: tuple[Role, ...]

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def content_mask(self) -> Bool[Tensor, "pos"]:
        """True at content positions."""
        return torch.tensor([role is Role.CONTENT for role in self.roles], dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class Batch:
    """Several token sequences in one rectangle."""

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    """True at tokens, False at padding."""
    items: tuple[Tokens, ...]
    side: Literal["right", "left"]
    """Where the padding is."""
    places: Int[Tensor, "batch pos"] | None = None
    """In a packed batch, where a row holds several texts: each token's place in its own text, which begins with 0. A
    token sees its own text only; padding at the end of a row is a text of its own."""

    @cached_property
    def first(self) -> Int[Tensor, "batch 1"]:
        """Column of each item's first token."""
        return self.mask.int().argmax(dim=1, keepdim=True).long()

    @cached_property
    def lengths(self) -> Int[Tensor, "batch 1"]:
        """Number of tokens of each item."""
        return self.mask.sum(dim=1, keepdim=True)


class Vocabulary:
    """A Gemma tokenizer, as far as the microscope needs one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """Raises FormatError when ``tokenizer`` is not backed by ``tokenizers`` or has no ``<bos>``."""
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
        if backend is None or not isinstance(bos, int) or tokenizer.bos_token is None:
            raise FormatError(
                f"the tokenizer of {name!r} is not Gemma's (no tokenizer.json with a <bos>); fetch it again."
            )
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_id = bos
        self.bos = str(tokenizer.bos_token)
        self.eos_id = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else None
        self.pad_id = pad if isinstance(pad, int) else bos
        self.start_id: int | None = backend.token_to_id(START_OF_TURN)
        self.end_id: int | None = backend.token_to_id(END_OF_TURN)
        added: dict[int, Any] = backend.get_added_tokens_decoder()
        markers = {self.start_id, self.end_id}
        special = [i for i, token in added.items() if token.special or i in markers]
        self.special_ids: frozenset[int] = frozenset(special)
        self._is_special = np.zeros(
            max([backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added)]), bool
        )
        self._is_special[special] = True

    @property
    def has_turns(self) -> bool:
        """Whether both turn markers are single tokens."""
        return self.start_id is not None and self.end_id is not None

    def encode(self, text: str, *, context: int, vocab_size: int) -> Tokens:
        """``text`` with exactly one ``<bos>`` in front.

        A text that begins with ``<bos>`` keeps it and gets no second one. Raises InputError for an empty text
        or one that is not valid Unicode, ContextLengthError for one of more than ``context`` tokens.
        """
        while text.startswith(self.bos * 2):
            text = text.removeprefix(self.bos)
        if text in ("", self.bos):
            raise InputError("the text is empty; give at least one character.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            at = f"character {error.start}, {text[error.start]!r}"
            raise InputError(f"the text is not valid Unicode ({at} is half a surrogate pair); remove it.") from error
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, pieces = list[int](encoding.ids), list[str](encoding.tokens)
        offsets = _spans(text, pieces)
        if ids[0] != self.bos_id:
            ids, pieces, offsets = [self.bos_id, *ids], [self.bos, *pieces], [(0, 0), *offsets]
        if len(ids) > context:
            raise ContextLengthError(
                f"the text has {len(ids)} tokens and the model reads at most {context}; shorten it or split it."
            )
        if max(ids) >= vocab_size:
            piece = pieces[ids.index(max(ids))]
            raise InputError(f"the text holds {piece!r}, which this model has no embedding for; remove it.")
        return self.assemble(text, ids, pieces, offsets)

    def content_ids(
        self, texts: Sequence[str], *, vocab_size: int
    ) -> list[tuple[Int[Tensor, "pos"], Bool[Tensor, "pos"]] | None]:
        """Ids and content mask of each text, exactly as ``encode`` gives them, without a limit on the length; None
        where ``encode`` would refuse the text.

        Nearly all texts take a short way, in which other threads run: no pieces, no offsets.
        """
        found: list[tuple[Tensor, Tensor] | None] = [None] * len(texts)
        short = [i for i, text in enumerate(texts) if self._is_short(text)]
        try:
            encodings = self._backend.encode_batch_fast([texts[i] for i in short], add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # one of them is no text: leave it to the long way
            short, encodings = [], []
        long = set(range(len(texts))).difference(short)
        for i, encoding in zip(short, encodings, strict=True):
            ids = np.array([self.bos_id, *encoding.ids])
            content = ~self._is_special[ids]
            if _MARKER.search(texts[i]) and not self._leave_out_template(texts[i], ids, content):
                long.add(i)
            elif len(ids) > 1 and int(ids.max()) < vocab_size:
                found[i] = torch.from_numpy(ids), torch.from_numpy(content)
        for i in long:
            try:
                tokens = self.encode(texts[i], context=sys.maxsize, vocab_size=vocab_size)
            except InputError:
                continue
            found[i] = tokens.ids, tokens.content_mask
        return found

    def _is_short(self, text: str) -> bool:
        return text != "" and self.bos not in text and (self.has_turns or not _MARKER.search(text))

    def _leave_out_template(self, text: str, ids: npt.NDArray[np.int64], content: npt.NDArray[np.bool_]) -> bool:
        """Clear ``content`` at the template's words, which follow the markers; False when the markers among ``ids``
        are not those of the text.
        """
        at = np.flatnonzero((ids == self.start_id) | (ids == self.end_id)).tolist()
        markers = list(_MARKER.finditer(text))
        if len(at) != len(markers):
            return False
        template = {match.start(): match.end() for match in _TEMPLATE.finditer(text)}
        for token, marker in zip(at, markers, strict=True):
            left = template.get(marker.start(), marker.end()) - marker.end()
            while left and token + 1 < len(ids):
                token += 1
                piece = self._piece(int(ids[token]))
                left -= 1 if _BYTE.fullmatch(piece) else len(piece)
                if left < 0:
                    break
                content[token] = False
        return True

    def assemble(self, text: str, ids: Sequence[int], pieces: Sequence[str], offsets: Sequence[Span]) -> Tokens:
        """Tokens from their parts, with the roles read off the text."""
        return Tokens(
            text=text,
            ids=torch.tensor(ids, dtype=torch.long),
            pieces=tuple(pieces),
            offsets=tuple(offsets),
            roles=_roles(text, ids, offsets, self.special_ids),
        )

    def decode(self, ids: Iterable[int]) -> tuple[str, list[str], list[Span]]:
        """Text, pieces and offsets of token ids; a leading ``<bos>`` gets (0, 0) and no text.

        Bytes that are no valid UTF-8 become U+FFFD each, as in the tokenizer's own decoder.
        """
        ids = list(ids)
        pieces = [self._piece(i) for i in ids]
        if ids and ids[0] == self.bos_id:
            text, offsets = spelled(pieces[1:])
            return text, pieces, [(0, 0), *offsets]
        text, offsets = spelled(pieces)
        return text, pieces, offsets

    def _piece(self, token: int) -> str:
        piece = self._backend.id_to_token(token)
        if piece is None:
            raise InputError(f"there is no token {token} in this model's vocabulary.")
        return str(piece)


def collate(items: Sequence[Tokens], pad_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """One rectangle of ``items``, padded with ``pad_id`` on ``side``; raises InputError for an empty list."""
    if not items:
        raise InputError("there is nothing to run: the list of texts is empty.")
    width = max(len(item) for item in items)
    ids = torch.full((len(items), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(items), width, dtype=torch.bool)
    for row, item in enumerate(items):
        at = slice(0, len(item)) if side == "right" else slice(width - len(item), width)
        ids[row, at] = item.ids
        mask[row, at] = True
    return Batch(ids=ids, mask=mask, items=tuple(items), side=side)


def spelled(pieces: Sequence[str], *, part: bool = False) -> tuple[str, list[Span]]:
    """The text that the vocabulary's spellings make, and the span of each; bytes that are no valid UTF-8 become U+FFFD
    each.

    Of a run of bytes that is not valid the tokenizer's own decoder makes nothing else. With ``part`` the pieces are cut
    out of a text: the characters that are whole are kept.
    """
    text, offsets, start = "", list[Span](), 0
    while start < len(pieces):
        stop = start
        while stop < len(pieces) and _BYTE.fullmatch(pieces[stop]):
            stop += 1
        if stop > start:
            chars, owner = _join_bytes([int(piece[3:5], 16) for piece in pieces[start:stop]], part)
            offsets += [(len(text) + at, len(text) + at + 1) for at in owner]
            text, start = text + chars, stop
            continue
        surface = pieces[start].replace(_SPACE, " ")
        offsets.append((len(text), len(text) + len(surface)))
        text, start = text + surface, start + 1
    return text, offsets


def _join_bytes(values: Sequence[int], part: bool) -> tuple[str, list[int]]:
    """The characters a run of bytes spells, and for each byte the index of its character."""
    chars = bytes(values).decode("utf-8", "surrogateescape")  # a byte of no character becomes half a surrogate pair
    known = _STRAY.sub("\ufffd", chars)
    if known != chars and not part:
        return "\ufffd" * len(values), list(range(len(values)))
    return known, [at for at, char in enumerate(chars) for _ in char.encode("utf-8", "surrogateescape")]


def _spans(text: str, pieces: Sequence[str]) -> list[Span]:
    """Character span of each piece, found by walking ``text``; raises InputError when the pieces do not spell
    it."""
    spans, at, done = list[Span](), 0, 0
    for piece in pieces:
        if (byte := _BYTE.fullmatch(piece)) and at < len(text):
            encoded = text[at].encode("utf-8")
            if encoded[done] == int(byte[1], 16):
                spans.append((at, at + 1))
                done = (done + 1) % len(encoded)
                at += done == 0
                continue
        end = at + len(piece)
        if done or text[at:end].replace(" ", _SPACE) != piece.replace(" ", _SPACE):
            raise InputError(
                f"the tokenizer does not spell the text it was given (piece {piece!r} at character {at});"
                " use Gemma's own tokenizer."
            )
        spans.append((at, end))
        at = end
    return spans


def _roles(text: str, ids: Sequence[int], offsets: Sequence[Span], special: frozenset[int]) -> tuple[Role, ...]:
    """Control tokens are special; tokens wholly inside the template's words are template; the rest is
    content."""
    template = [match.span() for match in _TEMPLATE.finditer(text)]
    roles, at = list[Role](), 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        while at < len(template) and template[at][1] <= start:
            at += 1
        if token in special:
            roles.append(Role.SPECIAL)
        elif at < len(template) and template[at][0] <= start and end <= template[at][1]:
            roles.append(Role.TEMPLATE)
        else:
            roles.append(Role.CONTENT)
    return tuple(roles)
