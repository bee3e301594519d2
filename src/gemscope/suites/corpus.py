"""The text that a suite is made from: generated documents as the model's tokens, with the concepts of each
token.

Any model can read it; how much a measure on it says about another model than the microworld is another
question.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gemscope.activations.harvest import Progress
from gemscope.core.errors import InputError
from gemscope.evaluation.concepts import ConceptLabels
from gemscope.microworld.concepts import CONCEPTS, PASSAGES
from gemscope.microworld.corpus import documents
from gemscope.microworld.documents import Document
from gemscope.microworld.labels import token_concepts
from gemscope.microworld.splits import Split
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Tokens

_RUN = 256


@dataclass(frozen=True)
class LabelledText:
    """Held-out documents and what is true of their tokens."""

    items: list[Tokens]
    labels: ConceptLabels


@dataclass(frozen=True)
class GeneratedText:
    """The microworld as a source for a harvest: endless, and any range of it can be had without what lies before."""

    chat: bool
    """Chats in turn with running text."""
    split: Split = "train"
    seed: int = 0
    running: bool = True
    """Whether running text is among the chats."""

    def describe(self) -> dict[str, Any]:
        """The options, and a hash of the first documents that changes when the generator does."""
        digest = hashlib.sha256("\n".join(islice(self._run(0), 20)).encode()).hexdigest()
        about = {"kind": "microworld", "chat": self.chat, "split": self.split, "seed": self.seed, "sha256": digest}
        return about if self.running else about | {"running": False}

    def count(self) -> int | None:
        """There is no end."""
        return None

    def read(self, start: int, stop: int) -> Iterator[str]:
        """Documents by number: every run of 256 has a random stream of its own."""
        for run in range(start // _RUN, -(-stop // _RUN)):
            yield from islice(self._run(run), max(start - run * _RUN, 0), min(stop - run * _RUN, _RUN))

    def _run(self, run: int) -> Iterator[str]:
        seed = int.from_bytes(hashlib.blake2b(f"{self.seed}:{run}".encode(), digest_size=6).digest())
        found = _texts(self.chat, self.split, seed) if self.running else documents("it", self.split, seed)
        return (document.text for document in found)


def texts(gemma: Gemma, split: Split, seed: int) -> Iterator[Document]:
    """An endless stream of documents: running text, and chats in turn with it for an instruction-tuned model."""
    return _texts(gemma.is_chat, split, seed)


def _texts(chat: bool, split: Split, seed: int) -> Iterator[Document]:
    running = documents("pt", split, seed)
    if not chat:
        return running
    return (document for pair in zip(documents("it", split, seed), running, strict=True) for document in pair)


def fingerprint(gemma: Gemma, split: Split, seed: int) -> str:
    """A hash of the first documents with their labels and of the concepts: changes when the generator does."""
    shown = [repr(document) for document in islice(texts(gemma, split, seed), 100)]
    return hashlib.sha256("\n".join([repr(concept) for concept in CONCEPTS.values()] + shown).encode()).hexdigest()


def training_text(gemma: Gemma, tokens: int, seed: int, progress: Progress | None = None) -> list[Tokens]:
    """Documents of the training split until they hold ``tokens`` content tokens."""
    return [item for item, _ in _read(gemma, "train", tokens, seed, progress)]


def heldout_text(gemma: Gemma, tokens: int, seed: int) -> LabelledText:
    """Documents of the held-out split, labelled, until they hold ``tokens`` content tokens."""
    both = list(_read(gemma, "heldout", tokens, seed, None))
    marks = [token_concepts(item, document) for item, document in both]
    parents = {name: concept.parent for name, concept in CONCEPTS.items() if concept.parent is not None}
    labels = ConceptLabels(tuple(CONCEPTS), marks, PASSAGES, parents)
    return LabelledText([item for item, _ in both], labels)


def _read(
    gemma: Gemma, split: Split, tokens: int, seed: int, progress: Progress | None
) -> Iterator[tuple[Tokens, Document]]:
    if tokens < 1:
        raise InputError(f"cannot make a corpus of {tokens} tokens; ask for at least 1.")
    done = 0
    for document in texts(gemma, split, seed):
        item = gemma.tokens(document.text)
        done = min(tokens, done + int(item.content_mask.sum()))
        yield item, document
        if progress is not None:
            progress(done, tokens)
        if done == tokens:
            return
