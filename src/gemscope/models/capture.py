"""What one forward pass showed at the sites that were asked for.

Notable: the tensors are the model's own, not copies. Neighbouring sites may share memory (``resid_post.3``
and ``resid_pre.4`` are one tensor), so do not write into them. At padding positions they hold whatever the
model computed there: finite, but meaningless. ``item`` and ``rows`` leave the padding out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError, SiteError
from gemscope.core.sites import Site
from gemscope.models.tokens import Batch


@dataclass(frozen=True, eq=False)
class Capture:
    """Activations of one forward pass over ``batch``."""

    acts: Mapping[Site, Tensor]
    """[batch, pos, width] a site, in the model's dtype and on its device; patterns are [batch, head, query,
    key]."""
    logits: Float[Tensor, "batch pos vocab"] | None
    """Logits, Gemma 2's cap included, when they were asked for."""
    batch: Batch
    """The tokens as they were run; its mask is False at padding."""

    def __getitem__(self, site: str | Site) -> Tensor:
        """The tensor at ``site``; raises SiteError when it was not captured."""
        site = Site.parse(site)
        if site not in self.acts:
            raise SiteError(f"'{site}' was not captured; this capture holds {', '.join(map(str, self.acts))}.")
        return self.acts[site]

    def __contains__(self, site: object) -> bool:
        return isinstance(site, str | Site) and Site.parse(site) in self.acts

    def item(self, index: int, site: str | Site) -> Tensor:
        """One item without its padding: [pos, width], or [head, query, key] for a pattern."""
        if not 0 <= index < len(self.batch.items):
            raise InputError(f"there is no item {index}; the batch holds {len(self.batch.items)}.")
        found, values = Site.parse(site), self[site][index]
        start = int(self.batch.first[index])
        at = slice(start, start + len(self.batch.items[index]))
        return values[:, at, at] if found.name == "pattern" else values[at]

    def rows(self, site: str | Site) -> Float[Tensor, "row width"]:
        """Every token's value, items one after the other, padding left out; raises SiteError for a
        pattern."""
        if Site.parse(site).name == "pattern":
            raise SiteError(f"'{site}' has no rows: a pattern is [head, query, key]; use item().")
        values = self[site]
        return values[self.batch.mask.to(values.device)]
