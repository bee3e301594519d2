"""The worlds by name: what is planted, what is trained on it, and what has to come out.

``easy``, ``nano``, ``mini`` and ``16k`` are worlds of SAELens synthetic models, seed 42, direction for direction;
the others ask the same of the kinds of dictionaries for which there was no such test. Their features fire as those of
``easy`` do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gemscope.core.errors import InputError
from gemscope.evaluation.worlds.codes import CodesConfig
from gemscope.evaluation.worlds.world import WorldConfig

Method = Literal["jumprelu", "batchtopk", "matryoshka"]
"""``matryoshka`` is a BatchTopK dictionary with the tier's prefixes."""


@dataclass(frozen=True)
class Target:
    """What the mean over seeds has to reach."""

    mcc: float
    f1: float | None = None
    encoder_mcc: float | None = None
    affine_r2: float | None = None
    shared_auc: float | None = None


@dataclass(frozen=True)
class Tier:
    """One task."""

    name: str
    about: str
    world: WorldConfig
    d_sae: int
    """Latents, per layer."""
    l0: float
    """Active latents per row to aim for, over all layers."""
    rows: int
    """Rows to train on."""
    seconds: float
    """CPU seconds that one training may take, its rows' making included; of the ``16k`` world: hours of a GPU."""
    prefixes: tuple[int, ...] = ()
    targets: Mapping[Method, Target] = field(default_factory=dict[Method, Target])
    """By method; what has no target is trained and shown all the same."""

    @property
    def methods(self) -> tuple[Method, ...]:
        """What can be trained on it."""
        return ("jumprelu", "batchtopk", "matryoshka") if self.prefixes else ("jumprelu", "batchtopk")


def _flat(features: int) -> CodesConfig:
    return CodesConfig(features, most=0.1, least=0.02)


def _trees(features: int, roots: int) -> CodesConfig:
    return CodesConfig(features, most=0.4, least=2e-3, exponent=0.7, roots=roots, depth=2, correlation=0.1)


_FOUND = Target(0.97, 0.90)
_ALIKE = Target(0.95, encoder_mcc=0.95, affine_r2=0.95)

TIERS: Mapping[str, Tier] = {
    tier.name: tier
    for tier in (
        Tier(
            "easy",
            "128 independent features in 64 dimensions, as many latents",
            WorldConfig(_flat(128), 64),
            d_sae=128,
            l0=3.4,
            rows=4_500 * 1024,
            seconds=40.0,
            prefixes=(16, 64),
            targets={"jumprelu": _FOUND, "batchtopk": _FOUND, "matryoshka": _FOUND},
        ),
        Tier(
            "nano",
            "256 correlated features, 168 of them in 8 trees, in 64 dimensions; 64 latents",
            WorldConfig(_trees(256, 8), 64),
            d_sae=64,
            l0=3.0,
            rows=2_000 * 1024,
            seconds=20.0,
            prefixes=(4, 16),
            targets={"batchtopk": Target(0.72, 0.66), "matryoshka": Target(0.785, 0.87)},
        ),
        Tier(
            "mini",
            "512 correlated features, 336 of them in 16 trees, in 128 dimensions; 128 latents",
            WorldConfig(_trees(512, 16), 128),
            d_sae=128,
            l0=4.0,
            rows=4_000 * 1024,
            seconds=70.0,
            prefixes=(8, 32),
        ),
        Tier(
            "transcoder",
            "128 features read from 64 dimensions and written along other directions",
            WorldConfig(_flat(128), 64, "transcoder"),
            d_sae=128,
            l0=3.4,
            rows=4_500 * 1024,
            seconds=60.0,
            targets={"batchtopk": Target(0.95, encoder_mcc=0.95)},
        ),
        Tier(
            "skip_transcoder",
            "64 features read with noise and written along other directions, and a linear map of what is read",
            WorldConfig(_flat(64), 64, "skip_transcoder", noise=0.7, affine=0.7),
            d_sae=96,
            l0=1.9,
            rows=3_000 * 1024,
            seconds=60.0,
            targets={"batchtopk": _ALIKE},
        ),
        Tier(
            "clt",
            "64 features in each of 3 layers, written to their own and all later ones, with a linear map",
            WorldConfig(_flat(192), 64, "clt", layers=3, noise=0.7, affine=0.7),
            d_sae=96,
            l0=5.1,
            rows=3_000 * 1024,
            seconds=120.0,
            targets={"batchtopk": _ALIKE},
        ),
        Tier(
            "crosscoder",
            "64 features in both of 2 layers along different directions, 32 in the first alone and 32 in the second",
            WorldConfig(_flat(128), 64, "crosscoder", layers=2, shared=64),
            d_sae=96,
            l0=3.4,
            rows=3_000 * 1024,
            seconds=60.0,
            targets={"batchtopk": Target(0.95, shared_auc=0.95)},
        ),
        Tier(
            "16k",
            "SynthSAEBench-16k: 16,384 features in 768 dimensions, 10,880 of them in trees; 4,096 latents; for a GPU",
            WorldConfig(CodesConfig(16_384, most=0.4, least=5e-4, roots=128, depth=3, correlation=0.1), 768),
            d_sae=4096,
            l0=25.0,
            rows=200_000_000 // 1024 * 1024,
            seconds=0.0,
            prefixes=(128, 512, 2048),
            targets={"matryoshka": Target(0.793, 0.88)},
        ),
    )
}


def tier(name: str) -> Tier:
    """By name; raises InputError for one that there is not."""
    if name not in TIERS:
        raise InputError(f"there is no world {name!r}; use one of {', '.join(TIERS)}.")
    return TIERS[name]
