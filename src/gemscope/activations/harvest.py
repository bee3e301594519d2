"""Run a model over documents and keep the activations at content positions, for many sites in one pass."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemscope.activations.positions import RULE, bucketed, content_mask
from gemscope.activations.sets import ActivationSet
from gemscope.core.arrays import Int, Tensor
from gemscope.core.errors import InputError
from gemscope.core.provenance import collect
from gemscope.core.sites import Site
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Tokens

Progress = Callable[[int, int], None]
"""Called with (done, total), here in content tokens, after each batch."""


@dataclass(frozen=True)
class _Rows:
    """Where each document's rows lie."""

    start: list[int]
    doc: Int[Tensor, "rows"]
    pos: Int[Tensor, "rows"]
    token: Int[Tensor, "rows"]


@torch.no_grad()
def harvest(
    gemma: Gemma,
    items: Iterable[Tokens],
    sites: Sequence[Site | str],
    *,
    batch_tokens: int = 8192,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
    about: Mapping[str, Any] | None = None,
) -> ActivationSet:
    """Activations of the content positions of every document at every site, rows in the order of the
    documents.

    The same rows for all sites; ``batch_tokens`` bounds the positions in one forward pass; ``dtype`` is what
    is kept; ``about`` is added to the manifest. Rows are in memory, on the CPU: rows x width x sites x 2
    bytes in bf16. Raises SiteError for a site the model does not have and InputError when there is no content
    token at all.
    """
    documents = list(items)
    wanted = [gemma.check_site(site) for site in sites]
    rows = _lay_out(documents)
    total = len(rows.doc)
    if not wanted or total == 0:
        raise InputError(
            f"nothing to harvest: {total} content tokens in {len(documents)} documents, {len(wanted)} sites."
        )
    data = {site: torch.empty(total, gemma.width(site), dtype=dtype) for site in wanted}
    done = 0
    for chosen, batch in bucketed(gemma, documents, batch_tokens):
        mask = content_mask(batch)
        where = torch.cat([torch.arange(rows.start[i], rows.start[i + 1]) for i in chosen])
        captured = gemma.capture(batch, wanted)
        for site in wanted:
            data[site][where] = captured[site][mask.to(captured[site].device)].to("cpu", dtype)
        done += len(where)
        if progress is not None:
            progress(done, total)
    notes = {
        "model": gemma.name,
        "revision": gemma.revision,
        "documents": len(documents),
        "positions": RULE,
        "provenance": collect().as_dict(),
        **(about or {}),
    }
    return ActivationSet(data, rows.doc, rows.pos, rows.token, notes)


def _lay_out(documents: Sequence[Tokens]) -> _Rows:
    """Document by document, position by position."""
    start, doc, pos, token = [0], [], [], []
    for number, tokens in enumerate(documents):
        kept = tokens.content_mask.nonzero()[:, 0].cpu()
        start.append(start[-1] + len(kept))
        doc.append(torch.full_like(kept, number))
        pos.append(kept)
        token.append(tokens.ids.cpu()[kept])
    empty = torch.empty(0, dtype=torch.long)
    return _Rows(start, torch.cat([empty, *doc]), torch.cat([empty, *pos]), torch.cat([empty, *token]))
