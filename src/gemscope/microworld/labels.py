"""Concept labels per token: which concepts each position of a tokenised document belongs to."""

import torch

from gemscope.core.arrays import Bool, Tensor
from gemscope.core.errors import InputError
from gemscope.microworld.concepts import CONCEPTS, INDEX, with_ancestors
from gemscope.microworld.documents import Document
from gemscope.models.tokens import Tokens


def token_concepts(tokens: Tokens, document: Document) -> Bool[Tensor, "pos n_concepts"]:
    """True where a token overlaps a span of the concept or of one below it; columns in the order of ``CONCEPTS``.

    The space in front of a word is part of its token in Gemma's tokenizer, hence overlap and not containment; a token
    that is only the space or the newline before a span does not belong to it. Raises InputError when ``tokens`` were
    not made from the text of ``document``.
    """
    if tokens.text != document.text:
        raise InputError("the tokens were not made from the text of this document; tokenise document.text.")
    owner = [frozenset[int]()] * len(document.text)
    for span in document.spans:
        columns = frozenset(INDEX[name] for name in with_ancestors(span.concept))
        for i in range(span.start, span.end):
            owner[i] = owner[i] | columns
    labels = torch.zeros(len(tokens.ids), len(CONCEPTS), dtype=torch.bool)
    for row, (start, end) in enumerate(tokens.offsets):
        shown = [i for i in range(start, end) if not document.text[i].isspace()] or range(start, end)
        for column in frozenset[int]().union(*(owner[i] for i in shown)):
            labels[row, column] = True
    return labels
