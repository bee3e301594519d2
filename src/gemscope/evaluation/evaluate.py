"""Everything that is measured of one dictionary at one site, on held-out documents, as one value that reads
back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from gemscope.activations.harvest import Progress
from gemscope.activations.positions import RULE, bucketed, content_mask
from gemscope.core.arrays import Bool, Float, Tensor
from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import read_json, write_json
from gemscope.core.provenance import collect
from gemscope.core.sites import Site
from gemscope.dictionaries.sae import SAE
from gemscope.evaluation.concepts import (
    ActiveEntries,
    ConceptLabels,
    ConceptReport,
    ConceptScore,
    score_concepts,
)
from gemscope.evaluation.fidelity import Fidelity, FidelitySums
from gemscope.evaluation.splice import SpliceLoss, splice_loss
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Tokens

FORMAT = "gemscope.evaluation"
VERSION = 1

_Part = TypeVar("_Part", Fidelity, SpliceLoss, ConceptReport, ConceptScore)


@dataclass(frozen=True)
class Evaluation:
    """How good one dictionary is; every part says over how many tokens it was measured."""

    model: str
    site: Site
    d_sae: int
    fidelity: Fidelity
    loss: SpliceLoss
    concepts: ConceptReport | None
    """None when the documents had no labels."""
    about: Mapping[str, Any]
    """Positions left out, documents, provenance, and what the caller added."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "site": str(self.site),
            "d_sae": self.d_sae,
            "fidelity": self.fidelity.as_dict(),
            "loss": self.loss.as_dict(),
            "concepts": None if self.concepts is None else self.concepts.as_dict(),
            "about": dict(self.about),
        }

    def save(self, path: Path | str) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, self.as_dict())

    @classmethod
    def load(cls, path: Path | str) -> "Evaluation":
        """Read what ``save`` wrote; raises FormatError for anything else."""
        value = read_json(path)
        if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
            raise FormatError(f"{path} is no {FORMAT} of version {VERSION}; evaluate the dictionary again.")
        try:
            concepts = value["concepts"]
            return cls(
                model=value["model"],
                site=Site.parse(value["site"]),
                d_sae=value["d_sae"],
                fidelity=_read(Fidelity, value["fidelity"]),
                loss=_read(SpliceLoss, value["loss"]),
                concepts=None if concepts is None else _read_concepts(concepts),
                about=value["about"],
            )
        except (KeyError, TypeError) as error:
            raise FormatError(f"{path} lacks a part ({error}); evaluate the dictionary again.") from error


def _read(kind: type[_Part], value: Mapping[str, Any]) -> _Part:
    """A dataclass from JSON: its own fields only, lists as tuples; what is derived is derived anew."""
    given: dict[str, Any] = {field.name: value[field.name] for field in fields(kind)}
    for name, part in given.items():
        if isinstance(part, list):
            given[name] = tuple(cast(list[Any], part))
    return kind(**given)


def _read_concepts(value: Mapping[str, Any]) -> ConceptReport:
    scores = [_read(ConceptScore, score) for score in value["scores"]]
    return _read(ConceptReport, {**value, "scores": scores})


@torch.no_grad()
def evaluate(
    gemma: Gemma,
    dictionary: SAE,
    site: Site | str,
    items: Sequence[Tokens],
    labels: ConceptLabels | None = None,
    *,
    splice_tokens: int | None = None,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
    about: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Fidelity, delta loss and, when ``labels`` are given, concepts of ``dictionary`` at ``site``.

    ``items`` are documents that the dictionary was not trained on. Fidelity and concepts use them all; the
    four forward passes of the delta loss use the first documents that together hold ``splice_tokens`` tokens
    (None: all). Raises SiteError for a site the model does not have, InputError when the dictionary or the
    labels do not fit.
    """
    site = gemma.check_site(site)
    if dictionary.d_in != gemma.width(site):
        raise InputError(
            f"the dictionary reads {dictionary.d_in} numbers, but {site} of {gemma.name} has"
            f" {gemma.width(site)}; use the model and site it was trained on."
        )
    some = items[: _first(items, splice_tokens)]
    whole, part = (sum(len(item.ids) for item in group) for group in (items, some))
    report = progress or _silent
    fidelity, mean, concepts = _measure(
        gemma, dictionary, site, items, labels, batch_tokens, lambda done, _: report(done, whole + 4 * part)
    )
    loss = splice_loss(
        gemma,
        lambda x: dictionary(x).to(x.dtype),
        site,
        some,
        mean,
        batch_tokens=batch_tokens,
        progress=lambda done, _: report(whole + 4 * done, whole + 4 * part),
    )
    notes = {"documents": len(items), "positions": RULE, "provenance": collect().as_dict(), **(about or {})}
    return Evaluation(gemma.name, site, dictionary.d_sae, fidelity, loss, concepts, notes)


def _silent(done: int, total: int) -> None:
    """No progress is shown."""


def _first(items: Sequence[Tokens], tokens: int | None) -> int:
    """How many documents it takes to have ``tokens`` tokens."""
    count, seen = 0, 0
    while count < len(items) and (tokens is None or seen < tokens):
        seen += len(items[count].ids)
        count += 1
    return count


def _measure(
    gemma: Gemma,
    dictionary: SAE,
    site: Site,
    items: Sequence[Tokens],
    labels: ConceptLabels | None,
    batch_tokens: int,
    progress: Progress,
) -> tuple[Fidelity, Float[Tensor, "d_in"], ConceptReport | None]:
    """One pass over the documents: fidelity, the mean activation, and the concepts if labelled."""
    sums = FidelitySums(dictionary.d_in, dictionary.d_sae)
    entries: list[ActiveEntries] = []
    marks: list[Tensor] = []
    done, total = 0, sum(len(item.ids) for item in items)
    for chosen, batch in bucketed(gemma, items, batch_tokens):
        x = gemma.capture(batch, [site])[site]
        x = x[content_mask(batch).to(x.device)].float()
        support, value = dictionary.encode_sparse(x)
        sums.add(x, dictionary(x), support.latents)
        if labels is not None:
            shape = (len(x), dictionary.d_sae)
            entries.append(ActiveEntries(shape, support.rows.cpu(), support.latents.cpu(), value.cpu()))
            marks.extend(_content_marks(items[i], labels.marks[i]) for i in chosen)
        done += int(batch.mask.sum())
        progress(done, total)
    fidelity, concepts = sums.result(), None
    if labels is not None:
        concepts = score_concepts(ActiveEntries.stack(entries), torch.cat(marks), labels.names, labels.passages)
    return fidelity, sums.mean.float(), concepts


def _content_marks(tokens: Tokens, marks: Bool[Tensor, "pos concepts"]) -> Bool[Tensor, "rows concepts"]:
    """The labels of a document's content tokens; raises InputError when they are of another text."""
    if len(marks) != len(tokens.ids):
        raise InputError(f"{len(marks)} lines of labels for {len(tokens.ids)} tokens; label the same tokens.")
    return marks[tokens.content_mask.cpu()]
