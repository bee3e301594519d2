"""What a dictionary found of a world: one function from (world, dictionary) to one frozen value.

Definitions as in SynthSAEBench (SAELens 6.54, ``synthetic/evals.py``), accumulated in float64 and counts. Every score
that a random dictionary does not bring to 0 is given with its floor.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from gemscope.core.arrays import Bool, Float, Tensor
from gemscope.core.errors import InputError
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.multilayer import MultiLayer
from gemscope.dictionaries.single import SingleLayer
from gemscope.dictionaries.sparse import Support
from gemscope.evaluation.worlds.matching import Match, adjusted, cosines_of, match, random_floor
from gemscope.evaluation.worlds.world import World

_ROWS = 2048


@dataclass(frozen=True)
class Detection:
    """Each latent as a detector of its most similar feature; where latents outnumber features, those of the pairs as
    detectors of the features they are paired with. Means over latents; what is undefined counts 0.
    """

    f1: float
    precision: float
    recall: float
    f1_floor: float
    """F1 of latents that fire as often, whatever the row holds: 2 q p / (q + p)."""


@dataclass(frozen=True)
class Score:
    """What was found of a world."""

    mcc: float
    """Mean |cosine| of decoder directions paired one to one with features."""
    mcc_floor: float
    """The same of random directions."""
    uniqueness: float
    """Share of latents whose most similar feature is no other's."""
    uniqueness_floor: float
    detection: Detection
    explained: float
    """Fraction of variance explained over all that is written, 1 - FVU."""
    shrinkage: float
    """Mean norm of the reconstruction over the norm of what is to be written."""
    l0: float
    """Active latents per row."""
    true_l0: float
    """Features per row."""
    dead: int
    """Latents that never fired."""
    latents: int
    rows: int
    """Rows measured on."""
    encoder_mcc: float | None = None
    """Where encoder and decoder are different truths: mean |cosine| of the pairs' encoders with ``best_readers``."""
    encoder_floor: float | None = None
    """The same of random encoders."""
    affine_r2: float | None = None
    """1 - |A' - A|^2 / |A|^2 over all layers."""
    shared_auc: float | None = None
    """Crosscoders: how well the paired latents' decoder norms tell shared from exclusive features."""

    @property
    def mcc_adjusted(self) -> float:
        """0 for random directions, 1 for the truth."""
        return adjusted(self.mcc, self.mcc_floor)

    @property
    def f1_adjusted(self) -> float:
        """0 for latents that fire by chance, 1 for the truth."""
        return adjusted(self.detection.f1, self.detection.f1_floor)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"mcc_adjusted": self.mcc_adjusted, "f1_adjusted": self.f1_adjusted}


@torch.no_grad()
def score(world: World, dictionary: Dictionary, rows: int = 20_480, seed: int = 0) -> Score:
    """Measure on ``rows`` new rows, a function of ``seed``. Raises InputError when the dictionary does not fit."""
    _check(world, dictionary)
    learned = decoder_rows(dictionary)
    found = match(learned, world.decoder)
    floor = random_floor(learned != 0, world.decoder)
    sums = _Sums(dictionary.n_latents, world.config.codes.features)
    generator = world.generator(2, seed)
    for start in range(0, rows, _ROWS):
        drawn = world.draw(min(_ROWS, rows - start), generator)
        support, _ = dictionary._select(drawn.x)  # pyright: ignore[reportPrivateUsage]
        recon = dictionary(drawn.x if dictionary.n_positions > 1 else drawn.x[:, 0]).view_as(drawn.y)
        sums.add(support, drawn.codes > 0, drawn.y, recon)
        sums.add_inputs(drawn.x)
    more: dict[str, Any] = {}
    if not world.config.reconstructs:
        readers = best_readers(world, sums.covariance)
        more["encoder_mcc"], more["encoder_floor"] = _encoder(readers, dictionary, found)
    if world.A is not None:
        more["affine_r2"] = _affine_r2(world.A, dictionary)
    if world.config.kind == "crosscoder":
        more["shared_auc"] = shared_auc(world, learned, found)
    return Score(
        mcc=found.mcc,
        mcc_floor=floor[0],
        uniqueness=found.uniqueness,
        uniqueness_floor=floor[1],
        detection=sums.detection(found),
        explained=1 - sums.error / (sums.square - float(sums.total.square().sum()) / sums.rows),
        shrinkage=sums.ratio / sums.rows,
        l0=float(sums.fires.sum()) / sums.rows,
        true_l0=float(sums.holds.sum()) / sums.rows,
        dead=int((sums.fires == 0).sum()),
        latents=dictionary.n_latents,
        rows=sums.rows,
        **more,
    )


def _check(world: World, dictionary: Dictionary) -> None:
    sizes = (world.config.kind, world.config.layers, world.config.d)
    if (dictionary.kind, dictionary.n_positions, dictionary.d_in) != sizes:
        raise InputError(
            f"a {dictionary.kind} over {dictionary.n_positions} layers of width {dictionary.d_in} cannot be measured on"
            f" a world for a {sizes[0]} over {sizes[1]} of width {sizes[2]}; give one of that kind."
        )


def decoder_rows(dictionary: Dictionary) -> Float[Tensor, "latents width"]:
    """What each latent writes, over all layers side by side; zeros in layers before its own."""
    if isinstance(dictionary, SingleLayer):
        return dictionary.W_dec.float()
    assert isinstance(dictionary, MultiLayer)
    n, tables = dictionary.n_positions, [table.float() for table in dictionary.W_dec]
    blank = tables[0].new_zeros(dictionary.d_sae, dictionary.d_out)
    return torch.cat([torch.cat([*[blank] * i, *tables[i]], dim=1) for i in range(n)])


def encoder_rows(dictionary: Dictionary) -> Float[Tensor, "latents width"]:
    """What each latent reads, over all layers side by side; zeros in layers other than its own."""
    if isinstance(dictionary, SingleLayer):
        return dictionary.W_enc.float().T
    assert isinstance(dictionary, MultiLayer)
    n = dictionary.n_positions
    found = dictionary.W_enc[0].new_zeros(n, dictionary.d_sae, n, dictionary.d_in, dtype=torch.float32)
    for layer, table in enumerate(dictionary.W_enc):
        found[layer, :, layer] = table.float().T
    return found.view(n * dictionary.d_sae, -1)


def shared_auc(world: World, learned: Float[Tensor, "latents width"], found: Match) -> float:
    """Area under the ROC curve of smallest over largest decoder norm of the layers, paired latents of shared features
    against those of exclusive ones.
    """
    latents, features = found.pairs
    norms = learned[latents].view(len(latents), world.config.layers, -1).double().norm(dim=2)
    even = norms.min(1).values / norms.max(1).values.clamp(min=1e-12)
    shared = world.in_all_layers.cpu()[features]
    gaps = even[shared][:, None] - even[~shared][None, :]
    return float((gaps > 0).double().mean() + (gaps == 0).double().mean() / 2)


def best_readers(world: World, covariance: Float[Tensor, "layers d d"]) -> Float[Tensor, "features width"]:
    """Directions of the best linear estimates of the features from what is read, C^-1 R for the covariance C of a
    layer, all layers side by side. Not R itself: where features overlap, the best estimate of one leaves out others.
    """
    read = world.read.double().cpu()
    return torch.linalg.solve(covariance, read.transpose(1, 2)).transpose(1, 2).transpose(0, 1).flatten(1)


def _encoder(readers: Float[Tensor, "features width"], dictionary: Dictionary, found: Match) -> tuple[float, float]:
    """Over the decoder's pairs, and for random directions."""
    cosines = cosines_of(encoder_rows(dictionary).cpu(), readers)
    random = torch.randn(1024, readers.shape[1], generator=torch.Generator().manual_seed(0))
    return cosines[found.pairs[0], found.pairs[1]].mean().item(), cosines_of(random, readers).mean().item()


def _affine_r2(A: Float[Tensor, "layers d d"], dictionary: Dictionary) -> float | None:
    skip = getattr(dictionary, "W_skip", None)
    if skip is None:
        return None
    learned = skip[None] if isinstance(skip, Tensor) else torch.stack(list(skip))
    return 1 - float((learned - A).double().square().sum() / A.double().square().sum())


class _Sums:
    """Counts and sums over rows."""

    def __init__(self, latents: int, features: int) -> None:
        self.rows, self.error, self.square, self.ratio = 0, 0.0, 0.0, 0.0
        self.total: Tensor = torch.zeros((), dtype=torch.float64)
        self.both = torch.zeros(latents, features, dtype=torch.float64)
        self.fires = torch.zeros(latents, dtype=torch.float64)
        self.holds = torch.zeros(features, dtype=torch.float64)
        self.x: Tensor = torch.zeros((), dtype=torch.float64)
        self.xx: Tensor = torch.zeros((), dtype=torch.float64)

    def add(
        self, support: Support, holds: Bool[Tensor, "rows features"], y: Float[Tensor, "rows _ _"], recon: Tensor
    ) -> None:
        """One batch."""
        fires = torch.zeros(support.batch, support.d_sae, device=y.device)
        fires[support.rows, support.latents] = 1.0
        self.both += (fires.T @ holds.float()).double().cpu()
        self.fires += fires.sum(0).double().cpu()
        self.holds += holds.sum(0).double().cpu()
        y, recon = y.flatten(1).double().cpu(), recon.flatten(1).double().cpu()
        self.rows += len(y)
        self.error += float((y - recon).square().sum())
        self.square += float(y.square().sum())
        self.total = self.total + y.sum(0)
        self.ratio += float((recon.norm(dim=1) / y.norm(dim=1).clamp(min=1e-12)).sum())

    def add_inputs(self, x: Float[Tensor, "rows layers d"]) -> None:
        """The moments of what is read."""
        x = x.double().cpu().transpose(0, 1)
        self.x, self.xx = self.x + x.sum(1), self.xx + x.transpose(1, 2) @ x

    @property
    def covariance(self) -> Float[Tensor, "layers d d"]:
        """Of what is read, in each layer."""
        mean = self.x / self.rows
        return self.xx / self.rows - mean[:, :, None] * mean[:, None, :]

    def detection(self, found: Match) -> Detection:
        """From the counts of the latents and their features."""
        latents, features = torch.arange(len(self.fires)), found.best
        if len(self.fires) > len(self.holds):
            latents, features = found.pairs
        both, fires, holds = self.both[latents, features], self.fires[latents], self.holds[features]
        return Detection(
            f1=_ratio(2 * both, fires + holds),
            precision=_ratio(both, fires),
            recall=_ratio(both, holds),
            f1_floor=_ratio(2 * fires * holds / self.rows, fires + holds),
        )


def _ratio(above: Tensor, below: Tensor) -> float:
    return float(torch.where(below > 0, above / below.clamp(min=1), 0.0).mean())
