"""All measures of any number of dictionaries of one model.

One pass of the model over the documents serves every dictionary: activations are captured once, each site's moments
are summed once, and each dictionary encodes the same rows. The losses take one pass more for each dictionary, and two
for each set of sites that is written, over the first documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gemscope.activations.harvest import Progress
from gemscope.activations.positions import RULE, bucketed, content_mask
from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.provenance import collect
from gemscope.core.sites import Site
from gemscope.dictionaries.sparse import Support
from gemscope.evaluation.concepts import ConceptLabels, score_concepts
from gemscope.evaluation.controls import Control, Principal, components, random_like
from gemscope.evaluation.fidelity import ErrorSums, Fidelity, FidelitySums, Targets
from gemscope.evaluation.first_letter import first_letters
from gemscope.evaluation.geometry import geometry
from gemscope.evaluation.groups import Places
from gemscope.evaluation.intervals import columns, intervals
from gemscope.evaluation.labelled import LabelledRows, chosen_documents
from gemscope.evaluation.moments import Moments
from gemscope.evaluation.probes import ProbeReport
from gemscope.evaluation.result import Evaluation
from gemscope.evaluation.splice import Change, Effect, Spliced, splice_losses
from gemscope.evaluation.study import Study, study
from gemscope.evaluation.subject import Subject
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Tokens

SAMPLE = 16_384
"""Rows of a site that its principal components come from, about."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, and on how much."""

    splice_tokens: int | None = 12_000
    """Tokens of the first documents whose loss is measured; None: all."""
    batch_tokens: int = 4096
    """Positions in one forward pass of the model, padding included."""
    controls: bool = True
    """Whether a random dictionary and PCA are measured beside each dictionary."""
    probes: bool = True
    """Whether labels are probed for: k-sparse and dense probes, splitting, absorption, with their controls."""
    probe_rows: int = 12_000
    """Rows that probes are fitted and scored on, at most."""
    random_model: bool = True
    """Whether the probes are also fitted on the model with random weights, which takes its memory again."""
    first_letters: bool = False
    """Whether splitting and absorption of first letters are measured, on prompts of their own."""
    geometry: bool = True
    """Whether the weights are compared with one another."""
    seed: int = 0
    """Of the draws and the random controls."""


@torch.no_grad()
def evaluate(
    gemma: Gemma,
    subjects: Sequence[Subject],
    items: Sequence[Tokens],
    labels: ConceptLabels | None = None,
    config: EvaluateConfig | None = None,
    *,
    tasks: ConceptLabels | None = None,
    progress: Progress | None = None,
    about: Mapping[str, Any] | None = None,
) -> tuple[Evaluation, ...]:
    """Measure every dictionary on ``items``, held-out documents.

    ``labels`` makes concepts measured too; ``tasks`` are labels that are only probed for.

    Raises SiteError for a site the model does not have, InputError when a
    dictionary or the labels do not fit.
    """
    config = config or EvaluateConfig()
    for subject in subjects:
        subject.check(gemma)
    known = [one for one in (labels, tasks if config.probes else None) if one is not None]
    wanted = ConceptLabels.joined(known, items) if known else None
    some = items[: _first(items, config.splice_tokens)]
    count = Counter(items, some, subjects, config, progress)
    reading = read(gemma, subjects, items, wanted, config, count.read)
    fidelities = [sums.result() for sums in reading.sums]
    extra = reading.control_changes(fidelities) if config.controls else []
    means = {site: moments.spread().mean.float() for site, moments in reading.moments.items()}
    spliced, effects = splice_losses(
        gemma, subjects, means, some, extra=extra, batch_tokens=config.batch_tokens, progress=count.splice
    )
    probes: Sequence[ProbeReport | None] = [None] * len(subjects)
    if wanted is not None and config.probes:
        own = Study(tuple(subjects), reading.labelled, wanted, tuple(items), config.batch_tokens, config.seed)
        probes = study(gemma, own, config.random_model)
    notes = {"documents": len(items), "positions": RULE, "provenance": _provenance(config), **(about or {})}
    found = tuple(
        _evaluation(gemma, i, reading, fidelities, spliced, effects, probes[i], labels, config, notes)
        for i in range(len(subjects))
    )
    if not config.first_letters:
        return found
    letters = first_letters(gemma, subjects, batch_tokens=config.batch_tokens, seed=config.seed)
    return tuple(replace(one, first_letters=own) for one, own in zip(found, letters, strict=True))


def _provenance(config: EvaluateConfig) -> dict[str, Any]:
    return collect(seeds={"seed": config.seed}).as_dict()


def _evaluation(
    gemma: Gemma,
    i: int,
    reading: "Reading",
    fidelities: Sequence[Fidelity],
    spliced: Sequence[Spliced],
    effects: Sequence[Effect],
    probes: ProbeReport | None,
    labels: ConceptLabels | None,
    config: EvaluateConfig,
    notes: Mapping[str, Any],
) -> Evaluation:
    subject = reading.subjects[i]
    concepts = None
    if labels is not None:
        rows = reading.labelled
        marks = rows.marks[:, : len(labels.names)]
        concepts = score_concepts(rows.active(i), marks, labels.names, labels.passages)
    small = subject.dictionary.n_latents * subject.dictionary.d_out * subject.dictionary.n_positions <= 1 << 30
    return Evaluation(
        model=gemma.name,
        site=subject.reads[0],
        d_sae=subject.dictionary.d_sae,
        fidelity=fidelities[i],
        loss=spliced[i].loss,
        concepts=concepts,
        about=dict(notes),
        name=subject.name,
        kind=subject.dictionary.kind,
        reads=tuple(map(str, subject.reads)),
        writes=tuple(map(str, subject.writes)),
        architecture=subject.dictionary.activation.kind,
        geometry=geometry(subject.dictionary) if config.geometry and small else None,
        controls=reading.control_lines(i, fidelities, effects) if config.controls else (),
        probes=probes,
        intervals=intervals(reading.sums[i], spliced[i], config.seed),
        documents=columns(reading.sums[i], spliced[i]),
    )


def _first(items: Sequence[Tokens], tokens: int | None) -> int:
    """How many documents it takes to have ``tokens`` tokens."""
    count, seen = 0, 0
    while count < len(items) and (tokens is None or seen < tokens):
        seen += len(items[count].ids)
        count += 1
    return count


class Counter:
    """One count of tokens for the reading pass and the passes of the losses."""

    def __init__(
        self,
        items: Sequence[Tokens],
        some: Sequence[Tokens],
        subjects: Sequence[Subject],
        config: EvaluateConfig,
        progress: Progress | None,
    ) -> None:
        self._whole, part = (sum(len(item.ids) for item in group) for group in (items, some))
        changes = len(subjects) * (3 if config.controls else 1) + 2 * len({subject.writes for subject in subjects})
        self._total = self._whole + part * (1 + changes)
        self._progress = progress

    def read(self, done: int, _: int) -> None:
        """Tokens that were read."""
        self._report(done)

    def splice(self, done: int, _: int) -> None:
        """Tokens whose loss was measured."""
        self._report(self._whole + done)

    def _report(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, self._total)


class Reading:
    """What one pass over the documents leaves of every dictionary."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        gemma: Gemma,
        documents: int,
        config: EvaluateConfig,
        probed: frozenset[int] = frozenset(),
        rows: int = 0,
    ) -> None:
        self.subjects = tuple(subjects)
        self.sites = tuple(dict.fromkeys(site for subject in subjects for site in subject.sites))
        written = dict.fromkeys(site for subject in subjects for site in subject.writes)
        self.moments = {site: Moments(gemma.width(site), documents) for site in written}
        self.sums = [self._sums(subject, documents) for subject in subjects]
        self.labelled = LabelledRows(len(subjects), probed)
        self.random: list[Subject] = []
        self._random_sums: list[FidelitySums] = []
        self._sample: dict[Site, list[Tensor]] = {site: [] for site in self.moments}
        self._every = max(1, rows // SAMPLE)
        self._config, self._documents = config, documents

    def _sums(self, subject: Subject, documents: int) -> FidelitySums:
        errors = [ErrorSums(str(site), self.moments[site], documents) for site in subject.writes]
        return FidelitySums(subject.dictionary, errors, documents)

    def add(self, rows: Mapping[Site, Float[Tensor, "rows _"]], places: Places) -> list[tuple[Support, Tensor]]:
        """Take in the content rows of one batch; returns the codes of every dictionary."""
        targets = {
            site: Targets.of(rows[site], moments.add(rows[site], places)) for site, moments in self.moments.items()
        }
        codes = [
            self._add(subject, sums, rows, places, targets)
            for subject, sums in zip(self.subjects, self.sums, strict=True)
        ]
        if self._config.controls:
            if not self.random:
                self._start_controls(rows, codes)
            for site, held in self._sample.items():
                held.append(rows[site][:: self._every].float().cpu())
            for subject, sums in zip(self.random, self._random_sums, strict=True):
                self._add(subject, sums, rows, places, targets)
        return codes

    def _add(
        self,
        subject: Subject,
        sums: FidelitySums,
        rows: Mapping[Site, Tensor],
        places: Places,
        targets: Mapping[Site, Targets],
    ) -> tuple[Support, Tensor]:
        x = subject.stack(rows)
        support, values = subject.codes(x)
        recon = subject.reconstruct(x, support, values)
        sums.add(support, values, places)
        for position, (site, error) in enumerate(zip(subject.writes, sums.errors, strict=True)):
            error.add(targets[site], recon[:, position], places)
        written = [targets[site] for site in subject.writes]
        for size in subject.dictionary.prefixes:
            if size >= subject.dictionary.d_sae:
                continue
            first, kept = first_latents(subject, size, x, support, values)
            sums.add_prefix(size, len(kept), written, first)
        return support, values

    def _start_controls(self, rows: Mapping[Site, Tensor], codes: Sequence[tuple[Support, Tensor]]) -> None:
        """Random dictionaries, set on the first batch."""
        for i, subject in enumerate(self.subjects):
            count = max(1, codes[i][0].batch)
            y = torch.stack([rows[site] for site in subject.writes], 1)
            made = random_like(subject, subject.stack(rows), y, len(codes[i][1]) / count, self._config.seed + i)
            self.random.append(made)
            self._random_sums.append(self._sums(made, self._documents))

    def control_changes(self, fidelities: Sequence[Fidelity]) -> list[Change]:
        """Changes to the model for every random dictionary, then for every PCA."""
        self._principal = {site: Principal(torch.cat(held)) for site, held in self._sample.items()}
        found = [Change.splice(subject) for subject in self.random]
        for subject, fidelity in zip(self.subjects, fidelities, strict=True):
            count = components(subject, self._principal, fidelity.l0)
            found.append(
                Change.functions(
                    {site: lambda x, p=self._principal[site], k=k: p.project(x, k) for site, k in count.items()}
                )
            )
        return found

    def control_lines(self, i: int, fidelities: Sequence[Fidelity], effects: Sequence[Effect]) -> tuple[Control, ...]:
        """The controls of one dictionary."""
        n, made = len(self.subjects), self._random_sums[i].result()
        drawn, projected = effects[i], effects[n + i]
        count = components(self.subjects[i], self._principal, fidelities[i].l0)
        fvu = sum(self._principal[site].fvu(k) for site, k in count.items()) / len(count)

        def delta(effect: Effect) -> float:
            return effect.mean("loss") - effect.mean("original")

        return (
            Control("random dictionary", made.l0, made.fvu, delta(drawn), drawn.mean("kl")),
            Control("PCA at equal k", float(sum(count.values())), fvu, delta(projected), projected.mean("kl")),
        )


def first_latents(
    subject: Subject, size: int, x: Float[Tensor, "rows n d_in"], support: Support, values: Float[Tensor, " active"]
) -> tuple[Float[Tensor, "rows n d_out"], Float[Tensor, " kept"]]:
    """The reconstruction from the first ``size`` latents of every position, and which activations that takes.

    A TopK chooses anew among them.
    """
    one = subject.dictionary
    if one.activation.top is not None:
        small = one.prefix(size)
        support, values = small.codes(x)
        return small.reconstruct(x, support, values), values
    kept = (support.latents % one.d_sae) < size
    part = Support(support.rows[kept], support.latents[kept], support.batch, support.d_sae)
    return subject.reconstruct(x, part, values[kept]), values[kept]


def read(
    gemma: Gemma,
    subjects: Sequence[Subject],
    items: Sequence[Tokens],
    labels: ConceptLabels | None,
    config: EvaluateConfig,
    progress: Progress,
) -> Reading:
    """The one pass over the documents."""
    if not items:
        raise InputError("there are no documents, so there is no spread to explain; give some text.")
    probed = chosen_documents(items, config.probe_rows, config.seed) if config.probes else frozenset[int]()
    content = sum(int(item.content_mask.sum()) for item in items)
    reading = Reading(subjects, gemma, len(items), config, probed, content)
    done, total = 0, sum(len(item.ids) for item in items)
    for chosen, batch in bucketed(gemma, items, config.batch_tokens):
        captured, mask = gemma.capture(batch, reading.sites), content_mask(batch)
        rows = {site: captured[site][mask.to(captured[site].device)] for site in reading.sites}
        rows = {site: x if x.dtype == torch.float64 else x.float() for site, x in rows.items()}
        places = Places.of(batch, chosen, mask)
        codes = reading.add(rows, places)
        if labels is not None:
            reading.labelled.add(
                codes, rows, torch.cat([labels.marks[i][items[i].content_mask] for i in chosen]), places.document
            )
        done += int(batch.mask.sum())
        progress(done, total)
    return reading
