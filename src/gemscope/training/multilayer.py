"""Crosscoders and CLTs being trained, alone or sharded over processes; with one layer, every other kind.

Notable:
- every site has its own scale: training sees x_l / C_l and y_m / D_m, both of mean square 1, and x_l less its mean;
  ``finished`` folds all of it (a TopK compares latents of different layers, so there all x share one scale);
- decoders are streamed (``layer_gradients``) and updated as soon as their gradient is complete (``adam``): beside
  weights and one moment there is one decoder's gradient in memory, on the device also when the rest is offloaded;
- what a latent writes, over all targets together, keeps norm 1: after each update its decoder rows are rescaled;
- the target L0 counts the latents of all layers and falls from the initial sum to ``target_l0``;
- ``tied``: one decoder per source layer, whatever the target.

Weights are named ``W_enc.l`` [d_sae, d_in] (rows, transposed against the dictionaries), ``b_enc.l``, ``threshold.l``,
``W_dec.l.m`` [d_sae, d_out] or tied ``W_dec.l``, ``b_dec.m``, ``W_skip.m`` [d_in, d_out].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from gemscope.core.arrays import Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.sparse import Slice, Support, select
from gemscope.training.adam import StreamedAdam
from gemscope.training.config import TrainConfig
from gemscope.training.data import Moments, moments
from gemscope.training.layer_codes import Candidates, batch_codes, row_codes
from gemscope.training.layer_export import build, calibrated, parts_of_dictionary
from gemscope.training.layer_gradients import Apply, Codes, Found, Layers, Terms, gradients
from gemscope.training.learner import Rows, StepResult
from gemscope.training.schedules import cosine_warmup, geometric, linear_decay, linear_warmup
from gemscope.training.sharding import ALONE, Mesh

_BLOCK = 1 << 14
_FIRST_ROWS = 4096
"""Rows that decoders begin from."""


@dataclass(frozen=True)
class MultiLayerConfig(TrainConfig):
    """A ``TrainConfig`` for dictionaries over several layers, or sharded ones of any kind.

    Only the quadratic sparsity term, fixed prefixes and ``beta1`` 0 are known here.
    """

    skip: bool = False
    """A linear path from what a layer reads to what it writes (the ``affine`` CLTs of Gemma Scope 2)."""
    from_data: bool = False
    """Transcoders and CLTs: decoders begin as the mean of the targets weighted by the latents' first activations, not
    at random. It finds more features in long runs and costs loss in short ones."""
    tied: bool = False
    """One decoder per source layer instead of one per pair of layers."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Of Adam's second moments; ``bfloat16`` halves them, rounded stochastically."""
    offload: bool = False
    """Keep decoders and their moments in the host's memory, one at a time on the device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity != "quadratic" or self.activation == "relu":
            raise InputError(
                f"{self.kind} is trained here with the quadratic sparsity term of jumprelu, or topk or batchtopk,"
                f" not with {self.activation!r} and {self.sparsity!r}."
            )
        if self.sampled_prefixes or self.beta1 or self.end_to_end:
            raise InputError(f"sampled_prefixes, beta1 and end_to_end are not for a {self.kind}; leave them at 0.")
        if self.skip and self.kind not in ("clt", "skip_transcoder"):
            raise InputError(f"a {self.kind} has no skip connection; it belongs to a clt or skip_transcoder.")
        if self.tied and not self.layers:
            raise InputError(f"a {self.kind} has one decoder; 'tied' is for several layers.")

    @property
    def reconstructs(self) -> bool:
        """Whether what is written is what is read."""
        return self.kind in ("sae", "crosscoder")

    @property
    def has_skip(self) -> bool:
        """Whether there is a ``W_skip``."""
        return self.skip or self.kind == "skip_transcoder"


class MultiLayerLearner:
    """All that changes while one dictionary over several layers is trained."""

    def __init__(
        self,
        config: TrainConfig,
        calibration: Rows,
        *,
        start: Dictionary | None = None,
        mesh: Mesh = ALONE,
    ) -> None:
        """Initialise from raw rows of every site, on whose device everything then is, and from ``start``, a dictionary
        for raw activations, if it is given. Raises InputError when that one does not fit.
        """
        self.config = config if isinstance(config, MultiLayerConfig) else as_multilayer(config)
        self.mesh = mesh
        config = self.config
        if config.d_sae % mesh.latents:
            raise InputError(f"{config.d_sae} latents cannot be spread evenly over {mesh.latents} processes.")
        self.n = len(config.reads)
        self.width = config.d_sae // mesh.latents
        found = {site: moments(calibration[site], site) for site in config.sites}
        self.read = _read_moments(found, config)
        self.write = [found[site] for site in config.writes]
        self.spread = sum(m.spread for m in self.write)
        self.device = calibration[config.reads[0]].device
        x = self._inputs(calibration)
        self.weights: dict[str, Tensor] = self._from_scratch() if start is None else self._from(start)
        self.first_l0 = config.first_l0 if start is None else config.target_l0
        if start is None and config.from_data and not config.reconstructs:
            self._first_decoders([rows[:_FIRST_ROWS] for rows in x], self._targets(calibration, _FIRST_ROWS))
        self._begin(x, start is not None)
        self.adam = StreamedAdam(config.beta2, dtype=config.moments)
        self.idle_rows = torch.zeros(self.n * self.width, dtype=torch.int64, device=self.device)

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites that it reads or predicts."""
        return self.config.sites

    @property
    def layers(self) -> Layers:
        """The weights as the gradients need them."""
        return Layers(self.weights, self.n, self.width, self.config.tied, lambda t: t.to(self.device))

    def update(self, batch: Rows, done: int) -> StepResult:
        """One update of the optimiser on raw rows, after ``done`` updates."""
        batch = {site: self.mesh.rows(batch[site]) for site in self.sites}
        x = self._inputs(batch)
        y = self._targets(batch)
        rate = self._rate_factor(done)
        self.adam.begin()

        def apply(name: str, grad: Tensor) -> None:
            self._apply(name, grad, rate)

        found = self.backward(x, y, done, apply)
        self._rescale()
        return StepResult(found.loss, found.error / self.spread, found.l0, found.terms)

    @torch.no_grad()
    def backward(self, x: list[Tensor], y: list[Tensor], done: int, apply: Apply) -> Found:
        """The objective on scaled rows; each weight's gradient goes to ``apply`` as soon as it is complete."""
        terms = self._terms(done)
        codes = self._codes(torch.stack(x, dim=1), terms)
        return gradients(self.layers, x, y, codes, terms, apply, self.mesh)

    def _terms(self, done: int) -> Terms:
        config = self.config
        warm = linear_warmup(done, config.sparsity_warmup * config.steps)
        return Terms(
            sparsity=config.sparsity_weight * self.spread * warm,
            target_l0=geometric(done, self.first_l0, config.target_l0, config.annealing * config.steps),
            frequency=config.frequency_weight * self.spread * warm,
            frequency_scale=config.frequency_scale,
            dead=config.dead_weight * self.spread,
            bandwidth=self.bandwidth,
            ste_to_input=config.ste_to_input,
            prefixes=config.prefixes,
        )

    def _codes(self, x: Tensor, terms: Terms) -> Codes:
        """Which entries of the batch matter, and which of them are active."""
        config, mesh = self.config, self.mesh
        if config.activation == "jumprelu":
            threshold = torch.cat([self.weights[f"threshold.{layer}"] for layer in range(self.n)])
            support, pre = select(x, self._slices(threshold - terms.bandwidth / 2), self.n * self.width)
            at = threshold[support.latents]
            active, level = pre > at, threshold
        else:
            given = Candidates(x, lambda floor: list(self._slices(floor)), self.n, self.width, mesh)
            if config.activation == "topk":
                support, pre, smallest = row_codes(given, int(config.target_l0))
            else:
                support, pre, smallest = batch_codes(given, terms.target_l0, self.level)
            self.level = smallest if self.adam.steps <= 1 else 0.99 * self.level + 0.01 * smallest
            at, active = None, torch.ones_like(pre, dtype=torch.bool)
            level = pre.new_full((self.n * self.width,), self.level)
        return Codes(support, pre, active, at, self._count_idle(support, active, len(x)), level)

    def _count_idle(self, support: Support, active: Tensor, rows: int) -> Tensor:
        """Which latents are dead, this batch included."""
        seen = torch.bincount(support.latents[active], minlength=len(self.idle_rows))
        seen = self.mesh.sum_over_data(seen)
        self.idle_rows += rows * self.mesh.data
        self.idle_rows[seen > 0] = 0
        return self.idle_rows > self.config.dead_after_rows

    def _slices(self, floor: Tensor | None) -> Any:
        for layer in range(self.n):
            W_enc, b_enc = self.weights[f"W_enc.{layer}"], self.weights[f"b_enc.{layer}"]
            for first in range(0, self.width, _BLOCK):
                part = slice(first, min(first + _BLOCK, self.width))
                index = layer * self.width + first
                low = None if floor is None else floor[index : index + part.stop - first]
                yield Slice(layer, index, W_enc[part].T, b_enc[part], low)

    def _apply(self, name: str, grad: Tensor, rate: float) -> None:
        part = name.split(".")[0]
        if part in self.config.frozen:
            return
        grad = self.mesh.sum_over_data(grad)
        rate *= self.config.threshold_learning_rate * self.pre_scale if part == "threshold" else 1.0
        rate *= 1.0 if part == "threshold" else self.config.learning_rate
        self.adam.update(name, self.weights[name], grad, rate)
        if part == "threshold":
            self.weights[name].clamp_(min=0)

    def _rate_factor(self, done: int) -> float:
        config = self.config
        decay = 1.0 if config.decay is None else linear_decay(done, config.steps, config.decay * config.steps)
        return cosine_warmup(done, config.warmup * config.steps) * decay

    def _tables(self, layer: int) -> list[Tensor]:
        return [t for name, t in self.weights.items() if name == f"W_dec.{layer}" or name.startswith(f"W_dec.{layer}.")]

    def _norms(self, layer: int) -> Tensor:
        """Norm of what each latent of a layer writes, over all targets."""
        tables = self._tables(layer)
        times = self.n - layer if self.config.tied else 1
        return (torch.stack([t.square().sum(1) for t in tables]).sum(0) * times).sqrt().clamp_min(1e-12)

    @torch.no_grad()
    def _rescale(self) -> None:
        if "W_dec" in self.config.frozen:
            return
        for layer in range(self.n):
            norms = self._norms(layer)[:, None]
            for table in self._tables(layer):
                table /= norms

    def _inputs(self, rows: Rows) -> list[Tensor]:
        given = zip(self.config.reads, self.read, strict=True)
        return [(rows[site].float() - m.mean.to(rows[site].device)) / m.scale for site, m in given]

    def _targets(self, rows: Rows, first: int | None = None) -> list[Tensor]:
        given = zip(self.config.writes, self.write, strict=True)
        return [rows[site][:first].float() / m.scale for site, m in given]

    def _place(self, table: Tensor) -> Tensor:
        """Where a decoder is kept."""
        table = self.mesh.own(table)
        return table.cpu() if self.config.offload else table.to(self.device)

    def _from_scratch(self) -> dict[str, Tensor]:
        """Encoders of random unit rows, and decoders that are the same or, in another space, other such rows."""
        config = self.config
        d_in, d_out = len(self.read[0].mean), len(self.write[0].mean)
        weights: dict[str, Tensor] = {}
        for layer in range(self.n):
            rows = _unit_rows(config.d_sae, d_in, config.seed * 1000 + layer)
            weights[f"W_enc.{layer}"] = self.mesh.own(rows).to(self.device)
            weights[f"b_enc.{layer}"] = torch.zeros(self.width, device=self.device)
            for target in [layer] if config.tied else range(layer, self.n):
                seed = config.seed * 1000 + 100 * (layer + 1) + target + 1
                table = rows if config.reconstructs else _unit_rows(config.d_sae, d_out, seed)
                name = f"W_dec.{layer}" if config.tied else f"W_dec.{layer}.{target}"
                weights[name] = self._place(table / (self.n - layer) ** 0.5)
            weights[f"b_dec.{layer}"] = self.write[layer].mean.to(self.device) / self.write[layer].scale
            if config.has_skip:
                weights[f"W_skip.{layer}"] = torch.zeros(d_in, d_out, device=self.device)
        return weights

    @torch.no_grad()
    def _first_decoders(self, x: list[Tensor], y: list[Tensor]) -> None:
        """What each latent writes: the sum of y - E[y] times its activations, were it active on its share of the rows.

        A latent whose sum is 0 keeps its random row.
        """
        count = max(1, round(len(x[0]) * self.first_l0 / (self.n * self.config.d_sae)))
        y = [rows - rows.mean(0) for rows in y]
        for layer in range(self.n):
            encoder = self.weights[f"W_enc.{layer}"]
            for first in range(0, self.width, 1024):
                part = slice(first, first + 1024)
                pre = x[layer] @ encoder[part].T
                acts = torch.where(pre >= pre.topk(count, dim=0)[0][-1], pre, 0).clamp_(min=0)
                found = {target: acts.T @ y[target] for target in range(layer, self.n)}
                if self.config.tied:
                    found = {layer: torch.stack(list(found.values())).sum(0)}
                some = torch.stack([rows.norm(dim=1) for rows in found.values()]).amin(0)[:, None] > 0
                for table, rows in zip(self._tables(layer), found.values(), strict=True):
                    table[part] = torch.where(some, rows, table[part].to(rows)).to(table.device)
        self._rescale()

    def _from(self, start: Dictionary) -> dict[str, Tensor]:
        """The weights of a dictionary for raw activations, scaled and centred, decoder rows of norm 1."""
        scales = [m.scale for m in self.read], [m.scale for m in self.write]
        whole = parts_of_dictionary(start, self.config, *scales)
        weights: dict[str, Tensor] = {}
        for name, tensor in whole.items():
            tensor = tensor.to(self.device, torch.float32)
            if name.startswith(("W_enc", "b_enc", "threshold")):
                tensor = self.mesh.own(tensor)
            weights[name] = self._place(tensor) if name.startswith("W_dec") else tensor.clone()
        for layer, m in enumerate(self.read):
            weights[f"b_enc.{layer}"] += weights[f"W_enc.{layer}"] @ (m.mean.to(self.device) / m.scale)
            if (skip := weights.get(f"W_skip.{layer}")) is not None:
                weights[f"b_dec.{layer}"] += (m.mean.to(self.device) / m.scale) @ skip
        return weights

    @torch.no_grad()
    def _begin(self, x: list[Tensor], has_start: bool) -> None:
        """Thresholds by quantile where there are none yet, the pre-activations' scale, unit decoder rows."""
        config = self.config
        if has_start and "W_dec" not in config.frozen:
            for layer in range(self.n):
                norms = self._norms(layer).to(self.device)
                for table in self._tables(layer):
                    table /= norms[:, None].to(table.device)
                for name in ("W_enc", "b_enc", "threshold"):
                    if (tensor := self.weights.get(f"{name}.{layer}")) is not None:
                        tensor *= norms.view(-1, *[1] * (tensor.ndim - 1))
        share = self.first_l0 / (self.n * config.d_sae)
        variances: list[Tensor] = []
        for layer in range(self.n):
            count = max(1, round(len(x[layer]) * share))
            thresholds: list[Tensor] = []
            for W, b in zip(
                self.weights[f"W_enc.{layer}"].split(1024), self.weights[f"b_enc.{layer}"].split(1024), strict=True
            ):
                pre = torch.addmm(b, x[layer], W.T)
                thresholds.append(pre.topk(count, dim=0)[0][-1])
                variances.append(pre.var(0))
            if config.activation == "jumprelu" and f"threshold.{layer}" not in self.weights:
                self.weights[f"threshold.{layer}"] = torch.cat(thresholds).clamp(min=0)
            self.level = float(torch.cat(thresholds).mean())
        variance = self.mesh.sum_over_latents(torch.cat(variances).mean()) / self.mesh.latents
        self.pre_scale = float(variance.sqrt())
        self.bandwidth = config.bandwidth * self.pre_scale
        if has_start and config.activation == "jumprelu":
            threshold = torch.cat([self.weights[f"threshold.{layer}"] for layer in range(self.n)])
            support, _ = select(torch.stack(x, dim=1), self._slices(threshold), self.n * self.width)
            l0 = self.mesh.sum_over_latents(torch.tensor(float(len(support.rows)), device=self.device)) / len(x[0])
            self.first_l0 = max(config.target_l0, float(l0))

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, whole, whatever the number of processes."""
        weights = {name: self._whole(name, t) for name, t in self.weights.items()}
        squares = {name: self._whole(name, t) for name, t in self.adam.squares.items()}
        idle = torch.stack([self.mesh.whole(t) for t in self.idle_rows.view(self.n, -1)])
        return {
            "weights": weights,
            "adam": {"steps": self.adam.steps, "squares": squares},
            "idle_rows": idle,
            "level": self.level,
            "first_l0": self.first_l0,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, at any number of processes."""
        for name, tensor in state["weights"].items():
            self.weights[name].copy_(self._mine(name, tensor))
        squares = {
            name: self._mine(name, t).to(self.weights[name].device).clone()
            for name, t in state["adam"]["squares"].items()
        }
        self.adam.load_state_dict({"steps": state["adam"]["steps"], "squares": squares})
        mine = [self.mesh.own(t.to(self.device)) for t in state["idle_rows"]]
        self.idle_rows.copy_(torch.cat(mine))
        self.level, self.first_l0 = float(state["level"]), float(state["first_l0"])

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        return self.mesh.whole(tensor) if _counts_latents(name) else tensor

    def _mine(self, name: str, tensor: Tensor) -> Tensor:
        return self.mesh.own(tensor) if _counts_latents(name) else tensor

    def finished(self, calibration: Rows) -> tuple[Dictionary, dict[str, float]]:
        """A correct dictionary for raw activations, thresholds set to the target L0 on ``calibration``, and its
        numbers.
        """
        whole = {name: self._whole(name, t) for name, t in self.weights.items()}
        raw = build(self.config, whole, self.read, self.write, self.level)
        x = torch.stack([calibration[site].float() for site in self.config.reads], dim=1)
        dictionary, before, factor = calibrated(raw, x, self.config.target_l0)
        after = sum(len(dictionary._select(part)[1]) for part in x.split(2048)) / len(x)  # pyright: ignore[reportPrivateUsage]
        dead = torch.cat([self.mesh.whole(t) for t in self.idle_rows.view(self.n, -1)]) > self.config.dead_after_rows
        return dictionary, {
            "l0_train": before,
            "l0": after,
            "threshold_factor": factor,
            "dead_fraction": dead.float().mean().item(),
            "scale_in": self.read[0].scale,
            "scale_out": self.write[0].scale,
            "bandwidth": self.bandwidth,
        }

    def warnings(self) -> tuple[str, ...]:
        """What the user should know about how it is going; empty when all is well."""
        dead = float((self.idle_rows > self.config.dead_after_rows).float().mean())
        if dead > 0.2:
            return (f"{dead:.0%} of the latents are dead; train longer, use fewer, or raise dead_weight.",)
        return ()


def as_multilayer(config: TrainConfig, **more: Any) -> MultiLayerConfig:
    """The same config with the options of this module; raises InputError for what it does not know."""
    given = {name: getattr(config, name) for name in TrainConfig.__dataclass_fields__}
    return MultiLayerConfig(**{**given, **more})


def _counts_latents(name: str) -> bool:
    return name.startswith(("W_enc", "b_enc", "threshold", "W_dec"))


def _read_moments(found: Mapping[Site, Moments], config: TrainConfig) -> list[Moments]:
    """Of the sites that are read; with one common scale for a TopK over several layers."""
    read = [found[site] for site in config.reads]
    if config.activation != "topk":
        return read
    scale = (sum(m.scale**2 for m in read) / len(read)) ** 0.5
    return [Moments(m.mean, scale, m.spread * m.scale**2 / scale**2) for m in read]


def _unit_rows(rows: int, width: int, seed: int) -> Tensor:
    """He-uniform rows scaled to norm 1: the same on every device."""
    found = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return found / found.norm(dim=1, keepdim=True)
