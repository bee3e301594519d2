"""The text that a suite is made from: generated documents as the model's tokens, with the concepts of each
token.

Any model can read it; how much a measure on it says about another model than the microworld is another
question.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

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


@dataclass(frozen=True)
class LabelledText:
    """Held-out documents and what is true of their tokens."""

    items: list[Tokens]
    labels: ConceptLabels


def texts(gemma: Gemma, split: Split, seed: int) -> Iterator[Document]:
    """An endless stream of documents: running text, and chats in turn with it for an instruction-tuned model."""
    running = documents("pt", split, seed)
    if not gemma.is_chat:
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
    return LabelledText([item for item, _ in both], ConceptLabels(tuple(CONCEPTS), marks, PASSAGES))


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
