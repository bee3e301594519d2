"""A dictionary together with the places of a model that it reads and writes: what every measure is taken of.

The two places define the splice for all kinds alike: an SAE writes what it reads, a transcoder reads what enters an
MLP and writes what leaves it, a CLT does so in all layers jointly, a crosscoder reads and writes one site of several.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gemscope.artifacts.config import AnyDictionary, Loaded
from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.sparse import Support
from gemscope.models.gemma import Gemma


@dataclass(frozen=True, eq=False)
class Subject:
    """One dictionary to be measured; position i reads ``reads[i]`` and reconstructs ``writes[i]``."""

    name: str
    dictionary: AnyDictionary
    reads: tuple[Site, ...]
    writes: tuple[Site, ...]

    @classmethod
    def of(cls, name: str, loaded: Loaded, gemma: Gemma) -> "Subject":
        """From files; one made for a norm's output without its gain is given the gain, so that it reads the site."""
        dictionary, config = loaded.dictionary.to(gemma.device), loaded.config
        if not config.read_gain:
            modules = gemma.decoder.layer
            gains = [
                1.0 + modules(site.layer or 0).get_submodule(str(site.kind.module)).get_parameter("weight").float()
                for site in config.reads
            ]
            dictionary = dictionary.fold_input_gain(gains if dictionary.n_positions > 1 else gains[0])  # pyright: ignore
        return cls(name, dictionary, config.reads, config.writes)

    @property
    def sites(self) -> tuple[Site, ...]:
        """All places it touches, once each."""
        return tuple(dict.fromkeys((*self.reads, *self.writes)))

    def check(self, gemma: Gemma) -> None:
        """Raise SiteError for a place that the model does not have, InputError for one of another width."""
        for widths, sites, verb in (
            (self.dictionary.d_in, self.reads, "reads"),
            (self.dictionary.d_out, self.writes, "writes"),
        ):
            if len(sites) != self.dictionary.n_positions:
                raise InputError(
                    f"{self.name} has {self.dictionary.n_positions} positions but {verb} {len(sites)} sites."
                )
            for site in sites:
                if (width := gemma.width(site)) != widths:
                    raise InputError(
                        f"the dictionary {verb} {widths} numbers, but {site} of {gemma.name} has {width}; use the model"
                        " and site it was trained on."
                    )
        late = [(r, w) for r, w in zip(self.reads, self.writes, strict=True) if w.order < r.order]
        if late:
            raise InputError(
                f"{self.name} writes {late[0][1]} before it reads {late[0][0]}; that cannot be spliced in."
            )

    def stack(self, rows: Mapping[Site, Float[Tensor, "rows _"]]) -> Float[Tensor, "rows n d_in"]:
        """What it reads, with the axis of positions."""
        return torch.stack([rows[site] for site in self.reads], dim=1)

    def codes(self, x: Float[Tensor, "rows n d_in"]) -> tuple[Support, Float[Tensor, " active"]]:
        """Its active latents, by index over all positions."""
        return self.dictionary.codes(x)

    def reconstruct(
        self, x: Float[Tensor, "rows n d_in"], support: Support, values: Float[Tensor, " active"]
    ) -> Float[Tensor, "rows n d_out"]:
        """What it writes at every position."""
        return self.dictionary.reconstruct(x, support, values)
