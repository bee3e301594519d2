"""Finding heads by what they do: numbers for every head from its attention pattern.

All are means over the queries after the first token, whose row is trivial. Induction looks at queries whose token
stood earlier in the text, and sums the weight on the tokens that came right after those earlier places (Olsson et al.
2022, "In-context Learning and Induction Heads"). A pair looks at queries of one concept and sums the weight on earlier
keys of another.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.core.errors import InputError
from gemscope.lens import pictures
from gemscope.lens.attention import attend, layer_dict, sees
from gemscope.lens.inputs import as_tokens, identity
from gemscope.lens.lines import hang, number, pad, short
from gemscope.lens.result import Result
from gemscope.models.gemma import Gemma
from gemscope.models.layout import LayerAttention
from gemscope.models.tokens import Tokens

Rows = Float[Tensor, "layer head query"]
Scorer = Callable[[Float[Tensor, "layer head query key"], Int[Tensor, " query"]], tuple[Rows, Bool[Tensor, " query"]]]


def _previous(p: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return _sum_over(p, torch.ones(len(ids), len(ids), dtype=torch.bool).tril(-1).triu(-1))


def _induction(p: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return _sum_over(p, after_earlier(ids))


def _first(p: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return p[..., 0], torch.ones(len(ids), dtype=torch.bool)


def _self(p: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return p.diagonal(dim1=-2, dim2=-1), torch.ones(len(ids), dtype=torch.bool)


def _entropy(p: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return torch.special.entr(p).sum(-1), torch.ones(len(ids), dtype=torch.bool)


def _distance(p: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.arange(len(ids))
    return (p * (place[:, None] - place[None]).clamp(min=0)).sum(-1), torch.ones(len(ids), dtype=torch.bool)


METRICS: Mapping[str, tuple[Scorer, str]] = {
    "previous": (_previous, "weight on the token before"),
    "induction": (_induction, "weight on what followed the same token earlier"),
    "first": (_first, "weight on the first token, the sink"),
    "self": (_self, "weight on the query's own token"),
    "entropy": (_entropy, "entropy of the weights, in nats"),
    "distance": (_distance, "mean distance to what is read, in tokens"),
}
"""Name -> how it is computed, and what it is."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Do queries of one kind read earlier keys of another kind?"""

    name: str
    """For example ``capital→country``."""
    queries: Bool[Tensor, " pos"]
    keys: Bool[Tensor, " pos"]


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Result):
    """One number for every metric and head."""

    model: str
    layers: tuple[LayerAttention, ...]
    metrics: tuple[str, ...]
    values: Float[Tensor, "metric layer head"]
    """NaN for a metric that no query of the texts could be measured on."""
    queries: tuple[int, ...]
    """Queries that each metric is a mean over."""
    what: str
    """The text, or what the texts were."""

    @property
    def title(self) -> str:
        n_heads = self.values.shape[-1]
        return f"{self.name} · {len(self.layers)} layers × {n_heads} heads · {self.what}"

    def of(self, metric: str) -> Float[Tensor, "layer head"]:
        """One metric; raises InputError with the names there are."""
        if metric not in self.metrics:
            raise InputError(f"unknown metric {metric!r}; use one of {', '.join(self.metrics)}.")
        return self.values[self.metrics.index(metric)]

    def ranked(self, metric: str) -> list[tuple[int, int, float]]:
        """(layer, head, value), largest first; empty when the metric could not be measured."""
        values = self.of(metric)
        if bool(values.isnan().any()):
            return []
        order = values.flatten().argsort(descending=True, stable=True).tolist()
        heads = values.shape[1]
        return [(self.layers[i // heads].layer, i % heads, float(values.flatten()[i])) for i in order]

    def as_dict(self) -> dict[str, Any]:
        scores = [
            {"layer": about.layer, "head": head, "kv_head": about.kv_group[head]}
            | {name: _number(self.values[m, row, head]) for m, name in enumerate(self.metrics)}
            for row, about in enumerate(self.layers)
            for head in range(self.values.shape[2])
        ]
        return {
            "kind": "head_scores",
            "model": self.model,
            "what": self.what,
            "layers": [layer_dict(about) for about in self.layers],
            "queries": dict(zip(self.metrics, self.queries, strict=True)),
            "heads": scores,
        }

    def arrays(self) -> Mapping[str, Tensor]:
        return {"values": self.values}

    def text(self, width: int = 80, top: int = 4) -> str:
        """For every metric, its ``top`` heads."""
        lines = [pad("metric", 20) + pad("queries", 9) + "heads, layer.head, highest first"]
        for name, count in zip(self.metrics, self.queries, strict=True):
            found = [f"{layer}.{head} {short(value, 5, 2)}" for layer, head, value in self.ranked(name)[:top]]
            start = pad(name, 20) + pad(str(count), 9)
            lines += hang(start, found or ["no such query in this text"], max(width, 60), "   ")
        return "\n".join(lines)

    def table(self, by: str, top: int) -> str:
        """The ``top`` heads by one metric, with all their numbers."""
        shown = [by, *(name for name in self.metrics if name != by)][:5]
        cells = (15, 10, 10, 10, 10)
        titles = "".join(f"{name[: n - 1]:>{n}}" for name, n in zip(shown, cells, strict=True))
        lines = [pad("head", 8) + pad("sees", 12) + pad("k/v", 5) + titles]
        about = {layer.layer: (row, layer) for row, layer in enumerate(self.layers)}
        for layer, head, _ in self.ranked(by)[:top]:
            row, kind = about[layer]
            numbers = (_cell(self.of(name)[row, head], n) for name, n in zip(shown, cells, strict=True))
            line = pad(f"{layer}.{head}", 8) + pad(sees(kind), 12) + pad(str(kind.kv_group[head]), 5)
            lines.append(line + "".join(numbers))
        if len(lines) == 1:
            lines.append("no such query in this text")
        return "\n".join(lines)

    def plot(self) -> Any:
        names = [f"{name}: {METRICS[name][1]}" if name in METRICS else name for name in self.metrics]
        return pictures.grids(self.values, names, [str(a.layer) for a in self.layers], self.title)


def find_heads(
    gemma: Gemma,
    texts: str | Tokens | Iterable[str | Tokens] | None = None,
    *,
    pairs: Callable[[Tokens], Sequence[Pair]] | None = None,
    what: str | None = None,
) -> HeadScores:
    """Every metric for every head, a mean over the queries of all ``texts``.

    Without texts: sequences of random words that are read twice (``repeated``), on which an induction head cannot hide.
    ``pairs`` gives each text's concept pairs, the same names for every text. Raises InputError, ContextLengthError.
    """
    if texts is None:
        items, what = repeated(gemma), what or "random words read twice"
    else:
        given = [texts] if isinstance(texts, str | Tokens) else list(texts)
        items = [as_tokens(gemma, text) for text in given]
    if not items:
        raise InputError("there is nothing to read: the list of texts is empty.")
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for item in items:
        for name, (rows, chosen) in _measure(gemma, item, pairs(item) if pairs else ()).items():
            totals[name] = totals.get(name, 0.0) + rows[..., chosen].double().sum(-1)
            counts[name] = counts.get(name, 0) + int(chosen.sum())
    values = torch.stack([total / counts[name] for name, total in totals.items()]).float()
    layers = tuple(gemma.shape.attention(layer) for layer in range(gemma.shape.n_layers))
    what = what or (f"{len(items[0])} tokens" if len(items) == 1 else f"{len(items)} texts")
    return HeadScores(identity(gemma), layers, tuple(totals), values, tuple(counts.values()), what)


def repeated(gemma: Gemma, length: int = 20, n: int = 4, seed: int = 0) -> list[Tokens]:
    """``n`` sequences: ``<bos>``, ``length`` random words of the vocabulary, and the same words once more.

    Raises InputError when the vocabulary has fewer words, ContextLengthError is not possible: they are cut to fit.
    """
    pool = words(gemma)
    length = min(length, (gemma.shape.context - 1) // 2)
    if len(pool) < length:
        raise InputError(
            f"the vocabulary has {len(pool)} words where {length} different ones are needed; ask for fewer."
        )
    generator = torch.Generator().manual_seed(seed)
    found: list[Tokens] = []
    for _ in range(n):
        drawn = [pool[i] for i in torch.randperm(len(pool), generator=generator)[:length].tolist()]
        found.append(gemma.tokens_of([gemma.vocabulary.bos_id, *drawn, *drawn]))
    return found


def words(gemma: Gemma) -> list[int]:
    """Tokens that are a space and letters."""
    pieces: dict[str, int] = gemma.tokenizer.get_vocab()
    found = (i for piece, i in pieces.items() if piece.startswith("▁") and piece[1:].isalpha() and piece.isprintable())
    return sorted(i for i in found if i < gemma.shape.vocab_size and i not in gemma.vocabulary.special_ids)


def after_earlier(ids: Int[Tensor, " query"]) -> Bool[Tensor, "query key"]:
    """True where the key came right after an earlier occurrence of the query's token, the query itself left out."""
    same = ids[:, None] == ids[None, :]
    found = torch.zeros_like(same)
    found[:, 1:] = same[:, :-1]
    return found.tril(-1)


def _measure(gemma: Gemma, item: Tokens, pairs: Sequence[Pair]) -> dict[str, tuple[Rows, Bool[Tensor, " query"]]]:
    patterns = attend(gemma, item).values
    scorers: dict[str, Scorer] = {name: scorer for name, (scorer, _) in METRICS.items()}
    scorers |= {pair.name: _reads(pair) for pair in pairs}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, scorer in scorers.items():
        rows, chosen = scorer(patterns, item.ids)
        found[name] = rows, chosen & (torch.arange(len(item)) > 0)
    return found


def _reads(pair: Pair) -> Scorer:
    return lambda p, _: _sum_over(p, (pair.queries[:, None] & pair.keys[None]).tril(-1))


def _sum_over(p: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Per query, the weight where ``mask`` [query, key] is True; and which queries have such a key."""
    return (p * mask).sum(-1), mask.any(-1)


def _number(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def _cell(value: Tensor, cells: int) -> str:
    return f"{'–':>{cells}}" if bool(value.isnan()) else number(value, cells, 3)
