"""How a prediction forms: at one position, layer by layer, what the model would say, who wrote it, what was active."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemscope.core.arrays import Tensor
from gemscope.lens import pictures
from gemscope.lens.attention import sees
from gemscope.lens.direct import Attribution, attribute
from gemscope.lens.inputs import Asked, as_tokens, identity
from gemscope.lens.lines import TOKEN, cut, fit, number, pad
from gemscope.lens.logit_lens import LogitLens, logit_lens
from gemscope.lens.result import Result
from gemscope.lens.trace import ActivationTrace, Microscope, trace
from gemscope.models.gemma import Gemma
from gemscope.models.pieces import shown
from gemscope.models.tokens import Tokens


@dataclass(frozen=True, eq=False, repr=False)
class Formation(Result):
    """The logit lens, the direct logit attribution and the activation trace of one text, seen at one position."""

    model: str
    lens: LogitLens
    parts: Attribution
    trace: ActivationTrace

    @property
    def position(self) -> int:
        """Where the prediction is made."""
        return self.parts.position

    @property
    def title(self) -> str:
        piece = shown(self.lens.tokens.pieces[self.position])
        return f"{self.name} · the prediction after {piece}@{self.position} · asked about: {self.parts.target}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": "formation",
            "model": self.model,
            "position": self.position,
            "lens": self.lens.as_dict(),
            "attribution": self.parts.as_dict(),
            "trace": self.trace.as_dict(),
        }

    def arrays(self) -> Mapping[str, Tensor]:
        return {**self.lens.arrays(), **self.parts.arrays(), **self.trace.arrays()}

    def text(self, width: int = 80) -> str:
        lens, at, width = self.lens, self.position, max(width, 60)
        lines = [cut(self.title, width), "", pad("after layer", TOKEN) + pad("says", _SAYS) + self._titles()]
        for row, name in enumerate(lens.rows):
            kind = "" if row == 0 else " " + sees(self.trace.layers[row - 1])
            said = pad(lens.piece(int(lens.top_ids[row, at, 0])), _SAYS)
            lines.append(pad(name + kind, TOKEN) + said + self._numbers(row))
            if row and (found := self.trace.latents[row - 1][at]):
                lines.append("    " + fit([str(a) for a in found], width - 4, " · "))
        where = lens.emerges_at(at)
        told = "is never the most likely" if where == "never" else f"is the most likely from {_after(where)} on"
        piece = shown(self.parts.target.piece)
        said = cut(f"{piece} {told}", width)
        return "\n".join([*lines, "", said, "attn, mlp: what the layer's parts add to the logit directly"])

    def _titles(self) -> str:
        return "".join(f"{name:>{cells}}" for name, cells, _ in _COLUMNS)

    def _numbers(self, row: int) -> str:
        lens, at = self.lens, self.position
        values = [
            lens.top_probs[row, at, 0],
            lens.target_prob[row, at],
            lens.target_rank[row, at],
            lens.entropy[row, at],
        ]
        if row == 0:
            values += [self.parts.embed, None, self.trace.embed_norm[at], None]
        else:
            values += [self.parts.attention[row - 1].sum(), self.parts.mlp[row - 1]]
            values += [self.trace.resid_norm[row - 1, at], self.trace.cosine_before[row - 1, at]]
        columns = zip(values, _COLUMNS, strict=True)
        return "".join(" " * n if x is None else number(x, n, digits) for x, (_, n, digits) in columns)

    def plot(self) -> Any:
        at = self.position
        said = [self.lens.piece(int(i)) for i in self.lens.top_ids[:, at, 0]]
        added = [self.parts.embed, *(self.parts.attention.sum(-1) + self.parts.mlp).tolist()]
        prob, entropy = self.lens.target_prob[:, at].tolist(), self.lens.entropy[:, at].tolist()
        return pictures.formation(list(self.lens.rows), said, prob, entropy, added, str(self.parts.target), self.title)


_SAYS = 12
"""Cells of the word that is said; with ``TOKEN`` and the columns 80."""
_COLUMNS = (
    ("p", 5, 2),
    ("target", 7, 3),
    ("rank", 7, 0),
    ("entropy", 8, 2),
    ("attn", 7, 2),
    ("mlp", 7, 2),
    ("norm", 7, 1),
    ("cos", 6, 2),
)
"""Name, cells and decimals."""


def form(
    gemma: Gemma,
    text: str | Tokens,
    *,
    position: int = -1,
    target: Asked | None = None,
    other: Asked | None = None,
    dictionaries: Mapping[int, Microscope] | None = None,
    top: int = 5,
) -> Formation:
    """How the prediction at ``position`` forms; ``target`` None: the model's own answer there.

    Raises InputError, ContextLengthError.
    """
    tokens = as_tokens(gemma, text)
    parts = attribute(gemma, tokens, target=target, other=other, position=position)
    lens = logit_lens(gemma, tokens, target=None if target is None else parts.target.token, top=top)
    return Formation(identity(gemma), lens, parts, trace(gemma, tokens, dictionaries=dictionaries, top=top))


def _after(row: str) -> str:
    return "the embedding" if row == "embed" else f"layer {row}"
