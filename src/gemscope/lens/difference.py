"""Change one word and see attention move.

Both texts are run, their tokens are aligned (``alignment``), and the maps of both are collapsed to the groups of the
alignment. Rows of a pattern sum to one on both sides, so every row of the difference sums to zero: what one key loses
another gains. Queries before the edit cannot have changed: there the difference is exactly zero in float32.

Two things move attention beside the word's meaning, and are said rather than hidden: another number of tokens shifts
all later positions and the edges of the local layers' windows; and any word in that place would change something.
Hence the null band: the same scores for random tokens in place of the changed ones, or of those that were put in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gemscope.core.arrays import Bool, Float, Tensor
from gemscope.core.errors import InputError
from gemscope.lens import pictures
from gemscope.lens.alignment import Alignment, align, collapse, edited
from gemscope.lens.attention import (
    Kind,
    label,
    layer_dict,
    plan,
    sees,
    tokens_dict,
    visible,
)
from gemscope.lens.heads import words
from gemscope.lens.inputs import Asked, Target, as_tokens, identity
from gemscope.lens.lines import TOKEN, cut, number, pad, short, words_of
from gemscope.lens.null_band import NullBand, Runs, can_move, later_queries, movement, null_band
from gemscope.lens.result import Result
from gemscope.models.gemma import Gemma
from gemscope.models.layout import LayerAttention
from gemscope.models.pieces import shown
from gemscope.models.tokens import Tokens


@dataclass(frozen=True)
class Move:
    """Attention of one head that moved: ``query`` and ``key`` are groups of the alignment."""

    layer: int
    head: int
    query: int
    key: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """After less before."""
        return self.after - self.before


@dataclass(frozen=True, eq=False, repr=False)
class AttentionDifference(Result):
    """Attention before and after an edit, and what moved."""

    model: str
    a: Tokens
    b: Tokens
    layers: tuple[LayerAttention, ...]
    kind: Kind
    alignment: Alignment
    before: Float[Tensor, "layer head group group"]
    """Of ``a``, collapsed: keys of a group summed, queries averaged. A row of zeros where the group has no query."""
    after: Float[Tensor, "layer head group group"]
    """Of ``b``."""
    null: NullBand | None
    """None when no samples were asked for, nothing was changed, or no query is left that could have moved."""
    target: Target | None = None
    """The next token that an ``effect`` is on."""
    suggestions: tuple[str, ...] = ()
    """Words near the old one and of one token as it is, when the edit changed the length."""

    @property
    def difference(self) -> Float[Tensor, "layer head group group"]:
        """After less before; zero in the row of a group that has queries on one side only."""
        return (self.after - self.before) * self.comparable[:, None]

    @property
    def comparable(self) -> Bool[Tensor, " group"]:
        """Groups with tokens on both sides."""
        return self.alignment.comparable

    @property
    def later(self) -> Bool[Tensor, " group"]:
        """The queries that scores are means over: those after the edit; the changed word's own when it is the last."""
        return later_queries(self.alignment)

    @property
    def scores(self) -> Float[Tensor, "layer head"]:
        """Mean over later queries of the total variation, half the sum of |difference|: the share that moved."""
        return movement(self.difference, self.later)

    @property
    def scores_without_first(self) -> Float[Tensor, "layer head"]:
        """The same without the first token's column, the sink; nothing is renormalised."""
        return movement(self.difference[..., 1:], self.later)

    @property
    def z(self) -> Float[Tensor, "layer head"] | None:
        """``scores`` against the null band."""
        return None if self.null is None else self.null.z(self.scores)

    @property
    def length_change(self) -> int:
        """Tokens that were added (negative: taken away)."""
        return self.alignment.length_change

    @property
    def window_changes(self) -> int:
        """Pairs of a later query and an unchanged key that a local layer's window holds in one text only; the most over
        the layers.
        """
        return max((_window_changes(about, self) for about in self.layers), default=0)

    @property
    def title(self) -> str:
        changed = self.alignment.changed
        what = "nothing was changed" if changed is None else f"{self.words('a', changed)} → {self.words('b', changed)}"
        return f"{self.name} · attention moved by {what} ({self.kind})"

    def words(self, side: str, group: int) -> str:
        """A group's words in one of the texts."""
        g = self.alignment.groups[group]
        return words_of(self.a, g.a_start, g.a_stop) if side == "a" else words_of(self.b, g.b_start, g.b_stop)

    def names(self) -> list[str]:
        """Every group as a person reads it; a changed one as ``old→new``."""
        return [
            self.words("a", i) if g.kind == "equal" else f"{self.words('a', i)}→{self.words('b', i)}"
            for i, g in enumerate(self.alignment.groups)
        ]

    def moved(self, top: int = 10, head: tuple[int, int] | None = None) -> list[Move]:
        """The largest differences, of all heads or of one; raises InputError for a head that was not read."""
        difference = self.difference
        if head is not None:
            only = torch.zeros_like(difference)
            only[self._row(head), head[1]] = difference[self._row(head), head[1]]
            difference = only
        best = difference.abs().flatten().topk(min(top, difference.numel())).indices
        places = torch.stack(torch.unravel_index(best, difference.shape), dim=1).tolist()
        return [
            Move(self.layers[i].layer, h, q, k, float(self.before[i, h, q, k]), float(self.after[i, h, q, k]))
            for i, h, q, k in places
            if difference[i, h, q, k] != 0
        ]

    def _row(self, head: tuple[int, int]) -> int:
        """Where the layer of a head stands; raises InputError when the head was not read."""
        rows = [row for row, about in enumerate(self.layers) if about.layer == head[0]]
        if not rows or not 0 <= head[1] < self.before.shape[1]:
            raise InputError(f"head {head[0]}.{head[1]} was not read; write layer.head, as in 3.1.")
        return rows[0]

    def ranked(self) -> list[tuple[int, int]]:
        """(row in ``layers``, head), most moved first: by z where there is a null band, else by score."""
        values = self.scores if self.z is None else self.z
        order = values.flatten().argsort(descending=True, stable=True).tolist()
        return [(i // values.shape[1], i % values.shape[1]) for i in order]

    def as_dict(self) -> dict[str, Any]:
        z, names = self.z, self.names()
        heads = [
            {
                "layer": self.layers[row].layer,
                "head": head,
                "score": float(self.scores[row, head]),
                "score_without_first": float(self.scores_without_first[row, head]),
                "z": None if z is None else float(z[row, head]),
            }
            for row, head in self.ranked()
        ]
        moved = [
            asdict(move) | {"change": move.change, "query_words": names[move.query], "key_words": names[move.key]}
            for move in self.moved(30)
        ]
        return {
            "kind": "attention_difference",
            "model": self.model,
            "unit": self.kind,
            "target": None if self.target is None else self.target.as_dict(),
            "a": tokens_dict(self.a),
            "b": tokens_dict(self.b),
            "groups": self.alignment.as_dict(),
            "length_change": self.length_change,
            "window_changes": self.window_changes,
            "suggestions": list(self.suggestions),
            "null": None if self.null is None else {"samples": len(self.null.scores), "seed": self.null.seed},
            "layers": [layer_dict(about) for about in self.layers],
            "heads": heads,
            "moved": moved,
        }

    def arrays(self) -> Mapping[str, Tensor]:
        found = {
            "before": self.before,
            "after": self.after,
            "difference": self.difference,
            "scores": self.scores,
            "groups": torch.tensor([[g.a_start, g.a_stop, g.b_start, g.b_stop] for g in self.alignment.groups]),
        }
        return found if self.null is None else {**found, "null_scores": self.null.scores}

    def text(self, width: int = 80, top: int = 8) -> str:
        width = max(width, 60)
        lines = [*(cut(line, width) for line in (self.title, *self.notes())), "", *self._heads(top), ""]
        lines += [cut("what moved most" + (f" (the effect is on {self.target})" if self.target else ""), width)]
        return "\n".join([*lines, *self._moves(self.moved(top))])

    def head_text(self, head: tuple[int, int], width: int = 80, top: int = 12) -> str:
        """One head: what it moved most."""
        lines = [*(cut(line, max(width, 60)) for line in (self.title, *self.notes())), "", f"head {head[0]}.{head[1]}"]
        return "\n".join([*lines, *self._moves(self.moved(top, head))])

    def notes(self) -> list[str]:
        """What beside the word's meaning may have moved attention, one line each."""
        found: list[str] = []
        if k := self.length_change:
            found.append(f"length changed by {k:+d}: every later token has another position")
            if n := self.window_changes:
                found.append(f"windows shifted: {n} pairs of query and key are in view in one text only")
            if self.suggestions:
                found.append(f"words that would keep it: {', '.join(self.suggestions)}")
        if self.alignment.changed is not None and not can_move(self.alignment):
            found.append("no word of both texts stands behind the edit, so no attention can have moved")
        if self.null is not None:
            what = "insertions" if self.alignment.inserts else "replacements"
            found.append(f"z against {len(self.null.scores)} random {what} of as many tokens")
        return found

    def _heads(self, top: int) -> list[str]:
        lines = [pad("head", 8) + pad("sees", 14) + f"{'moved':>8}{'no first':>10}{'null':>17}{'z':>8}"]
        scores, without, z = self.scores, self.scores_without_first, self.z
        for row, head in self.ranked()[:top]:
            about = self.layers[row]
            band, score = f"{'–':>17}", f"{'–':>8}"
            if self.null is not None and z is not None:
                samples = self.null.scores[:, row, head]
                middle, spread = (short(float(x), 6, 3) for x in (samples.mean(), samples.std()))
                band, score = f"{f'{middle} ± {spread}':>17}", number(z[row, head], 8, 1)
            numbers = number(scores[row, head], 8, 3) + number(without[row, head], 10, 3) + band + score
            lines.append(pad(f"{about.layer}.{head}", 8) + pad(sees(about), 14) + numbers)
        return lines

    def _moves(self, moves: Sequence[Move]) -> list[str]:
        names = self.names()
        lines = [pad("head", 7) + pad("query", TOKEN + 5) + pad("key", TOKEN + 5) + f"{'a':>8}{'b':>8}{'change':>9}"]
        for m in moves:
            numbers = number(m.before, 8, 3) + number(m.after, 8, 3) + number(m.change, 9, 3, sign="+")
            query, key = (pad(f"{names[i]}@{i}", TOKEN + 5) for i in (m.query, m.key))
            lines.append(pad(f"{m.layer}.{m.head}", 7) + query + key + numbers)
        return lines if len(lines) > 1 else ["nothing"]

    def plot(self, head: tuple[int, int] | None = None) -> Any:
        """Scores of all heads, and before, after and difference of one (None: the most moved)."""
        if head is None:
            row, which = self.ranked()[0]
            head = (self.layers[row].layer, which)
        row, which = self._row(head), head[1]
        maps = (self.before[row, which], self.after[row, which], self.difference[row, which])
        z = self.z
        grid = self.scores if z is None else z
        what = "share moved" if z is None else "z against the null band"
        return pictures.difference(
            grid, what, [label(about) for about in self.layers], maps, self.names(), head, self.title
        )


def attend_edit(
    gemma: Gemma,
    text: str,
    edit: str,
    *,
    kind: Kind = "weight",
    layers: Sequence[int] | None = None,
    target: Asked | None = None,
    other: Asked | None = None,
    null_samples: int = 16,
    seed: int = 0,
) -> AttentionDifference:
    """``compare`` of ``text`` with itself after ``word=other`` (``alignment.edited``)."""
    return compare(
        gemma,
        text,
        edited(text, edit),
        kind=kind,
        layers=layers,
        target=target,
        other=other,
        null_samples=null_samples,
        seed=seed,
    )


def compare(
    gemma: Gemma,
    a: str | Tokens,
    b: str | Tokens,
    *,
    kind: Kind = "weight",
    layers: Sequence[int] | None = None,
    target: Asked | None = None,
    other: Asked | None = None,
    null_samples: int = 16,
    seed: int = 0,
) -> AttentionDifference:
    """How attention differs between two texts of which one region differs.

    ``null_samples`` random replacements of the changed tokens, or of those put in where none stood before, make the
    null band (0: none). An ``effect`` is on the same token in both texts; None: the one that is most likely after
    ``a``. Raises InputError, SiteError, ContextLengthError.
    """
    a, b = as_tokens(gemma, a), as_tokens(gemma, b)
    if null_samples < 0 or null_samples == 1:
        raise InputError(f"a null band of {null_samples} samples has no spread; ask for 2 or more, or for 0.")
    about, wanted = plan(gemma, a, kind, layers, target, other)
    runs = Runs(gemma, tuple(one.layer for one in about), kind, wanted, max(len(a), len(b)))
    alignment = align(a, b)
    before, after = collapse(runs(a), alignment.spans("a")), collapse(runs(b), alignment.spans("b"))
    null = null_band(runs, a, b, alignment, null_samples, seed) if null_samples and can_move(alignment) else None
    suggestions = _suggestions(gemma, alignment, a) if alignment.length_change else ()
    return AttentionDifference(identity(gemma), a, b, about, kind, alignment, before, after, null, wanted, suggestions)


def _suggestions(gemma: Gemma, alignment: Alignment, a: Tokens, n: int = 3) -> tuple[str, ...]:
    """Words near the old one in the embedding, when it was one token: edits that keep the length."""
    assert alignment.changed is not None
    group = alignment.groups[alignment.changed]
    if group.a_stop - group.a_start != 1:
        return ()
    old = int(a.ids[group.a_start])
    rows = gemma.unembedding()
    pool = [i for i in words(gemma) if i != old]
    near = torch.cosine_similarity(rows[torch.tensor(pool, device=rows.device)].float(), rows[old][None].float(), dim=1)
    best = near.topk(min(n, len(pool))).indices.tolist()
    return tuple(shown(str(gemma.tokenizer.convert_ids_to_tokens(pool[i]))) for i in best)


def _window_changes(about: LayerAttention, found: AttentionDifference) -> int:
    groups = [i for i, g in enumerate(found.alignment.groups) if g.kind == "equal"]
    at = torch.tensor([[found.alignment.groups[i].a_start, found.alignment.groups[i].b_start] for i in groups])
    if about.window is None or not groups:
        return 0
    in_a = visible(about, len(found.a))[at[:, 0][:, None], at[:, 0][None]]
    in_b = visible(about, len(found.b))[at[:, 1][:, None], at[:, 1][None]]
    return int((in_a != in_b).sum())
