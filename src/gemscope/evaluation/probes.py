"""Linear probes for labels, on few latents and on everything, and how they are scored.

- *k-sparse probe*: logistic regression on the k features whose means on positive and negative training rows differ
  most, in units of the feature's standard deviation (Gurnee et al. 2023; for latents Gao et al. 2024);
- *dense probe*: logistic regression on all dimensions of the activation; *all latents*: on all of a dictionary's;
- *token statistics*: no activation at all, but the share of positives among training rows of the same token, and of the
  same pair of it and the one before, each pulled towards the one it refines.

All are fitted on some documents and scored on others (documents are dealt by the hash of their tokens), by AUROC, by F1
and by balanced accuracy, each at the threshold that is best for it on the training rows. Logistic
regressions minimise the sum of log losses plus half the squared norm of the coefficients of standardised features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.evaluation.bootstrap import Interval, central, ratios

KS = (1, 2, 5, 16)
"""Sizes of the k-sparse probes that are shown."""

CONTROLS = (
    "token statistics",
    "random dictionary",
    "neurons",
    "PCA",
    "shuffled labels",
    "random model",
    "random model, dense",
)
"""Methods that a dictionary's own are held against."""


@dataclass(frozen=True)
class Score:
    """How one method tells positives from negatives, on documents that it was not fitted on."""

    method: str
    k: int | None
    """Features that it uses; None: all."""
    auroc: float
    auroc_interval: tuple[float, float] | None
    f1: float
    f1_interval: tuple[float, float] | None
    accuracy: float | None = None
    """Balanced: the mean of the shares of positives and of negatives that are called right."""


@dataclass(frozen=True)
class Absorption:
    """How often latents for something more special leave the latents of a concept silent (see ``absorption``)."""

    full: float
    """Share of the probe's true positives at which they are silent and one other latent stands in."""
    partial: float
    """Mean share of the stand-ins in what latents write along the probe."""
    true_positives: int
    stand_ins: tuple[tuple[int, int], ...] = ()
    """Latent, and at how many tokens it stood in fully; the most frequent first."""


@dataclass(frozen=True)
class Probed:
    """One label."""

    concept: str
    positives: int
    """On the test rows."""
    scores: tuple[Score, ...]
    latent: int
    """The best latent on the training rows, by AUROC; its score is the method ``best latent``."""
    splits: int | None = None
    """Latents until one more raises the F1 of a k-sparse probe by 0.03 or less."""
    parent: str | None = None
    absorption: Absorption | None = None
    """None where nothing is below the concept, or the kind has no single place to probe."""
    absorption_random: float | None = None
    """``full`` of the random dictionary."""

    def score(self, method: str, k: int | None = None) -> Score | None:
        """One of the scores."""
        return next((one for one in self.scores if (one.method, one.k) == (method, k)), None)


@dataclass(frozen=True)
class ProbeReport:
    """All labels."""

    train_rows: int
    test_rows: int
    concepts: tuple[Probed, ...]
    too_few: Mapping[str, int] = field(default_factory=dict[str, int])
    """Labels with too few positives on one side, and how many there are."""

    def mean(self, method: str, k: int | None = None, prefix: str | None = None) -> float | None:
        """Mean AUROC over labels; ``prefix`` keeps names that begin with it, '!' and a prefix those that do not."""
        found = [
            score.auroc
            for one in self.concepts
            if _wanted(one.concept, prefix) and (score := one.score(method, k)) is not None
        ]
        return sum(found) / len(found) if found else None

    @property
    def methods(self) -> tuple[tuple[str, int | None], ...]:
        """Method and k of every score, in order."""
        return tuple(dict.fromkeys((s.method, s.k) for one in self.concepts for s in one.scores))

    @property
    def absorption(self) -> float | None:
        """Mean of the full absorption over the labels that have one."""
        found = [one.absorption.full for one in self.concepts if one.absorption is not None]
        return sum(found) / len(found) if found else None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        means = [{"method": m, "k": k, "auroc": self.mean(m, k)} for m, k in self.methods]
        return asdict(self) | {"mean_auroc": means, "mean_absorption": self.absorption}


def _wanted(name: str, prefix: str | None) -> bool:
    if prefix is None:
        return True
    return not name.startswith(prefix[1:]) if prefix.startswith("!") else name.startswith(prefix)


def logistic(
    x: Float[Tensor, "labels rows k"], y: Bool[Tensor, "rows labels"], rounds: int = 60
) -> Float[Tensor, "labels k_plus_1"]:
    """Coefficients and, last, the intercept of one logistic regression per label, by Newton's method with halving.

    The penalty is on the coefficients and not on the intercept. ``x`` is taken as it is.
    """
    one = torch.cat([x.double(), torch.ones(*x.shape[:2], 1, dtype=torch.float64)], dim=2)
    target = y.T.double()
    penalty = torch.ones(one.shape[2], dtype=torch.float64)
    penalty[-1] = 1e-8
    weight = torch.zeros(len(one), one.shape[2], dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        z = torch.einsum("lrk,lk->lr", one, w)
        return (torch.nn.functional.softplus(z) - target * z).sum(1) + 0.5 * (penalty * w * w).sum(1)

    current = loss(weight)
    for _ in range(rounds):
        p = torch.einsum("lrk,lk->lr", one, weight).sigmoid()
        gradient = torch.einsum("lrk,lr->lk", one, p - target) + penalty * weight
        if float(gradient.abs().max()) < 1e-9:
            break
        hessian = torch.einsum("lrk,lr,lrj->lkj", one, p * (1 - p), one) + torch.diag(penalty)
        step = torch.linalg.solve(hessian, gradient)
        size = torch.ones(len(one), 1, dtype=torch.float64)
        for _ in range(30):
            tried = loss(weight - size * step)
            worse = tried > current + 1e-12 * current.abs()
            if not bool(worse.any()):
                break
            size = torch.where(worse[:, None], size / 2, size)
        weight, current = weight - size * step, loss(weight - size * step)
    return weight


def dense_logistic(
    x: Float[Tensor, "rows width"], y: Bool[Tensor, "rows labels"], rounds: int = 120
) -> Float[Tensor, "width_plus_1 labels"]:
    """The same for all labels on all columns of ``x`` at once, by L-BFGS; ``x`` should be whitened, or is sparse."""
    x, target = x.double(), y.double()
    start = target.mean(0).clamp(1e-6, 1 - 1e-6)
    weight = torch.zeros(x.shape[1] + 1, target.shape[1], dtype=torch.float64)
    weight[-1] = (start / (1 - start)).log()
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=rounds, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        z = x @ weight[:-1] + weight[-1]
        loss = (torch.nn.functional.softplus(z) - target * z).sum() + 0.5 * weight[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return weight.detach()


def token_statistics(
    pairs: Int[Tensor, "rows 2"], train: Bool[Tensor, " rows"], y: Bool[Tensor, "rows labels"]
) -> Float[Tensor, "rows labels"]:
    """Share of positives among the training rows with the same (previous, own) token, pulled by one row's weight
    towards that of the own token, which is pulled likewise towards that of all.
    """
    known = y.double() * train[:, None]
    prior = known.sum(0) / train.sum().clamp(min=1)

    def share(key: Tensor, below: Tensor) -> Tensor:
        _, group = key.unique(return_inverse=True)
        size = int(group.max()) + 1
        hits = torch.zeros(size, y.shape[1], dtype=torch.float64).index_add(0, group, known)
        count = torch.zeros(size, dtype=torch.float64).index_add(0, group, train.double())
        return (hits[group] + below) / (count[group][:, None] + 1)

    own = share(pairs[:, 1], prior.expand_as(known))
    return share(pairs[:, 0] * (int(pairs.max()) + 1) + pairs[:, 1], own)


def _below(values: Float[Tensor, " rows"], others: Float[Tensor, " n"]) -> Float[Tensor, " rows"]:
    """Share of ``others`` below each value, equal ones counting half."""
    ordered = others.sort().values
    less = torch.searchsorted(ordered, values.contiguous())
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (less + up_to).double() / (2 * len(others))


def auroc(score: Float[Tensor, " rows"], y: Bool[Tensor, " rows"]) -> float:
    """The Mann-Whitney statistic: the share of pairs of a positive and a negative in the right order, ties half."""
    return float(_below(score[y].double(), score[~y].double()).mean())


def auroc_intervals(
    scores: Float[Tensor, "rows labels"],
    y: Bool[Tensor, "rows labels"],
    documents: Int[Tensor, " rows"],
    count: int,
    seed: int = 0,
) -> list[Interval]:
    """The interval of each column's AUROC when ``documents`` (indices below ``count``) are drawn anew.

    A draw is taken of the two averages that make it to first order: the share of negatives below each positive, and
    the share of positives above each negative (DeLong et al. 1988; for clusters Obuchowski 1997).
    """
    labels = scores.shape[1]
    sums = torch.zeros(4, count, labels, dtype=torch.float64)
    values = torch.zeros(labels, dtype=torch.float64)
    for column in range(labels):
        mark, score = y[:, column], scores[:, column].double()
        beaten, beating = _below(score[mark], score[~mark]), 1 - _below(score[~mark], score[mark])
        values[column] = beaten.mean()
        for i, (value, mask) in enumerate(((beaten, mark), (beating, ~mark))):
            sums[2 * i, :, column].index_add_(0, documents[mask], value)
            sums[2 * i + 1, :, column].index_add_(0, documents[mask], torch.ones_like(value))
    drawn = ratios(sums[0], sums[1], seed) + ratios(sums[2], sums[3], seed) - values
    enough = ((sums[1] > 0).sum(0) > 1) & ((sums[3] > 0).sum(0) > 1)
    found = [central(drawn[:, column]) if enough[column] else None for column in range(labels)]
    return [None if one is None else (max(0.0, one[0]), min(1.0, one[1])) for one in found]


def best_threshold(score: Float[Tensor, " rows"], y: Bool[Tensor, " rows"]) -> float:
    """Where "score ≥ threshold" has the best F1; the highest of equal ones. "Everything" is a candidate like others."""
    ordered, order = score.double().sort(descending=True)
    hits = y[order].double().cumsum(0)
    last = torch.ones(len(score), dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    f1 = 2 * hits / (torch.arange(1, len(score) + 1) + y.sum())
    f1[~last] = -1.0
    return float(ordered[int(f1.argmax())])


def best_balance(score: Float[Tensor, " rows"], y: Bool[Tensor, " rows"]) -> float:
    """Where "score ≥ threshold" has the best balanced accuracy; the highest of equal ones."""
    ordered, order = score.double().sort(descending=True)
    right, wrong = y[order].double().cumsum(0) / y.sum(), (~y[order]).double().cumsum(0) / (~y).sum()
    last = torch.ones(len(score), dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return float(ordered[int(torch.where(last, right - wrong, -1.0).argmax())])


def accuracy_at(score: Float[Tensor, " rows"], y: Bool[Tensor, " rows"], threshold: float) -> float:
    """Balanced accuracy of "score ≥ threshold", which is the accuracy to expect on as many positives as negatives."""
    said = score.double() >= threshold
    return (float(said[y].double().mean()) + float((~said[~y]).double().mean())) / 2


def f1_at(score: Float[Tensor, " rows"], y: Bool[Tensor, " rows"], threshold: float) -> float:
    """F1 of "score ≥ threshold": 2 TP / (predicted + positives)."""
    said = score.double() >= threshold
    return 2 * float((said & y).sum()) / max(float(said.sum() + y.sum()), 1e-300)


def f1_intervals(
    scores: Float[Tensor, "rows labels"],
    y: Bool[Tensor, "rows labels"],
    thresholds: Float[Tensor, " labels"],
    documents: Int[Tensor, " rows"],
    count: int,
    seed: int = 0,
) -> list[Interval]:
    """The interval of each column's F1 at its threshold when documents are drawn anew."""
    said = scores.double() >= thresholds
    above, below = (
        torch.zeros(count, scores.shape[1], dtype=torch.float64).index_add(0, documents, value)
        for value in (2.0 * (said & y).double(), said.double() + y.double())
    )
    drawn = ratios(above, below, seed)
    return [central(drawn[:, i]) if int((below[:, i] > 0).sum()) > 1 else None for i in range(drawn.shape[1])]


def mean_accuracy(report: ProbeReport, method: str, k: int | None = None) -> float | None:
    """Mean balanced accuracy over labels."""
    found = [
        score.accuracy
        for one in report.concepts
        if (score := one.score(method, k)) is not None and score.accuracy is not None
    ]
    return sum(found) / len(found) if found else None


def means_of(reports: Sequence[ProbeReport]) -> dict[tuple[str, int | None], list[float | None]]:
    """Mean AUROC of every method, one entry per report."""
    methods = dict.fromkeys(method for report in reports for method in report.methods)
    return {method: [report.mean(*method) for report in reports] for method in methods}
