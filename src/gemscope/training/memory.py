"""Bytes that one dictionary takes in one process: what stays, and the most that is added at the start, in an update and
when it is exported.

The counts follow the code: ``single`` keeps weights and Adam's moments of both tables (one where ``beta1`` is 0) and
never makes a dense gradient; ``multilayer`` keeps weights and one moment, and one decoder's gradient at a time (tied
ones all). Both export through copies, which take several times the dictionary for a moment. Factors of entries were
measured; ``test_planner`` compares everything with real runs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch

from gemscope.core.sites import Site
from gemscope.dictionaries import screening
from gemscope.dictionaries.base import SLICE
from gemscope.training.adam import _CHUNK as _ADAM  # pyright: ignore[reportPrivateUsage]
from gemscope.training.calibration import _ENTRIES as _COUNTED  # pyright: ignore[reportPrivateUsage]
from gemscope.training.calibration import _LATENTS  # pyright: ignore[reportPrivateUsage]
from gemscope.training.config import MULTI_LAYER, TrainConfig
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.single import _SCREEN_FROM  # pyright: ignore[reportPrivateUsage]

CPU = torch.device("cpu")
_INDEX, _FLOAT, _DOUBLE = 8, 4, 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one dictionary in one process."""

    weights: int
    moments: int
    start: int
    """Beyond weights and moments, while thresholds are first set on the calibration rows."""
    step: int
    """Beyond them, in an update: gradients, entries of the batch, rows, reconstructions."""
    export: int
    """Beyond them, while the dictionary for raw activations is made, calibrated and measured; it is included."""
    finished: int
    """The dictionary for raw activations, fp32."""
    host: int = 0
    """Of weights and moments, what lies in the host's memory when the rest is on a device."""

    @property
    def kept(self) -> int:
        """On the device, all the time."""
        return self.weights + self.moments - self.host


@dataclass(frozen=True)
class _Sizes:
    """What the formulas count in; ``n`` layers, ``F`` latents of each in this process, ``rows`` of a batch."""

    config: TrainConfig
    d_in: int
    d_out: int
    shards: int
    data_shards: int
    held_out: int
    device: torch.device

    @property
    def several(self) -> MultiLayerConfig | None:
        return self.config if isinstance(self.config, MultiLayerConfig) else None

    @property
    def is_single(self) -> bool:
        """Whether ``single`` trains it, not ``multilayer``."""
        return self.several is None and self.config.kind not in MULTI_LAYER and self.shards * self.data_shards == 1

    @property
    def tied(self) -> bool:
        return self.several is not None and self.several.tied

    @property
    def n(self) -> int:
        return len(self.config.reads)

    @property
    def F(self) -> int:
        return self.config.d_sae // self.shards

    @property
    def rows(self) -> int:
        return self.config.batch_size // self.data_shards

    @property
    def encoders(self) -> int:
        """Elements."""
        return self.n * self.F * self.d_in

    @property
    def decoders(self) -> int:
        """Elements; of a pair of layers each, or tied."""
        return (self.n if self.tied else self.n * (self.n + 1) // 2) * self.F * self.d_out

    @property
    def small(self) -> int:
        """Elements of everything else."""
        has_skip = self.config.kind == "skip_transcoder" or (self.several is not None and self.several.has_skip)
        return self.n * (2 * self.F + self.d_out) + (self.n * self.d_in * self.d_out if has_skip else 0)


def memory_of(
    config: TrainConfig,
    widths: Mapping[Site, int],
    shards: int = 1,
    data_shards: int = 1,
    *,
    held_out: int = 0,
    device: torch.device = CPU,
) -> Memory:
    """One dictionary's share of the memory of a process on ``device``, with latents over ``shards`` processes and rows
    over ``data_shards``, measured on ``held_out`` rows.
    """
    d_in, d_out = widths[config.site], widths[config.writes[0]]
    s = _Sizes(config, d_in, d_out, shards, data_shards, held_out, device)
    weights = _FLOAT * (s.encoders + s.decoders + s.small)
    if s.is_single:
        moments = _FLOAT * ((2 if config.beta1 > 0 else 1) * (s.encoders + s.decoders) + 2 * s.small)
        step, host = _single_step(s), 0
    else:
        each = 2 if s.several is not None and s.several.moments == "bfloat16" else _FLOAT
        moments = each * (s.encoders + s.decoders) + _FLOAT * s.small
        away = s.several is not None and s.several.offload and device.type != "cpu"
        step, host = _multi_step(s), (_FLOAT + each) * s.decoders if away else 0
    finished = _FLOAT * (s.encoders * shards + _whole_decoders(s) + s.small * shards)
    return Memory(weights, moments, _start(s, weights, moments), step, _export(s, finished), finished, host)


def _whole_decoders(s: _Sizes) -> int:
    """Elements of the finished dictionary's decoders, which are neither tied nor sharded."""
    return s.n * (s.n + 1) // 2 * s.config.d_sae * s.d_out


def _entries(s: _Sizes) -> float:
    """Entries of a batch; with those inside the estimator's window about 1.6 times the active ones."""
    return (1.6 if s.config.activation == "jumprelu" else 1.0) * s.rows * s.config.first_l0 / s.shards


def _single_step(s: _Sizes) -> int:
    """Finding the entries, or the way back through them."""
    blocks = max(screening._BLOCK.get(s.device.type, 1 << 27), screening._ROWS * s.F)  # pyright: ignore[reportPrivateUsage]
    fast = screening.bf16_is_fast(s.device) and s.encoders >= _SCREEN_FROM
    screened = fast if s.config.product_dtype == "auto" else s.config.product_dtype == "bfloat16"
    read = s.rows * (2 * s.d_in + (0 if s.config.kind == "sae" else s.d_out))
    if screened:  # the encoder in bf16 twice, rows in bf16, blocks in bf16
        finding = _FLOAT * (read + s.encoders + blocks) + 2 * s.rows * s.d_in + 90 * _entries(s)
    else:
        finding = _FLOAT * (read + 2 * blocks) + 40 * _entries(s)
    nested = len(s.config.prefixes) or s.config.sampled_prefixes
    back = _FLOAT * (read + s.rows * s.d_out * (3 + 2 * nested)) + 80 * _entries(s)
    return int(max(finding, back))


def _multi_step(s: _Sizes) -> int:
    """The gradient of one decoder and its sum, or of all tied ones; then of one encoder; entries; rows."""
    gradients = _FLOAT * s.F * (s.d_out * (s.n if s.tied else 1) if s.n > 1 or s.tied else max(s.d_in, s.d_out))
    gradients = max(gradients, _FLOAT * s.F * s.d_in) + 4 * _FLOAT * min(_ADAM, s.F * s.d_out)
    codes = _entries(s) * (9 * _INDEX + 7 * _FLOAT) + 2 * _FLOAT * _ADAM
    rows = _FLOAT * s.rows * (s.n * s.d_in + s.n * s.d_out + s.d_out * 4 * (len(s.config.prefixes) + 1))
    return int(gradients + codes + rows)


def _start(s: _Sizes, weights: int, moments: int) -> int:
    """Scaled calibration rows, and pre-activations of some latents on all of them; or moments of rows, in fp64."""
    rows = s.config.calibration_rows
    spread = 3 * _DOUBLE * rows * max(s.d_in, s.d_out)
    some = min(_LATENTS, s.F)
    highest = max(1, rows * s.config.first_l0 / (s.n * s.config.d_sae)) * some * (_FLOAT + _INDEX)
    quantiles = 2 * _FLOAT * rows * some + highest
    scaled = _FLOAT * rows * s.d_in * (2 if s.is_single else s.n)
    tables = 3 * _FLOAT * s.config.d_sae * max(s.d_in, s.d_out)
    return max(0, int(max(spread, weights + scaled + max(quantiles, tables))) - weights - moments)


def _export(s: _Sizes, finished: int) -> int:
    """Copies for folding scales and centres; entries for setting thresholds; squares in fp64 for the FVU."""
    config, rows = s.config, s.config.calibration_rows
    changed = 0 if config.kind == "sae" else _FLOAT * _whole_decoders(s)
    if s.is_single:
        folding = 3 * finished + changed + (_FLOAT * rows * s.d_in if config.activation == "batchtopk" else 0)
        stacked = 0
    else:
        folding = 2 * finished + _FLOAT * _whole_decoders(s) + (finished if s.shards > 1 else 0)
        stacked = _FLOAT * rows * s.n * s.d_in
    counted = 0.0
    if config.activation == "jumprelu":
        latents = s.n * config.d_sae
        share = _at_half_the_threshold(config.first_l0 / latents)
        part = min(rows, max(1, _COUNTED // latents))
        each = 2 * (2 * _INDEX + _FLOAT) if s.n * math.ceil(config.d_sae / SLICE) == 1 else 96
        counted = latents * share * (each * part + (_FLOAT * rows if part < rows else 0))
    measured = 3 * _DOUBLE * s.held_out * s.d_out if s.device.type == "cpu" else 0
    return int(max(folding, finished + stacked + counted, finished + measured))


def _at_half_the_threshold(share: float) -> float:
    """Of normal numbers, the share above half of what ``share`` of them are above: what is looked at when thresholds
    are set.
    """
    normal = NormalDist()
    return 1 - normal.cdf(normal.inv_cdf(1 - share) / 2)
