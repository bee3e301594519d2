"""What the model loses when reconstructions take the place of activations, for every kind of dictionary.

The rule, the same for dictionaries and for both ablations:

- the input is whole: <bos> and chat markers stay in it;
- a place is read where the pass computes it, with everything earlier already replaced, and what is written is replaced
  at content positions only; special, template and padding positions keep the model's own. A TopK over several layers,
  which needs all of them before it can write, is read on the model's own pass instead;
- a prediction is counted when its target is a content token other than the first of its document. The first one is
  predicted before anything was replaced, so it cannot change, and counting it would dilute the difference; targets
  that are special tokens, template or padding are never counted.

Losses are cross-entropies in nats per counted prediction, log-softmax in fp32 (fp64 for a model in fp64), summed in
fp64; KL is KL(model ‖ spliced). A dictionary that returns its input changes no bit of the forward pass and so has a
delta loss of exactly 0; one that returns zeros is the zero ablation exactly.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gemscope.activations.harvest import Progress
from gemscope.activations.positions import bucketed, content_mask
from gemscope.core.arrays import Bool, Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.sparse import Support
from gemscope.evaluation.groups import Places, Sums, group_name
from gemscope.evaluation.subject import Subject
from gemscope.models.gemma import Gemma
from gemscope.models.interventions import Ablate, Edit, Intervention
from gemscope.models.tokens import Batch, Tokens

_AT_ONCE = 1 << 26
"""Logits converted at a time."""


@dataclass(frozen=True)
class GroupLoss:
    """The predictions of tokens in a stretch of positions, or of a speaker's."""

    name: str
    predictions: int
    delta_loss: float
    kl: float


@dataclass(frozen=True)
class SpliceLoss:
    """Cross-entropies over the same predictions, in nats."""

    predictions: int
    """Number of counted predictions."""
    original: float
    """The model as it is."""
    spliced: float
    """With the dictionary's reconstruction in place of the activation."""
    zero: float
    """With zeros in its place."""
    mean: float
    """With the mean activation in its place."""
    kl: float | None = None
    """Mean KL(model ‖ spliced) in nats."""
    kl_p95: float | None = None
    """Its 95th percentile over predictions: the smallest value that 95 % of them do not exceed."""
    top1: float | None = None
    """Share of predictions whose most likely token stays the same."""
    kl_zero: float | None = None
    """Mean KL(model ‖ zeros in its place)."""
    kl_mean: float | None = None
    by_group: tuple[GroupLoss, ...] = ()
    """By position of the predicted token, then by speaker."""

    @property
    def delta_loss(self) -> float:
        """spliced − original."""
        return self.spliced - self.original

    @property
    def recovered_zero(self) -> float | None:
        """Share of the loss of zero ablation that the dictionary recovers; None where zero ablation costs
        nothing.
        """
        return _recovered(self.spliced, self.zero, self.original)

    @property
    def recovered_mean(self) -> float | None:
        """The same against mean ablation, which is the harder comparison."""
        return _recovered(self.spliced, self.mean, self.original)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the derived numbers."""
        derived = {
            "delta_loss": self.delta_loss,
            "recovered_zero": self.recovered_zero,
            "recovered_mean": self.recovered_mean,
        }
        return asdict(self) | derived


def _recovered(spliced: float, ablated: float, original: float) -> float | None:
    return (ablated - spliced) / (ablated - original) if ablated > original else None


class Effect:
    """Running sums of one change to the model, over the counted predictions."""

    def __init__(self, documents: int) -> None:
        self.sums = Sums(("predictions", "original", "loss", "kl", "same"), documents)
        self._kl: list[Tensor] = []

    def add(self, places: Places, *values: Float[Tensor, " predictions"]) -> None:
        """Losses of the model and with the change, KL, and whether the first choice is the same."""
        self.sums.add(places, torch.ones(len(values[0])), *values)
        self._kl.append(values[2])

    def mean(self, name: str, group: int | None = None) -> float:
        """Per prediction."""
        return self.sums.total(name, group) / self.sums.total("predictions", group)

    @property
    def predictions(self) -> int:
        """Number counted."""
        return round(self.sums.total("predictions"))

    @property
    def kl_p95(self) -> float:
        """Smallest KL that 95 % of the predictions do not exceed."""
        count = -(-95 * self.predictions // 100)
        return float(torch.cat(self._kl).kthvalue(count).values) if count else 0.0

    def _loss(self, zero: "Effect", mean: "Effect") -> SpliceLoss:
        groups = tuple(
            GroupLoss(
                group_name(group),
                round(self.sums.total("predictions", group)),
                self.mean("loss", group) - self.mean("original", group),
                self.mean("kl", group),
            )
            for group in sorted(self.sums.groups)
        )
        return SpliceLoss(
            predictions=self.predictions,
            original=self.mean("original"),
            spliced=self.mean("loss"),
            zero=zero.mean("loss"),
            mean=mean.mean("loss"),
            kl=self.mean("kl"),
            kl_p95=self.kl_p95,
            top1=self.mean("same"),
            kl_zero=zero.mean("kl"),
            kl_mean=mean.mean("kl"),
            by_group=groups,
        )


@dataclass(frozen=True)
class Spliced:
    """The effect of a dictionary, and of the two ablations of the sites that it writes."""

    own: Effect
    zero: Effect
    mean: Effect

    @property
    def loss(self) -> SpliceLoss:
        """As one value."""
        return self.own._loss(self.zero, self.mean)  # pyright: ignore[reportPrivateUsage]


Replacement = Callable[[Tensor], Tensor]
"""From activations [rows, width] to what is put in their place."""


@dataclass(frozen=True)
class Change:
    """One change to the model whose effect is measured."""

    edits: Callable[[Bool[Tensor, "batch pos"], Mapping[Site, Tensor]], list[Intervention]]
    """From where to replace, and what the model's own pass showed at ``needs``."""
    needs: tuple[Site, ...] = ()

    @classmethod
    def ablation(cls, sites: Sequence[Site], means: Mapping[Site, Float[Tensor, " width"]] | None = None) -> "Change":
        """Zeros, or ``means``, at all of the sites."""

        def edits(where: Tensor, _: Mapping[Site, Tensor]) -> list[Intervention]:
            return [Ablate(site, None if means is None else means[site], positions=where) for site in sites]

        return cls(edits)

    @classmethod
    def functions(cls, replace: Mapping[Site, Replacement]) -> "Change":
        """At each site a function of the rows there."""

        def edits(where: Tensor, _: Mapping[Site, Tensor]) -> list[Intervention]:
            return [
                Edit(site, lambda x, f=function: _put(x, where, f(x[where.to(x.device)])))
                for site, function in replace.items()
            ]

        return cls(edits)

    @classmethod
    def splice(cls, subject: Subject) -> "Change":
        """The reconstructions of a dictionary, at all sites that it writes."""
        live = subject.dictionary.activation.top is None or subject.dictionary.n_positions == 1
        if live:
            return cls(lambda where, _: _Live(subject, where).edits())
        return cls(lambda where, seen: _recorded(subject, where, seen), subject.reads)


def _put(x: Float[Tensor, "batch pos width"], where: Bool[Tensor, "batch pos"], rows: Tensor) -> Tensor:
    found = x.clone()
    found[where.to(x.device)] = rows.to(x.device, x.dtype)
    return found


class _Live:
    """Codes of the places that the pass has come to."""

    def __init__(self, subject: Subject, where: Bool[Tensor, "batch pos"]) -> None:
        self._subject, self._where = subject, where
        self._codes: list[tuple[Support, Tensor]] = []
        self._rows: list[Tensor] = []

    def edits(self) -> list[Intervention]:
        """For each position one that notes what is read, and one that writes."""
        found: list[Intervention] = []
        for position, (read, write) in enumerate(zip(self._subject.reads, self._subject.writes, strict=True)):
            found.append(Edit(read, lambda x, at=position: self._note(at, x)))
            found.append(Edit(write, lambda x, at=position: self._write(at, x)))
        return found

    def _note(self, position: int, x: Tensor) -> Tensor:
        rows = x[self._where.to(x.device)]
        self._codes.append(self._subject.dictionary.codes_at(position, rows))
        self._rows.append(rows)
        assert len(self._rows) == position + 1
        return x

    def _write(self, position: int, x: Tensor) -> Tensor:
        recon = self._subject.dictionary.write_at(position, self._codes[: position + 1], self._rows[position])
        return _put(x, self._where, recon)


def _recorded(subject: Subject, where: Bool[Tensor, "batch pos"], seen: Mapping[Site, Tensor]) -> list[Intervention]:
    x = subject.stack({site: values[where.to(values.device)] for site, values in seen.items()})
    recon = subject.reconstruct(x, *subject.codes(x))
    return [
        Edit(site, lambda x, rows=recon[:, position]: _put(x, where, rows))
        for position, site in enumerate(subject.writes)
    ]


@torch.no_grad()
def effects(
    gemma: Gemma,
    changes: Sequence[Change],
    items: Sequence[Tokens],
    *,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[Effect]:
    """The effect of each change; one pass of the model as it is serves all, and each change takes one of its own.

    Raises SiteError for a site the model does not have and InputError when no document has two content tokens.
    """
    found = [Effect(len(items)) for _ in changes]
    needs = tuple(dict.fromkeys(site for change in changes for site in change.needs))
    done, total = 0, sum(len(item.ids) for item in items) * (1 + len(changes))
    for chosen, batch in bucketed(gemma, items, batch_tokens):
        where, counted = content_mask(batch), counted_targets(batch)
        places, size = Places.of(batch, chosen, counted), int(batch.mask.sum())
        seen = gemma.capture(batch, needs, logits=True)
        assert seen.logits is not None
        done += size
        for effect, change in zip(found, changes, strict=True):
            own = {site: seen[site] for site in change.needs}
            logits = gemma.logits(batch, interventions=change.edits(where, own))
            effect.add(places, *_compared(seen.logits, logits, batch, counted))
            done += size
            if progress is not None:
                progress(done, total)
    if found and found[0].predictions == 0:
        raise InputError("no document has two content tokens, so there is no prediction to measure a loss on.")
    return found


def counted_targets(batch: Batch) -> Bool[Tensor, "batch pos"]:
    """Positions whose token is a counted target: content, and not the first content token of its document."""
    mask = content_mask(batch)
    return mask & (mask.cumsum(1) > 1)


def _compared(
    original: Float[Tensor, "batch pos vocab"],
    changed: Float[Tensor, "batch pos vocab"],
    batch: Batch,
    counted: Bool[Tensor, "batch pos"],
) -> list[Tensor]:
    """Per counted prediction, fp64 on the CPU: both losses, KL, and 1 where the first choice is the same."""
    parts = list(_blocks(original, changed, batch, counted))
    empty = torch.zeros(0, dtype=torch.float64)
    return [torch.cat([empty, *column]) for column in zip(*parts, strict=True)] if parts else [empty] * 4


def _blocks(original: Tensor, changed: Tensor, batch: Batch, counted: Tensor) -> Iterator[tuple[Tensor, ...]]:
    row, column = counted.nonzero().unbind(1)
    targets = batch.ids[row, column]
    device, precise = original.device, torch.promote_types(original.dtype, torch.float32)
    step = max(1, _AT_ONCE // original.shape[-1])
    for part in torch.arange(len(row)).split(step):
        if not len(part):
            return
        at = (row[part].to(device), column[part].to(device) - 1)
        before, after = (t[at].to(precise).log_softmax(-1) for t in (original, changed))
        target = targets[part].to(device)[:, None]
        kl = (before.exp() * (before - after)).double().sum(-1)
        same = before.argmax(-1) == after.argmax(-1)
        losses = (-t.gather(1, target)[:, 0] for t in (before, after))
        yield tuple(t.double().cpu() for t in (*losses, kl, same))


def splice_losses(
    gemma: Gemma,
    subjects: Sequence[Subject],
    means: Mapping[Site, Float[Tensor, " width"]],
    items: Sequence[Tokens],
    *,
    extra: Sequence[Change] = (),
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> tuple[list[Spliced], list[Effect]]:
    """The effects of each dictionary beside its ablations, and those of ``extra``.

    Dictionaries that write the same sites share their ablations.
    """
    written = list(dict.fromkeys(subject.writes for subject in subjects))
    changes = [Change.splice(subject) for subject in subjects] + list(extra)
    changes += [Change.ablation(sites) for sites in written]
    changes += [Change.ablation(sites, means) for sites in written]
    found = effects(gemma, changes, items, batch_tokens=batch_tokens, progress=progress)
    own, others, ablated = found[: (n := len(subjects))], found[n : n + len(extra)], found[n + len(extra) :]
    at = {sites: i for i, sites in enumerate(written)}
    spliced = [
        Spliced(effect, ablated[at[subject.writes]], ablated[len(written) + at[subject.writes]])
        for effect, subject in zip(own, subjects, strict=True)
    ]
    return spliced, others
