"""The logit lens: what the model would say if it stopped after each layer (nostalgebraist 2020, "interpreting GPT").

The residual stream after each layer goes through the final norm (by its own RMS, with the gain), the unembedding and
Gemma 2's cap. The last row is the model's own answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gemscope.core.arrays import Float, Int, Tensor
from gemscope.core.sites import Site
from gemscope.lens import pictures
from gemscope.lens.attention import tokens_dict
from gemscope.lens.inputs import Asked, as_tokens, find_target, identity, piece_of
from gemscope.lens.lines import TOKEN, cut, pad
from gemscope.lens.result import Result
from gemscope.models.gemma import Gemma
from gemscope.models.pieces import shown
from gemscope.models.tokens import Tokens

_AT_ONCE = 64
"""Positions whose logits are held at one time."""


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Result):
    """Rows: the embedding, then the stream after every layer. Columns: positions, each predicting the next token."""

    model: str
    tokens: Tokens
    rows: tuple[str, ...]
    """``embed``, ``0``, ``1``, ..."""
    top_ids: Int[Tensor, "row pos top"]
    """The most likely next tokens, most likely first."""
    top_probs: Float[Tensor, "row pos top"]
    entropy: Float[Tensor, "row pos"]
    """Of the distribution over the vocabulary, in nats."""
    targets: Int[Tensor, " pos"]
    """The next token that is asked about at each position."""
    target_prob: Float[Tensor, "row pos"]
    target_rank: Int[Tensor, "row pos"]
    """1 for the most likely; of tokens that are equally likely, each has the best rank."""
    pieces: Mapping[int, str]
    """The vocabulary's spelling of every token named here."""

    @property
    def emerges(self) -> Int[Tensor, " pos"]:
        """The first row from which on the target stays the most likely; the number of rows where it never is."""
        first = (self.target_rank == 1).int()
        return len(self.rows) - first.flip(0).cumprod(0).sum(0)

    @property
    def title(self) -> str:
        return f"{self.name} · logit lens · {len(self.rows) - 1} layers × {len(self.tokens)} positions"

    def piece(self, token: int) -> str:
        """A token as a person reads it."""
        return shown(self.pieces[int(token)])

    def emerges_at(self, position: int) -> str:
        """Name of the row where the target emerges at a position, or ``never``."""
        row = int(self.emerges[position])
        return self.rows[row] if row < len(self.rows) else "never"

    def as_dict(self) -> dict[str, Any]:
        positions = [
            {
                "position": p,
                "piece": self.tokens.pieces[p],
                "target": self.pieces[int(self.targets[p])],
                "emerges": self.emerges_at(p),
                "rows": [
                    {
                        "row": name,
                        "top": [[self.pieces[int(i)], float(x)] for i, x in zip(ids[p], probs[p], strict=True)],
                        "entropy": float(self.entropy[r, p]),
                        "probability": float(self.target_prob[r, p]),
                        "rank": int(self.target_rank[r, p]),
                    }
                    for r, (name, ids, probs) in enumerate(zip(self.rows, self.top_ids, self.top_probs, strict=True))
                ],
            }
            for p in range(len(self.tokens))
        ]
        return {
            "kind": "logit_lens",
            "model": self.model,
            "tokens": tokens_dict(self.tokens),
            "rows": list(self.rows),
            "positions": positions,
        }

    def arrays(self) -> Mapping[str, Tensor]:
        return {
            "ids": self.tokens.ids,
            "top_ids": self.top_ids,
            "top_probs": self.top_probs,
            "entropy": self.entropy,
            "targets": self.targets,
            "target_prob": self.target_prob,
            "target_rank": self.target_rank,
        }

    def text(self, width: int = 80) -> str:
        cell, tail = 11, 10
        fits = max(2, (max(width, 60) - TOKEN - 1 - tail) // cell)
        rows = _spread(len(self.rows), fits)
        head = pad("reads", TOKEN) + "".join(pad(self.rows[r], cell) for r in rows) + "emerges"
        lines = [
            cut(self.title, width),
            "the most likely next token after each layer, with its probability in percent",
            "",
            head,
        ]
        for p, piece in enumerate(self.tokens.pieces):
            cells = (
                f"{pad(self.piece(int(self.top_ids[r, p, 0])), cell - 4)}{_percent(self.top_probs[r, p, 0])} "
                for r in rows
            )
            lines.append(pad(shown(piece), TOKEN) + "".join(cells) + self.emerges_at(p))
        return "\n".join(lines)

    def plot(self) -> Any:
        words = [[self.piece(int(i)) for i in row] for row in self.top_ids[:, :, 0].tolist()]
        names = [shown(piece) for piece in self.tokens.pieces]
        return pictures.lens(self.top_probs[:, :, 0], words, list(self.rows), names, self.title)


@torch.no_grad()
def logit_lens(gemma: Gemma, text: str | Tokens, *, target: Asked | None = None, top: int = 5) -> LogitLens:
    """Read every layer and position of a text; ``top`` tokens are kept of each.

    ``target`` is one next token asked about everywhere, as a word or an id; None: at each position the model's own
    answer. Raises InputError, ContextLengthError.
    """
    tokens, layers = as_tokens(gemma, text), range(gemma.shape.n_layers)
    sites = [Site("resid_pre", 0), *(Site("resid_post", layer) for layer in layers)]
    seen = gemma.capture(tokens, sites)
    last = seen[sites[-1]][0]
    if target is None:
        targets = torch.cat([gemma.unembed(x).argmax(-1) for x in last.split(_AT_ONCE)])
    else:
        token = find_target(gemma, gemma.unembed(last[-1]), target).token
        targets = torch.full((len(tokens),), token, device=last.device)
    read = [_row(gemma, seen[site][0], targets, min(top, gemma.shape.vocab_size)) for site in sites]
    ids, probs, entropy, prob, rank = (torch.stack(part).cpu() for part in zip(*read, strict=True))
    named = {int(i) for i in [*ids.flatten().tolist(), *targets.tolist()]}
    pieces = {i: piece_of(gemma, i) for i in sorted(named)}
    rows = ("embed", *map(str, layers))
    return LogitLens(identity(gemma), tokens, rows, ids, probs, entropy, targets.cpu(), prob, rank, pieces)


def _row(gemma: Gemma, resid: Tensor, targets: Tensor, top: int) -> tuple[Tensor, ...]:
    """One layer, some positions at a time: the logits of a whole text would be too large."""
    parts: list[tuple[Tensor, ...]] = []
    for x, wanted in zip(resid.split(_AT_ONCE), targets.split(_AT_ONCE), strict=True):
        logits = gemma.unembed(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logp = logits.log_softmax(-1)
        best = logp.topk(top, dim=-1)
        own = logp.gather(1, wanted[:, None])
        entropy = -(logp.exp() * logp).nan_to_num().sum(-1)
        parts.append((best.indices, best.values.exp(), entropy, own[:, 0].exp(), 1 + (logp > own).sum(-1)))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _spread(n: int, most: int) -> list[int]:
    """At most ``most`` of ``n`` rows, evenly, the last one among them."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def _percent(value: Tensor) -> str:
    return f"{min(99, int(100 * float(value))):>2} "
