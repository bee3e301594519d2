"""Which labelled concepts a dictionary has a latent for, over token positions whose concepts are known.

Two scores for each pair of latent and concept, both exact and both over all rows, the inactive ones included:

- AUROC, the chance that the latent is more active on a random positive row than on a random negative one,
  ties counting half: the Mann-Whitney statistic with midranks. Inactive rows are one large tie, so only the
  active entries are sorted;
- F1 of the rule "activation ≥ t" at the best t among the latent's own positive activations, so that a latent
  that never fires has 0 and "everything is positive" is no candidate.

A latent is named after the concept that its activation falls on most exclusively: of the concepts that hold at
least ``NAMED_SHARE`` of its summed activation, the one whose share is the largest multiple of its share of the
rows, so that a latent for mammals is not called "living thing", nor one for any noun "function word".

The best latent of a concept is chosen on the same rows on which it is scored: with many latents and few
positives the scores are optimistic, and concepts with fewer than ``MIN_POSITIVES`` positives (or negatives)
are not scored at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.core.errors import InputError
from gemscope.models.tokens import Tokens

MIN_POSITIVES = 20
FOUND_AUROC = 0.9
"""A concept counts as found when some latent reaches this AUROC."""
NAMED_SHARE = 0.4
"""A latent is named after a concept that holds this share of its activation ..."""
NAMED_LIFT = 3.0
"""... and at least this many times the concept's share of the rows."""


@dataclass(frozen=True)
class ConceptLabels:
    """Known concepts of a list of documents."""

    names: tuple[str, ...]
    marks: Sequence[Bool[Tensor, "_ concepts"]]
    """Per document [pos, concepts], one line for each of its tokens, special ones included."""
    passages: frozenset[str] = frozenset()
    """Names that mark whole passages (a refusal, a news text) and not words; they are counted apart."""
    parents: Mapping[str, str] = field(default_factory=dict[str, str])
    """Concept -> the more general one that holds all of its tokens, where there is one."""

    @classmethod
    def joined(cls, several: Sequence["ConceptLabels"], items: Sequence[Tokens]) -> "ConceptLabels":
        """The columns of all, in order; raises InputError when some are of another text than ``items``."""
        for one in several:
            lengths = [len(marks) for marks in one.marks]
            for have, item in zip(lengths, items, strict=False):
                if have != len(item.ids):
                    raise InputError(f"{have} lines of labels for {len(item.ids)} tokens; label the same tokens.")
            if len(lengths) != len(items):
                raise InputError(f"labels of {len(lengths)} documents for {len(items)}; label the same documents.")
        return cls(
            tuple(name for one in several for name in one.names),
            [torch.cat(marks, dim=1) for marks in zip(*(one.marks for one in several), strict=True)],
            frozenset[str]().union(*(one.passages for one in several)),
            {child: parent for one in several for child, parent in one.parents.items()},
        )


@dataclass(frozen=True)
class ActiveEntries:
    """The active entries of an activation matrix, in any order; all others are zero."""

    shape: tuple[int, int]
    """(rows, latents) of the matrix."""
    row: Int[Tensor, "entries"]
    latent: Int[Tensor, "entries"]
    value: Float[Tensor, "entries"]

    @classmethod
    def stack(cls, parts: Sequence["ActiveEntries"]) -> "ActiveEntries":
        """Batches of rows of the same latents, one below the other."""
        offset = torch.tensor([0, *(part.shape[0] for part in parts)]).cumsum(0)
        return cls(
            (int(offset[-1]), parts[0].shape[1]),
            torch.cat([part.row.long() + start for part, start in zip(parts, offset[:-1], strict=True)]),
            torch.cat([part.latent for part in parts]).long(),
            torch.cat([part.value for part in parts]),
        )

    def only(self, rows: Int[Tensor, " chosen"]) -> "ActiveEntries":
        """Some of the rows, numbered anew in the order given."""
        place = torch.full((self.shape[0],), -1, dtype=torch.long)
        place[rows] = torch.arange(len(rows))
        keep = place[self.row] >= 0
        return ActiveEntries((len(rows), self.shape[1]), place[self.row[keep]], self.latent[keep], self.value[keep])


@dataclass(frozen=True)
class ConceptScore:
    """The best latents for one concept: the best by AUROC and the best by F1, often the same."""

    concept: str
    positives: int
    auroc: float
    auroc_latent: int
    f1: float
    f1_latent: int
    passage: bool
    """Whether the label marks whole passages and not words."""
    f1_threshold: float
    """The activation from which the F1 latent's rule says yes."""


@dataclass(frozen=True)
class ConceptReport:
    """Concepts of a dictionary; every score is over ``rows`` token positions."""

    rows: int
    scores: tuple[ConceptScore, ...]
    """One per concept that could be measured, in the order of the labels."""
    too_few: Mapping[str, int]
    """Concepts that could not be measured, with their number of positives."""
    latent_concept: tuple[str | None, ...]
    """Per latent, the concept it is named after; None where no concept holds ``NAMED_SHARE`` of its activation."""
    latent_share: tuple[float, ...]
    """The share of the latent's activation on that concept's rows; 0 without a name."""
    latent_max: tuple[float, ...]
    """Per latent, its largest activation; 0 when it never fired."""

    @property
    def found(self) -> tuple[int, int]:
        """(concepts for which some latent reaches an AUROC of ``FOUND_AUROC``, concepts measured); no passages."""
        return self._found(passage=False)

    @property
    def found_passages(self) -> tuple[int, int]:
        """The same for the labels that mark passages."""
        return self._found(passage=True)

    def _found(self, passage: bool) -> tuple[int, int]:
        reached = [score.auroc >= FOUND_AUROC for score in self.scores if score.passage == passage]
        return sum(reached), len(reached)

    def coverage(self, thresholds: Sequence[float]) -> list[float]:
        """Share of the concepts (no passages) with a latent of at least each AUROC: the coverage curve."""
        best = [score.auroc for score in self.scores if not score.passage]
        return [sum(value >= at for value in best) / max(len(best), 1) for at in thresholds]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"found": self.found, "found_passages": self.found_passages}


def score_concepts(
    active: ActiveEntries,
    labels: Bool[Tensor, "rows concepts"],
    names: Sequence[str],
    passages: frozenset[str] = frozenset(),
    min_positives: int = MIN_POSITIVES,
) -> ConceptReport:
    """The best latent of each concept and the best concept of each latent.

    Raises InputError when the labels are of other rows, and when an activation is not positive.
    """
    rows, latents = active.shape
    if bool((active.value <= 0).any()):
        raise InputError("activations that are not positive; concepts are scored for latents that are 0 or more.")
    if labels.shape != (rows, len(names)):
        raise InputError(f"labels {tuple(labels.shape)} for {rows} rows and {len(names)} concepts; they must agree.")
    positives = labels.sum(0)
    measured: list[int] = ((positives >= min_positives) & (rows - positives >= min_positives)).nonzero()[:, 0].tolist()
    too_few = {name: int(positives[i]) for i, name in enumerate(names) if i not in measured}
    if not measured:
        return ConceptReport(rows, (), too_few, (None,) * latents, (0.0,) * latents, _largest(active))
    entries, marks = _sorted(active), labels[:, measured]
    auroc = auroc_matrix(entries, marks)
    f1, threshold = f1_matrix(entries, marks)
    scores: list[ConceptScore] = []
    for column, i in enumerate(measured):
        a, f = int(auroc[:, column].argmax()), int(f1[:, column].argmax())
        scores.append(
            ConceptScore(
                concept=names[i],
                positives=int(positives[i]),
                auroc=float(auroc[a, column]),
                auroc_latent=a,
                f1=float(f1[f, column]),
                f1_latent=f,
                passage=names[i] in passages,
                f1_threshold=float(threshold[f, column]),
            )
        )
    share, which = _names(entries, marks)
    concept = (names[measured[int(i)]] if value > 0 else None for value, i in zip(share, which, strict=True))
    return ConceptReport(rows, tuple(scores), too_few, tuple(concept), tuple(share.tolist()), _largest(active))


def _names(
    active: ActiveEntries, labels: Bool[Tensor, "rows concepts"]
) -> tuple[Float[Tensor, " latents"], Int[Tensor, " latents"]]:
    """Per latent, the share of its activation on the concept it is named after (0 without a name), and which."""
    marks, value = labels.double(), active.value.double()
    whole = value.new_zeros(active.shape[1]).index_add(0, active.latent, value)
    share = rows_to_latents(active, value, marks) / whole.clamp(min=torch.finfo(whole.dtype).tiny)[:, None]
    lift = share / marks.mean(0)
    lift = torch.where((share >= NAMED_SHARE) & (lift >= NAMED_LIFT), lift, 0.0)
    best, which = lift.max(1)
    return torch.where(best > 0, share.gather(1, which[:, None])[:, 0], 0.0), which


def _largest(active: ActiveEntries) -> tuple[float, ...]:
    zeros = active.value.new_zeros(active.shape[1])
    return tuple(zeros.scatter_reduce(0, active.latent, active.value, "amax").tolist())


def auroc_matrix(active: ActiveEntries, labels: Bool[Tensor, "rows concepts"]) -> Float[Tensor, "latents concepts"]:
    """AUROC of every latent for every concept, fp64; a concept needs at least one positive and one negative
    row.

    With R the sum of the midranks of the P positives among N rows: (R − P(P+1)/2) / (P (N−P)). The inactive
    rows of a latent share the midrank (Z+1)/2 of the Z of them; an active entry's midrank is Z plus its
    midrank among the active.
    """
    active = _sorted(active)
    rows, latents = active.shape
    count = torch.bincount(active.latent, minlength=latents)
    before = count.cumsum(0) - count
    inactive = (rows - count).double()
    place = torch.arange(len(active.value))
    fresh = torch.ones(len(place), dtype=torch.bool)
    fresh[1:] = (active.latent[1:] != active.latent[:-1]) | (active.value[1:] != active.value[:-1])
    first = place[fresh]
    last = torch.cat([first[1:], torch.tensor([len(place)])])[: len(first)] - 1
    tie = fresh.cumsum(0) - 1
    midrank = (first + last).double()[tie] / 2 - before[active.latent] + 1 + inactive[active.latent]
    marks = labels.double()
    ranks = rows_to_latents(active, midrank, marks)
    hits = rows_to_latents(active, torch.ones_like(midrank), marks)
    positives = marks.sum(0)
    total = ranks + (positives - hits) * (inactive[:, None] + 1) / 2
    return (total - positives * (positives + 1) / 2) / (positives * (rows - positives))


def f1_matrix(
    active: ActiveEntries, labels: Bool[Tensor, "rows concepts"]
) -> tuple[Float[Tensor, "latents concepts"], Float[Tensor, "latents concepts"]]:
    """(F1, threshold) of "activation ≥ threshold" at the best threshold, for every latent and concept, F1 in
    fp64.

    F1 = 2 TP / (predicted + P), tried at each distinct activation of the latent; 0 (threshold 0) for a silent
    latent.
    """
    active = _sorted(active)
    latents, concepts = active.shape[1], labels.shape[1]
    positives = labels.sum(0)
    best = torch.zeros(latents, concepts, dtype=torch.float64)
    threshold = torch.zeros(latents, concepts, dtype=active.value.dtype)
    ends = torch.bincount(active.latent, minlength=latents).cumsum(0).tolist()
    for latent, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start == end:
            continue
        value = active.value[start:end].flip(0)
        hits = labels[active.row[start:end].flip(0)].cumsum(0)
        last_of_tie = torch.cat([value[1:] != value[:-1], torch.tensor([True])])
        predicted = last_of_tie.nonzero()[:, :1] + 1
        f1, which = (2 * hits[last_of_tie].double() / (predicted + positives)).max(0)
        best[latent] = f1
        threshold[latent] = value[last_of_tie][which]
    return best, threshold


def _sorted(active: ActiveEntries) -> ActiveEntries:
    """The same entries by latent, and within a latent by rising activation."""
    order = active.value.argsort(stable=True)
    order = order[active.latent[order].argsort(stable=True)]
    return ActiveEntries(active.shape, active.row[order], active.latent[order], active.value[order])


def rows_to_latents(
    active: ActiveEntries, weight: Float[Tensor, "entries"], marks: Float[Tensor, "rows concepts"]
) -> Float[Tensor, "latents concepts"]:
    """Per latent and concept, the sum of the weights of the active rows that have the concept."""
    where = torch.stack([active.latent, active.row])
    shape = (active.shape[1], active.shape[0])
    return torch.sparse_coo_tensor(where, weight, shape, check_invariants=False) @ marks
