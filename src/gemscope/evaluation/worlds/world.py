"""Worlds of every kind of dictionary: known features, what they read from, what they write to, and an affine part.

    x_l = codes R_l + b_l + noise        y_m = codes W_m + x_m A_m + c_m

codes [rows, features] (``codes``); R_l and W_m [features, d] hold unit directions, or zeros where a feature is not in
that place. What a kind makes of it:

    sae              one place; W = R, y = x
    transcoder       one place; W other directions than R
    skip_transcoder  the same with A and noise, without which A could not be told from the features
    clt              features read in one layer each, written to it and to all later ones; A and noise
    crosscoder       W = R, y = x; ``shared`` features, drawn by lot, lie in all layers, the others in one each
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch

from gemscope.core.arrays import Bool, Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.evaluation.worlds.codes import Codes, CodesConfig
from gemscope.evaluation.worlds.directions import spread_out

Kind = Literal["sae", "transcoder", "skip_transcoder", "clt", "crosscoder"]


@dataclass(frozen=True)
class WorldConfig:
    """One world. Raises InputError when a value cannot be."""

    codes: CodesConfig
    """How features fire."""
    d: int
    """Width of every place."""
    kind: Kind = "sae"
    """Which dictionary it is the truth of."""
    layers: int = 1
    """Places in a row, for ``clt`` and ``crosscoder``."""
    shared: int = 0
    """``crosscoder``: features that lie in all layers."""
    noise: float = 0.0
    """Standard deviation of noise on what is read, per dimension."""
    affine: float = 0.0
    """Entries of A are Gaussian with this over sqrt(d); 0 means no A."""
    bias: float = 0.5
    """Norm of the biases."""
    orthogonal_steps: int = 100
    """Steps that push the directions of one place apart."""
    orthogonal_rate: float = 3e-4
    """Adam's in those steps."""
    seed: int = 42
    """Of directions, biases and A."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"there is no world of kind {self.kind!r}; use one of {', '.join(get_args(Kind))}.")
        if (self.layers > 1) != (self.kind in ("clt", "crosscoder")):
            raise InputError(f"a {self.kind} world of {self.layers} layers cannot be; clt and crosscoder have several.")
        if self.shared and self.kind != "crosscoder":
            raise InputError(f"only a crosscoder world has shared features, not a {self.kind}; leave shared out.")

    @property
    def reconstructs(self) -> bool:
        """Whether what is written is what is read."""
        return self.kind in ("sae", "crosscoder")

    @property
    def reads(self) -> tuple[Site, ...]:
        """Where what is read stands."""
        return tuple(Site("resid_post" if self.reconstructs else "mlp_in", layer) for layer in range(self.layers))

    @property
    def writes(self) -> tuple[Site, ...]:
        """Where what is written stands."""
        return self.reads if self.reconstructs else tuple(Site("mlp_out", layer) for layer in range(self.layers))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Drawn:
    """New rows of a world."""

    codes: Float[Tensor, "rows features"]
    x: Float[Tensor, "rows layers d"]
    """What is read."""
    y: Float[Tensor, "rows layers d"]
    """What is to be written; ``x`` itself for an SAE and a crosscoder."""


class World:
    """Known features, and rows made of them; everything is a function of the config and the seeds."""

    def __init__(self, config: WorldConfig, device: torch.device | None = None) -> None:
        self.config, self.codes = config, Codes(config.codes, device)
        self.device = self.codes.device
        read, write, b = _tables(config)
        self.read: Float[Tensor, "layers features d"] = read.to(device)
        """Directions that features are read from; zeros where a feature is not."""
        self.write: Float[Tensor, "layers features d"] = write.to(device)
        """Directions that features write to."""
        self.b_read, self.b_write = b[0].to(device), b[1].to(device)
        affine = _affine(config)
        self.A = None if affine is None else affine.to(device)

    @property
    def in_all_layers(self) -> Bool[Tensor, " features"]:
        """Which features write to every layer (``crosscoder``: the shared ones)."""
        return (self.write.norm(dim=2) > 0).all(0)

    @cached_property
    def decoder(self) -> Float[Tensor, "features width"]:
        """What each feature writes, over all layers side by side."""
        return self.write.transpose(0, 1).flatten(1)

    @cached_property
    def encoder(self) -> Float[Tensor, "features width"]:
        """What each feature is read from, over all layers side by side."""
        return self.read.transpose(0, 1).flatten(1)

    @torch.no_grad()
    def draw(self, rows: int, generator: torch.Generator) -> Drawn:
        """New rows."""
        codes = self.codes.draw(rows, generator)
        x = (codes @ self.encoder).view(rows, self.config.layers, self.config.d) + self.b_read
        if self.config.noise > 0:
            x += self.config.noise * torch.randn(x.shape, generator=generator, device=self.device)
        if self.config.reconstructs:
            return Drawn(codes, x, x)
        y = (codes @ self.decoder).view(x.shape) + self.b_write
        if self.A is not None:
            y += torch.einsum("rld,lde->rle", x, self.A)
        return Drawn(codes, x, y)

    def generator(self, *numbers: int) -> torch.Generator:
        """For rows, a function of the world's seed and the numbers."""
        seed = self.config.seed
        for number in numbers:
            seed = (seed * 1_000_003 + number + 1) % (1 << 62)
        return torch.Generator(self.device).manual_seed(seed)


class Stream:
    """Rows of a world as the trainer reads them: every batch is new."""

    def __init__(self, world: World, rows: int) -> None:
        """``rows`` of them make an epoch."""
        self.world, self._rows = world, rows

    @property
    def rows(self) -> int:
        """Number of rows per epoch."""
        return self._rows

    def width(self, site: Site) -> int:
        """Width of a site's activations."""
        return self.world.config.d

    def batches(
        self, sites: Sequence[Site], batch_size: int, seed: int, epoch: int
    ) -> Iterator[dict[Site, Float[Tensor, "batch width"]]]:
        """As many full batches as an epoch has; a function of all that is given."""
        generator = self.world.generator(1, seed, epoch)
        for _ in range(self._rows // batch_size):
            drawn = self.world.draw(batch_size, generator)
            found = {site: drawn.x[:, layer] for layer, site in enumerate(self.world.config.reads)}
            found |= {site: drawn.y[:, layer] for layer, site in enumerate(self.world.config.writes)}
            yield {site: found[site] for site in sites}


def _tables(config: WorldConfig) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """R and W [layers, features, d], zeros where a feature is not, and the biases [layers, d]."""
    n, features = config.layers, config.codes.features
    place, owner = torch.arange(n)[:, None], torch.arange(features) % n
    if config.kind == "crosscoder":
        order = torch.randperm(features, generator=torch.Generator().manual_seed(config.seed + 7))
        everywhere = torch.zeros(features, dtype=torch.bool)
        everywhere[order[: config.shared]] = True
        exclusive = torch.full((features,), -1)
        exclusive[~everywhere] = torch.arange(features - config.shared) % n
        read, b_read = _directions(config, 0, everywhere | (exclusive == place))
        return read, read, (b_read, b_read)
    read, b_read = _directions(config, 0, owner == place)
    if config.kind == "sae":
        return read, read, (b_read, b_read)
    write, b_write = _directions(config, 100, owner <= place)
    return read, write, (b_read, b_write)


def _directions(config: WorldConfig, more: int, here: Bool[Tensor, "layers features"]) -> tuple[Tensor, Tensor]:
    """Unit rows, of those that are in a layer pushed apart, and a bias, for every layer."""
    tables = torch.zeros(*here.shape, config.d)
    biases = torch.zeros(len(here), config.d)
    for layer in range(len(here)):
        generator = torch.Generator().manual_seed(config.seed + more + layer)
        rows = torch.randn(config.codes.features, config.d, generator=generator)
        bias = torch.randn(config.d, generator=generator)
        biases[layer] = bias * config.bias / bias.norm()
        tables[layer, here[layer]] = spread_out(rows[here[layer]], config.orthogonal_steps, config.orthogonal_rate)
    return tables, biases


def _affine(config: WorldConfig) -> Float[Tensor, "layers d d"] | None:
    if config.affine == 0:
        return None
    generator = torch.Generator().manual_seed(config.seed + 200)
    return torch.randn(config.layers, config.d, config.d, generator=generator) * (config.affine / config.d**0.5)
