"""What a store and activations on the fly have in common: their plan says which sites there are, and how wide."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gemscope.activations.order import Position
from gemscope.activations.plan import Plan
from gemscope.activations.stream import Stream
from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site


class PlannedRows(ABC):
    """Rows that follow a plan: the trainer reads them as it reads an ``ActivationSet``."""

    plan: Plan

    @property
    @abstractmethod
    def name(self) -> str:
        """For messages."""

    @property
    def sites(self) -> list[Site]:
        """The sites, in the order of a forward pass."""
        return list(self.plan.sites)

    @property
    def about(self) -> dict[str, Any]:
        """How the rows are made: what was asked for (model, revision, source, rule of positions), and the plan's own
        notes.
        """
        return {**self.plan.config, "documents": self.plan.documents, **self.plan.about}

    def check_site(self, site: Site | str) -> Site:
        """The site as a value; raises InputError when it was not harvested."""
        site = Site.parse(site)
        if site not in self.plan.sites:
            raise InputError(f"no activations of {site} in {self.name}; there are {', '.join(map(str, self.sites))}.")
        return site

    def width(self, site: Site | str) -> int:
        """Width of a site's activations."""
        return self.plan.sites[self.check_site(site)].width

    @abstractmethod
    def stream(
        self,
        sites: Sequence[Site | str],
        batch_size: int,
        seed: int = 0,
        *,
        start: Position | None = None,
        epochs: int | None = None,
        device: torch.device | None = None,
    ) -> Stream:
        """Shuffled batches of the sites, aligned over them, from ``start`` on."""

    def batches(
        self, sites: Sequence[Site], batch_size: int, seed: int = 0, epoch: int = 0
    ) -> Iterator[dict[Site, Float[Tensor, "batch _"]]]:
        """Every row once, in an order given by ``seed`` and ``epoch``: one epoch of a stream."""
        return self.stream(sites, batch_size, seed, start=Position(epoch), epochs=1)
