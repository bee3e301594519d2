"""What a training will take, said before it starts: memory of the weights, moments, activations and batch, disk, time.

The counts follow the code: ``multilayer`` keeps weights and one moment, and one decoder's gradient at a time (all
encoders' and a tied decoder's own beside it); a single-layer SAE keeps weights, two moments and all gradients. The test
beside this module compares them with a real step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemscope.core.sites import Site
from gemscope.training.config import MULTI_LAYER, TrainConfig
from gemscope.training.multilayer import MultiLayerConfig

_INDEX, _FLOAT = 8, 4
_BLOCK = 1 << 20
"""Elements of temporary memory in an optimiser's step and of pre-activations held at a time."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one dictionary in one process."""

    weights: int
    moments: int
    gradients: int
    """The largest that exist at one time."""
    codes: int
    """Entries of the batch and what is computed on them."""
    batch: int
    """Rows of the batch, scaled, and reconstructions."""
    host: int = 0
    """Of weights and moments, what lies in the host's memory when the rest is on a device."""

    @property
    def total(self) -> int:
        """On the device."""
        return self.weights + self.moments + self.gradients + self.codes + self.batch - self.host


@dataclass(frozen=True)
class Plan:
    """What a pass takes."""

    dictionaries: Sequence[Memory]
    calibration: int
    """Bytes of the calibration rows, fp32."""
    checkpoint: int
    """Bytes of a checkpoint on the disk."""
    rows: int
    """Rows of all updates."""
    activations: int
    """Bytes of as many stored rows in bf16."""
    flops: float
    """Of the encoder products, which are nearly all: 2 d_in d_sae a row and layer, forward."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(one.total for one in self.dictionaries) + self.calibration

    def seconds(self, flops_per_second: float) -> float:
        """Time at a measured speed of dense products."""
        return self.flops / flops_per_second


def plan(configs: Sequence[TrainConfig], widths: Mapping[Site, int], shards: int = 1, data_shards: int = 1) -> Plan:
    """The memory of a pass with latents over ``shards`` processes and rows over ``data_shards``."""
    sites = dict.fromkeys(site for config in configs for site in config.sites)
    rows = configs[0].steps * configs[0].batch_size
    row = sum(widths[site] for site in sites)
    memory = [memory_of(c, widths, shards, data_shards) for c in configs]
    flops = sum(2.0 * rows * len(c.reads) * widths[c.site] * c.d_sae for c in configs)
    kept = sum(m.weights + m.moments for m in memory) * shards
    return Plan(memory, configs[0].calibration_rows * row * _FLOAT, kept, rows, rows * row * 2, flops)


def memory_of(config: TrainConfig, widths: Mapping[Site, int], shards: int = 1, data_shards: int = 1) -> Memory:
    """One dictionary's share of a process's memory."""
    n, F = len(config.reads), config.d_sae // shards
    d_in, d_out = widths[config.site], widths[config.writes[0]]
    options = config if isinstance(config, MultiLayerConfig) else None
    tied = options is not None and options.tied
    pairs = n if tied else n * (n + 1) // 2
    decoders, encoders = pairs * F * d_out, n * F * d_in
    small = n * (2 * F + d_out) + (n * d_in * d_out if options is not None and options.has_skip else 0)
    weights = _FLOAT * (decoders + encoders + small)
    streamed = options is not None or config.kind in MULTI_LAYER
    moment = 2 if options is not None and options.moments == "bfloat16" else _FLOAT
    moments = moment * (decoders + encoders) + _FLOAT * small if streamed else 2 * weights
    if streamed:  # the gradient of one decoder and its sum, or of all tied ones; then of one encoder
        gradients = _FLOAT * F * (d_out * (n if tied else 1) if n > 1 or tied else max(d_in, d_out))
        gradients = max(gradients, _FLOAT * F * d_in) + 4 * _FLOAT * _BLOCK
    else:
        gradients = weights
    batch = config.batch_size // data_shards
    entries = 1.5 * batch * config.first_l0 / shards
    codes = int(entries * (9 * _INDEX + 7 * _FLOAT)) + 2 * _FLOAT * _BLOCK
    rows = _FLOAT * batch * (2 * n * d_in + 2 * n * d_out + d_out * 4 * (len(config.prefixes) + 1))
    host = (_FLOAT + moment) * decoders if options is not None and options.offload else 0
    return Memory(weights, moments, gradients, codes, rows, host)


def fits(found: Plan, available: int) -> bool:
    """Whether the pass fits into so many bytes on the device."""
    return found.total <= available


def proposals(
    configs: Sequence[TrainConfig], widths: Mapping[Site, int], available: int, most_shards: int = 64
) -> list[str]:
    """What would make a pass fit that does not, the least change first; empty when it fits as it is."""
    if fits(plan(configs, widths), available):
        return []
    found: list[str] = []
    halved = [_changed(c, moments="bfloat16") for c in configs]
    if fits(plan(halved, widths), available):
        found.append(f"bf16 moments: {_size(plan(halved, widths).total)}")
    away = [_changed(c, offload=True) for c in configs]
    if fits(plan(away, widths), available):
        host = sum(m.host for m in plan(away, widths).dictionaries)
        found.append(f"decoders offloaded: {_size(plan(away, widths).total)} on the device, {_size(host)} on the host")
    shards = 2
    while shards <= most_shards:
        if all(c.d_sae % shards == 0 for c in configs) and fits(plan(configs, widths, shards), available):
            found.append(f"latents over {shards} processes: {_size(plan(configs, widths, shards).total)} each")
            break
        shards *= 2
    if len(configs) > 1:
        largest = max(memory_of(c, widths).total for c in configs)
        if largest <= available:
            found.append(f"fewer dictionaries in one pass: the largest alone takes {_size(largest)}")
    return found or [
        f"nothing here makes it fit into {_size(available)}; use fewer latents or layers, or tied decoders"
    ]


def _changed(config: TrainConfig, **more: Any) -> TrainConfig:
    given: dict[str, Any] = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return MultiLayerConfig(**{**given, **more}) if config.kind in MULTI_LAYER else config


def _size(count: float | int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


size_text = _size
"""Bytes as people read them."""
