"""Every probe of every dictionary on labelled rows, and the controls beside them.

Per label, on documents that nothing was fitted on:

- the best single latent (by AUROC on the training rows, as it is, without a fit), k-sparse probes on latents, and a
  probe on all latents;
- the dense probe on the activation, and token statistics;
- controls: k-sparse probes on a random dictionary of the same size and L0, on the raw coordinates of the activation
  (*neurons*) and on its principal components; on latents with *shuffled labels* (those of other documents, so that
  they keep their runs and number); and on a random dictionary and dense for the model with *random weights*.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gemscope.activations.positions import bucketed, content_mask
from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.core.sites import Site
from gemscope.evaluation.absorption import absorption, splits
from gemscope.evaluation.concepts import ActiveEntries, ConceptLabels, auroc_matrix
from gemscope.evaluation.controls import Principal, random_like, random_weights
from gemscope.evaluation.features import Dense, Features, Sparse, strongest
from gemscope.evaluation.labelled import LabelledRows
from gemscope.evaluation.probes import (
    KS,
    Absorption,
    Probed,
    ProbeReport,
    Score,
    accuracy_at,
    auroc,
    auroc_intervals,
    best_balance,
    best_threshold,
    dense_logistic,
    f1_at,
    f1_intervals,
    logistic,
    token_statistics,
)
from gemscope.evaluation.subject import Subject
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Tokens

MIN_POSITIVES = 10
"""On the training rows and on the test rows."""

SPLIT_KS = (1, 2, 3, 4, 5)
ALL_ROUNDS = 60
"""Steps that the probes on all latents are fitted for, at most."""
MOST_WHITE = 512
"""Principal components that dense probes are fitted on, at most."""


DenseProbes = tuple[Float[Tensor, "rows labels"], Float[Tensor, "width labels"]]
"""What the dense probes say of every row, and their directions."""


@dataclass(frozen=True, eq=False)
class Study:
    """What is probed."""

    subjects: tuple[Subject, ...]
    rows: LabelledRows
    labels: ConceptLabels
    items: tuple[Tokens, ...]
    batch_tokens: int = 4096
    seed: int = 0
    absorb_all: bool = False
    """Measure absorption of every label, and not only of those with others below them."""


def is_training(tokens: Tokens) -> bool:
    """Whether a document is fitted on: by the hash of its tokens, so that equal documents fall on the same side."""
    return hashlib.blake2b(tokens.ids.numpy().tobytes(), digest_size=1).digest()[0] % 2 == 0


@dataclass(frozen=True, eq=False)
class _Table:
    """The probed rows."""

    at: Int[Tensor, " rows"]
    """Their index among all rows."""
    y: Bool[Tensor, "rows labels"]
    names: tuple[str, ...]
    train: Bool[Tensor, " rows"]
    documents: Int[Tensor, " rows"]
    count: int
    """Documents, probed or not."""
    pairs: Int[Tensor, "rows 2"]
    seed: int

    def score(
        self, method: str, k: int | None, values: Float[Tensor, "rows labels"], y: Tensor | None = None
    ) -> list[Score]:
        """AUROC, F1 and balanced accuracy of one method for every label."""
        y, test = self.y if y is None else y, ~self.train
        columns = range(len(self.names))
        cuts = torch.tensor(
            [best_threshold(values[self.train, i], y[self.train, i]) for i in columns], dtype=torch.float64
        )
        levels = [best_balance(values[self.train, i], y[self.train, i]) for i in columns]
        held, marks, documents = values[test], y[test], self.documents[test]
        areas = auroc_intervals(held, marks, documents, self.count, self.seed)
        rates = f1_intervals(held, marks, cuts, documents, self.count, self.seed)
        return [
            Score(
                method,
                k,
                auroc(held[:, i], marks[:, i]),
                areas[i],
                f1_at(held[:, i], marks[:, i], float(cuts[i])),
                rates[i],
                accuracy_at(held[:, i], marks[:, i], levels[i]),
            )
            for i in columns
        ]


def study(gemma: Gemma, this: Study, random_model: bool = True) -> list[ProbeReport]:
    """One report per dictionary; what does not depend on the dictionary is fitted once for each site."""
    table, too_few = _table(this)
    train, test = int(table.train.sum()), int((~table.train).sum())
    if not table.names:
        return [ProbeReport(train, test, (), too_few) for _ in this.subjects]
    shared: dict[Site, list[list[Score]]] = {}
    blank = random_weights(gemma, this.seed) if random_model else None
    random_rows = _random_rows(blank, this, table) if blank is not None else {}
    tokens = [table.score("token statistics", None, token_statistics(table.pairs, table.train, table.y))]
    dense: dict[Site, DenseProbes] = {}
    found: list[ProbeReport] = []
    for i, subject in enumerate(this.subjects):
        site = _place(subject)
        for needed in {site, subject.writes[0]} - dense.keys():
            dense[needed] = _dense(table, this.rows.x(needed))
        if site not in shared:
            own_lines = _of_site(table, this.rows.x(site), dense[site])
            shared[site] = [*tokens, *own_lines, *_random_dense(table, random_rows.get(site))]
        own = _of_dictionary(this, table, i, random_rows, dense)
        concepts = [
            Probed(
                concept=name,
                positives=int(table.y[~table.train, column].sum()),
                scores=tuple(line[column] for line in (*own.scores, *shared[site])),
                latent=int(own.latents[column]),
                splits=own.splits[column],
                parent=this.labels.parents.get(name),
                absorption=own.absorbed.get(name),
                absorption_random=own.absorbed_random.get(name),
            )
            for column, name in enumerate(table.names)
        ]
        found.append(ProbeReport(train, test, tuple(concepts), too_few))
    return found


def _place(subject: Subject) -> Site:
    """The site whose activations stand beside a dictionary: what it reads, for several layers the middle one."""
    return subject.reads[len(subject.reads) // 2]


def _table(this: Study) -> tuple[_Table, dict[str, int]]:
    at = this.rows.probed
    documents, marks = this.rows.documents[at], this.rows.marks[at]
    side = torch.tensor([is_training(item) for item in this.items], dtype=torch.bool)
    train = side[documents]
    enough = torch.ones(marks.shape[1], dtype=torch.bool)
    for mask in (train, ~train):
        positives = marks[mask].sum(0)
        enough &= (positives >= MIN_POSITIVES) & (int(mask.sum()) - positives >= MIN_POSITIVES)
    chosen = enough.nonzero()[:, 0].tolist()
    too_few = {name: int(marks[:, i].sum()) for i, name in enumerate(this.labels.names) if i not in chosen}
    names = tuple(this.labels.names[i] for i in chosen)
    pairs = _pairs(this, documents)
    return _Table(at, marks[:, chosen], names, train, documents, len(this.items), pairs, this.seed), too_few


def _pairs(this: Study, documents: Int[Tensor, " rows"]) -> Int[Tensor, "rows 2"]:
    """The previous token and the own one of each probed row; a document's rows stand together and in order."""
    parts: list[Tensor] = []
    order = documents.unique_consecutive().tolist() if len(documents) else []
    for i in order:
        ids, mask = this.items[i].ids, this.items[i].content_mask
        parts.append(torch.stack([ids.roll(1), ids], 1)[mask])
    return torch.cat(parts) if parts else torch.zeros(0, 2, dtype=torch.long)


@dataclass(frozen=True)
class _Own:
    """What was found of one dictionary."""

    scores: list[list[Score]]
    latents: Int[Tensor, " labels"]
    splits: list[int]
    absorbed: Mapping[str, Absorption]
    absorbed_random: Mapping[str, float]


def _of_dictionary(
    this: Study, table: _Table, i: int, random_rows: Mapping[Site, Tensor], dense: Mapping[Site, DenseProbes]
) -> _Own:
    subject = this.subjects[i]
    active = this.rows.active(i).only(table.at)
    latents, best = _best_latent(table, active)
    chosen, f1, scores = _sparse(table, "latents", Sparse(active), sorted({*KS, *SPLIT_KS}))
    split = [splits([f1[k][column] for k in SPLIT_KS]) for column in range(len(table.names))]
    shuffled = _sparse(table, "shuffled labels", Sparse(active), KS, _shuffled(table))[2]
    x = {site: this.rows.x(site) for site in subject.sites}
    l0 = len(active.value) / max(active.shape[0], 1)
    control = _random_codes(subject, x, l0, this.seed)
    random = _sparse(table, "random dictionary", Sparse(control[1]), KS)
    lines = [best, *scores, table.score("all latents", None, _all_latents(table, active)), *random[2], *shuffled]
    if random_rows:
        codes = _random_codes(subject, random_rows, l0, this.seed)[1]
        lines += _sparse(table, "random model", Sparse(codes), KS)[2]
    absorbed = _absorbed(this, table, subject, dense, active, chosen, split)
    floor = _absorbed(this, table, control[0], dense, control[1], random[0], split)
    return _Own(lines, latents, split, absorbed, {name: one.full for name, one in floor.items()})


def _best_latent(table: _Table, active: ActiveEntries) -> tuple[Int[Tensor, " labels"], list[Score]]:
    """The latent with the highest AUROC on the training rows, for each label, and its scores on the others."""
    rows = table.train.nonzero()[:, 0]
    latents = auroc_matrix(active.only(rows), table.y[rows]).argmax(0)
    values = Sparse(active).columns(latents[:, None])[:, :, 0].T
    return latents, table.score("best latent", 1, values)


def _sparse(
    table: _Table, method: str, features: Features, ks: Sequence[int], y: Bool[Tensor, "rows labels"] | None = None
) -> tuple[Int[Tensor, "labels k"], dict[int, list[float]], list[list[Score]]]:
    """Chosen features, the strongest first; F1 on the test rows for every k; the scores of those k that are shown."""
    y = table.y if y is None else y
    chosen = strongest(features.contrast(table.train, y), max(ks))
    x = features.columns(chosen)
    scale = x[:, table.train].double().std(1, correction=0)
    x = x.double() / torch.where(scale > 0, scale, 1.0)[:, None]
    f1: dict[int, list[float]] = {}
    shown: list[list[Score]] = []
    for k in ks:
        part = x[:, :, :k]
        weight = logistic(part[:, table.train], y[table.train])
        values = torch.einsum("lrk,lk->rl", part, weight[:, :-1]) + weight[:, -1]
        scores = table.score(method, k, values, y)
        f1[k] = [score.f1 for score in scores]
        if k in KS:
            shown.append(scores)
    return chosen, f1, shown


def _shuffled(table: _Table) -> Bool[Tensor, "rows labels"]:
    """Labels laid over other documents: in the order of the documents drawn by lot, on each side of the split.

    Runs and numbers stay. Moving all labels by one distance would not do: documents of one length stand together, and
    where they are of one pattern the moved labels follow it too.
    """
    lots = torch.randperm(table.count, generator=torch.Generator().manual_seed(table.seed))
    y = torch.empty_like(table.y)
    for side in (table.train, ~table.train):
        rows = side.nonzero()[:, 0]
        y[rows] = table.y[rows[lots[table.documents[rows]].argsort(stable=True)]]
    return y


def _all_latents(table: _Table, active: ActiveEntries) -> Float[Tensor, "rows labels"]:
    """What probes on every latent say of every row; latents in units of their standard deviation on training rows."""
    rows, value, size = active.shape[0], active.value.double(), int(table.train.sum())
    known, zeros = table.train[active.row], torch.zeros(active.shape[1], dtype=torch.float64)
    whole, squares = (zeros.index_add(0, active.latent[known], v[known]) / size for v in (value, value.square()))
    deviation = (squares - whole.square()).clamp_min(0.0).sqrt()
    value = torch.where(deviation > 0, 1 / deviation.clamp_min(1e-300), 0.0)[active.latent] * value
    place = table.train.long().cumsum(0) - 1
    fitted = torch.stack([place[active.row[known]], active.latent[known]]).long()
    every = torch.stack([active.row, active.latent]).long()
    train = torch.sparse_coo_tensor(fitted, value[known], (size, active.shape[1]), check_invariants=False)
    whole_x = torch.sparse_coo_tensor(every, value, (rows, active.shape[1]), check_invariants=False)
    weight = dense_logistic(train.coalesce(), table.y[table.train], ALL_ROUNDS)
    return whole_x @ weight[:-1] + weight[-1]


def _white(x: Float[Tensor, "rows width"], train: Bool[Tensor, " rows"]) -> tuple[Tensor, Tensor, Tensor]:
    """Whitened rows, the mean of the training rows, and the map [width, components] that whitens."""
    principal = Principal(x[train])
    count = min(MOST_WHITE, int((principal.values > 1e-9 * principal.values[0]).sum()))
    scale = (principal.values[:count] / int(train.sum())).sqrt()
    basis = principal.directions[:, :count] / scale
    return (x.double() - principal.mean) @ basis, principal.mean, basis


def _dense(table: _Table, x: Float[Tensor, "rows width"]) -> DenseProbes:
    """The dense probes at one site."""
    white, _, basis = _white(x, table.train)
    weight = dense_logistic(white[table.train], table.y[table.train])
    return white @ weight[:-1] + weight[-1], basis @ weight[:-1]


def _of_site(table: _Table, x: Float[Tensor, "rows width"], probes: DenseProbes) -> list[list[Score]]:
    white, mean, _ = _white(x, table.train)
    lines = [table.score("dense", None, probes[0])]
    lines += _sparse(table, "neurons", Dense(x.double() - mean), KS)[2]
    return [*lines, *_sparse(table, "PCA", Dense(white), KS)[2]]


def _random_dense(table: _Table, x: Float[Tensor, "rows width"] | None) -> list[list[Score]]:
    return [] if x is None else [table.score("random model, dense", None, _dense(table, x)[0])]


def _random_codes(
    subject: Subject, x: Mapping[Site, Float[Tensor, "rows _"]], l0: float, seed: int
) -> tuple[Subject, ActiveEntries]:
    """A random dictionary in place of ``subject``, and its codes."""
    read, written = subject.stack(x), torch.stack([x[site] for site in subject.writes], 1)
    made = random_like(subject, read[:4096], written[:4096], l0, seed)
    device = next(made.dictionary.parameters()).device
    support, value = made.codes(read.to(device))
    shape = (support.batch, support.d_sae)
    return made, ActiveEntries(shape, support.rows.cpu(), support.latents.cpu(), value.cpu())


def _random_rows(blank: Gemma, this: Study, table: _Table) -> dict[Site, Tensor]:
    """The probed rows' activations in the model with random weights."""
    sites = tuple(dict.fromkeys(site for subject in this.subjects for site in subject.sites))
    wanted = set(table.documents.tolist())
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for chosen, batch in bucketed(blank, this.items, this.batch_tokens):
        if wanted.isdisjoint(chosen):
            continue
        seen, mask = blank.capture(batch, sites), content_mask(batch)
        kept = mask & torch.tensor([i in wanted for i in chosen])[:, None]
        for site in sites:
            parts[site].append(seen[site][kept.to(seen[site].device)].float().cpu())
    return {site: torch.cat(part) for site, part in parts.items()}


def _absorbed(
    this: Study,
    table: _Table,
    subject: Subject,
    dense: Mapping[Site, DenseProbes],
    active: ActiveEntries,
    chosen: Int[Tensor, "labels k"],
    split: Sequence[int],
) -> dict[str, Absorption]:
    """Of the labels with others below them, for kinds with one written site; on the test rows."""
    if subject.dictionary.n_positions > 1:
        return {}
    above = set(table.names) if this.absorb_all else set(this.labels.parents.values())
    y = this.rows.x(subject.writes[0])
    said, directions = dense[subject.writes[0]]
    decoder = subject.dictionary.decoder_rows(torch.arange(subject.dictionary.d_sae)).cpu()  # pyright: ignore
    test, found = ~table.train, dict[str, Absorption]()
    for column, name in enumerate(table.names):
        if name not in above:
            continue
        cut = best_threshold(said[table.train, column], table.y[table.train, column])
        positive = test & table.y[:, column] & (said[:, column] >= cut)
        direction = directions[:, column]
        projection = (y.double() - y[table.train].double().mean(0)) @ (direction / direction.norm().clamp_min(1e-300))
        main = chosen[column, : split[column]]
        found[name] = absorption(active, decoder, direction, projection, positive, main)
    return found
