"""Labelled rows kept from the pass: the codes of every dictionary, and for some documents the activations too."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.core.errors import FormatError, InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.sparse import Support
from gemscope.evaluation.concepts import ActiveEntries, ConceptLabels
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Tokens


def chosen_documents(items: Sequence[Tokens], rows: int, seed: int) -> frozenset[int]:
    """Documents drawn at random until they hold ``rows`` content tokens."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[int] = []
    for i in order:
        if rows <= 0:
            break
        found.append(i)
        rows -= int(items[i].content_mask.sum())
    return frozenset(found)


class LabelledRows:
    """Content rows with labels, batch by batch; those of ``probed`` documents with their activations."""

    def __init__(self, subjects: int, probed: frozenset[int]) -> None:
        self._entries: list[list[ActiveEntries]] = [[] for _ in range(subjects)]
        self._probed = torch.tensor(sorted(probed), dtype=torch.long)
        self._marks: list[Tensor] = []
        self._documents: list[Tensor] = []
        self._x: dict[Site, list[Tensor]] = {}

    def add(
        self,
        codes: Sequence[tuple[Support, Tensor]],
        rows: Mapping[Site, Float[Tensor, "rows _"]],
        marks: Bool[Tensor, "rows concepts"],
        documents: Int[Tensor, " rows"],
    ) -> None:
        """Take in a batch."""
        for held, (support, value) in zip(self._entries, codes, strict=True):
            row, latent = support.rows.to("cpu", torch.int32), support.latents.to("cpu", torch.int32)
            held.append(ActiveEntries((support.batch, support.d_sae), row, latent, value.cpu()))
        self._marks.append(marks)
        self._documents.append(documents)
        inside = torch.isin(documents, self._probed)
        if bool(inside.any()):
            for site, x in rows.items():
                self._x.setdefault(site, []).append(x.cpu()[inside])

    @property
    def marks(self) -> Bool[Tensor, "rows concepts"]:
        """Labels of all rows."""
        return torch.cat(self._marks)

    @property
    def documents(self) -> Int[Tensor, " rows"]:
        """Document of each row."""
        return torch.cat(self._documents)

    @property
    def probed(self) -> Int[Tensor, " kept"]:
        """The rows whose activations were kept."""
        return torch.isin(self.documents, self._probed).nonzero()[:, 0]

    def x(self, site: Site) -> Float[Tensor, "kept width"]:
        """Their activations at a site."""
        return torch.cat(self._x[site])

    def active(self, subject: int) -> ActiveEntries:
        """Codes of a dictionary on all rows."""
        return ActiveEntries.stack(self._entries[subject])


def from_jsonl(gemma: Gemma, path: Path | str) -> tuple[list[Tokens], ConceptLabels]:
    """Documents with labelled spans, one JSON object a line.

    ``{"text": ..., "spans": [{"start": 0, "end": 5, "label": "animal/dog"}], "label": "news"}``: character offsets, the
    end excluded; ``animal/dog`` is also labelled ``animal``, its parent; ``label`` (or a list, ``labels``) holds for
    the whole text. Raises FormatError for a line that is something else, with its number.
    """
    found: list[tuple[Tokens, list[tuple[int, int, str]]]] = []
    passages: set[str] = set()
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read {path} ({error}); give a JSONL file in UTF-8.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            tokens, spans, whole = _line(gemma, line, f"line {number} of {path}")
            found.append((tokens, spans))
            passages |= whole
    if not found:
        raise InputError(f"{path} holds no documents; give one JSON object with a 'text' per line.")
    names = tuple(dict.fromkeys(name for _, spans in found for *_, label in spans for name in _chain(label)))
    marks = [_marks(tokens, spans, names) for tokens, spans in found]
    parents = {name: name.rpartition("/")[0] for name in names if "/" in name}
    labels = ConceptLabels(names, marks, frozenset(passages), parents)
    return [tokens for tokens, _ in found], labels


def _line(gemma: Gemma, line: str, where: str) -> tuple[Tokens, list[tuple[int, int, str]], set[str]]:
    try:
        value: Any = json.loads(line)
        text = str(value["text"])
        spans = [(int(s["start"]), int(s["end"]), str(s["label"])) for s in value.get("spans", [])]
        whole = [*value.get("labels", []), *([value["label"]] if "label" in value else [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{where} is no labelled text ({error}); write a text and spans of start, end, label."
        ) from error
    outside = [span for span in spans if not 0 <= span[0] < span[1] <= len(text)]
    if outside:
        raise FormatError(
            f"{where} has a span {outside[0][:2]} outside its text of {len(text)} characters; correct it."
        )
    names = {name for label in whole for name in _chain(str(label))}
    return gemma.tokens(text), [*spans, *((0, len(text), str(label)) for label in whole)], names


def _chain(label: str) -> list[str]:
    """The label and its parents, the most general first."""
    parts = label.split("/")
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _marks(tokens: Tokens, spans: Sequence[tuple[int, int, str]], names: Sequence[str]) -> Bool[Tensor, "pos labels"]:
    column = {name: i for i, name in enumerate(names)}
    found = torch.zeros(len(tokens), len(names), dtype=torch.bool)
    for start, end, label in spans:
        inside = span_mask(tokens, start, end)
        for name in _chain(label):
            found[:, column[name]] |= inside
    return found


def span_mask(tokens: Tokens, start: int, end: int) -> Bool[Tensor, " pos"]:
    """Tokens that share a character with ``start`` to ``end`` that is no space, or only spaces with it."""
    found = torch.zeros(len(tokens), dtype=torch.bool)
    for i, (first, last) in enumerate(tokens.offsets):
        shown = [c for c in range(first, last) if not tokens.text[c].isspace()] or range(first, last)
        found[i] = any(start <= c < end for c in shown)
    return found
