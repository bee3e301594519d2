"""Crosscoders and CLTs being trained, alone or sharded over processes; with one layer, every other kind.

Notable:
- every site has its own scale: training sees x_l / C_l and y_m / D_m, both of mean square 1, and x_l less its mean;
  ``finished`` folds all of it (a TopK compares latents of different layers, so there all x share one scale);
- decoders are streamed (``layer_gradients``) and updated as soon as their gradient is complete (``adam``): beside
  weights and one moment there is one decoder's gradient in memory, on the device also when the rest is offloaded;
- what a latent writes, over all targets together, keeps norm 1: after each update its decoder rows are rescaled;
  where its encoder is frozen, they keep the norm that they have;
- the target L0 counts the latents of all layers and falls from the initial sum to ``target_l0``; ``control`` moves
  the thresholds of all layers and processes by one factor;
- ``tied``: one decoder per source layer, whatever the target.

Weights are named ``W_enc.l`` [d_sae, d_in] (rows, transposed against the dictionaries), ``b_enc.l``, ``threshold.l``,
``W_dec.l.m`` [d_sae, d_out] or tied ``W_dec.l``, ``b_dec.m``, ``W_skip.m`` [d_in, d_out].
"""

from collections.abc import Mapping
from typing import Any

import torch

from gemscope.core.arrays import Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.sparse import Support, select
from gemscope.training import layer_start
from gemscope.training.adam import StreamedAdam
from gemscope.training.calibration import first_thresholds, mean_l0
from gemscope.training.config import TrainConfig
from gemscope.training.control import L0Control
from gemscope.training.data import moments
from gemscope.training.layer_codes import batch_codes, row_codes, slices, with_dead
from gemscope.training.layer_config import MultiLayerConfig as MultiLayerConfig
from gemscope.training.layer_config import as_multilayer as as_multilayer
from gemscope.training.layer_export import build, calibrated
from gemscope.training.layer_gradients import Apply, Codes, Found, Layers, Terms, gradients
from gemscope.training.learner import Rows, StepResult
from gemscope.training.schedules import geometric, linear_warmup, rate_factor
from gemscope.training.sharding import ALONE, Mesh

_FIRST_ROWS = 4096
"""Rows that decoders begin from."""


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
        self.read = layer_start.read_moments(found, config)
        self.write = [found[site] for site in config.writes]
        self.spread = sum(m.spread for m in self.write)
        self.device = calibration[config.reads[0]].device
        x = self._inputs(calibration)
        place = layer_start.Place(config, mesh, self.device)
        self.first_l0 = config.first_l0 if start is None else config.target_l0
        if start is None:
            self.weights: dict[str, Tensor] = layer_start.fresh(place, self.read, self.write)
        else:
            self.weights = layer_start.taken(place, start, self.read, self.write)
        if start is None and config.from_data and not config.reconstructs:
            y, share = self._targets(calibration, _FIRST_ROWS), self.first_l0 / (self.n * config.d_sae)
            layer_start.lead(self.layers, [rows[:_FIRST_ROWS] for rows in x], y, share)
        self._begin(x, start is not None)
        self.adam = StreamedAdam(config.beta2, dtype=config.moments)
        self.control = L0Control(config)
        self.idle_rows = torch.zeros(self.n * self.width, dtype=torch.int64, device=self.device)
        self.frequency = torch.zeros(self.n * self.width, device=self.device)

    @torch.no_grad()
    def _begin(self, x: list[Tensor], has_start: bool) -> None:
        """Thresholds by quantile where there are none yet, the pre-activations' scale, decoder rows and their norms."""
        config, weights = self.config, self.weights
        is_held = not {"W_enc", "b_enc", "threshold"}.isdisjoint(config.frozen)
        if has_start and not is_held and "W_dec" not in config.frozen:
            layer_start.normalise(self.layers)
        self.norms = self.layers.norms() if is_held else None
        wanted = self.first_l0 / (self.n * self.mesh.latents)
        found = [
            first_thresholds(rows, weights[f"W_enc.{layer}"].T, weights[f"b_enc.{layer}"], wanted)
            for layer, rows in enumerate(x)
        ]
        thresholds = [threshold for threshold, _ in found]
        self.level = self.mesh.mean_over_latents(float(torch.cat(thresholds).mean()))
        self.pre_scale = self.mesh.mean_over_latents(sum(scale**2 for _, scale in found) / self.n) ** 0.5
        self.bandwidth = config.bandwidth * self.pre_scale
        if config.activation == "jumprelu":
            for layer, threshold in enumerate(thresholds):
                weights.setdefault(f"threshold.{layer}", threshold)
        if has_start and config.activation == "jumprelu":
            support, _ = select(torch.stack(x, dim=1), slices(self.layers, self._thresholds()), self.n * self.width)
            l0 = self.mesh.mean_over_latents(len(support.rows) / len(x[0])) * self.mesh.latents
            self.first_l0 = max(config.target_l0, l0)

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
        rate = rate_factor(self.config, done)
        self.adam.begin()

        def apply(name: str, grad: Tensor) -> None:
            self._apply(name, grad, rate)

        found = self.backward(x, y, done, apply)
        self._rescale()
        self._control(float(found.l0), done)
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
            target_l0=self._target(done),
            frequency=config.frequency_weight * self.spread * warm,
            frequency_scale=config.frequency_scale,
            dead=config.dead_weight * self.spread,
            aux=config.aux_weight,
            bandwidth=self.bandwidth,
            soft=config.tanh_scale / self.pre_scale,
            ste_to_input=config.ste_to_input,
            prefixes=config.prefixes,
        )

    def _target(self, done: int) -> float:
        return geometric(done, self.first_l0, self.config.target_l0, self.config.annealing * self.config.steps)

    def _codes(self, x: Tensor, terms: Terms) -> Codes:
        """Which entries of the batch matter, and which of them are active."""
        config, mesh, layers = self.config, self.mesh, self.layers
        if config.activation == "jumprelu":
            threshold = self._thresholds()
            support, pre = select(x, slices(layers, threshold - terms.bandwidth / 2), len(threshold))
            active = pre > threshold[support.latents]
            return Codes(support, pre, active, self._count_idle(support, active, len(x)), threshold)
        if config.activation == "topk":
            support, pre = row_codes(layers, x, int(config.target_l0), mesh)
        else:
            support, pre, smallest = batch_codes(layers, x, terms.target_l0, mesh, self.level)
            self.level = smallest if self.adam.steps <= 1 else 0.99 * self.level + 0.01 * smallest
        active = torch.ones_like(pre, dtype=torch.bool)
        dead = self._count_idle(support, active, len(x))
        k = min(config.aux_k or max(1, len(self.write[0].mean) // 2), self._count(dead) if terms.aux else 0)
        if k:
            support, pre, active = with_dead(layers, x, (support, pre), dead, k, mesh)
        return Codes(support, pre, active, dead, None, has_aux=k > 0)

    def _count_idle(self, support: Support, active: Tensor, rows: int) -> Tensor:
        """Which latents are dead, this batch included."""
        seen = torch.bincount(support.latents[active], minlength=len(self.idle_rows))
        seen, rows = self.mesh.sum_over_data(seen), rows * self.mesh.data
        self.frequency = seen / rows
        self.idle_rows += rows
        self.idle_rows[seen > 0] = 0
        return self.idle_rows > self.config.dead_after_rows

    def _count(self, which: Tensor) -> int:
        """How many latents of all processes."""
        return int(self.mesh.sum_over_latents(which.sum()))

    def _thresholds(self) -> Tensor:
        return torch.cat([self.weights[f"threshold.{layer}"] for layer in range(self.n)])

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

    @torch.no_grad()
    def _rescale(self) -> None:
        if "W_dec" in self.config.frozen:
            return
        norms = self.layers.norms()
        self.layers.divide(norms if self.norms is None else [a / b for a, b in zip(norms, self.norms, strict=True)])

    def _control(self, l0: float, done: int) -> None:
        """Move all thresholds towards the target, on every process by the same factor."""
        if not self.config.penalised:
            return
        factor = self.control.observe(l0, self._target(done), done)
        if "threshold" in self.config.frozen:
            return
        for layer, frequency in enumerate(self.frequency.view(self.n, -1)):
            self.control.move(self.weights[f"threshold.{layer}"], factor, frequency, self.pre_scale)

    def _inputs(self, rows: Rows) -> list[Tensor]:
        given = zip(self.config.reads, self.read, strict=True)
        return [(rows[site].float() - m.mean.to(rows[site].device)) / m.scale for site, m in given]

    def _targets(self, rows: Rows, first: int | None = None) -> list[Tensor]:
        given = zip(self.config.writes, self.write, strict=True)
        return [rows[site][:first].float() / m.scale for site, m in given]

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, whole, whatever the number of processes; weights and moments on the first alone."""
        return {
            "weights": self._collected(self.weights),
            "adam": {"steps": self.adam.steps, "squares": self._collected(self.adam.squares)},
            "idle_rows": torch.stack([self.mesh.whole(t) for t in self.idle_rows.view(self.n, -1)]),
            "control": self.control.state_dict(),
            "level": self.level,
            "first_l0": self.first_l0,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, at any number of processes. Raises InputError for the state of another learner."""
        if "adam" not in state:
            raise InputError(
                f"this checkpoint of a {self.config.kind} was written by a single process, whose trainer is another; go"
                " on in one, or give another folder."
            )
        for name, tensor in state["weights"].items():
            self.weights[name].copy_(self._mine(name, tensor))
        squares = {
            name: self._mine(name, t).to(self.weights[name].device).clone()
            for name, t in state["adam"]["squares"].items()
        }
        self.adam.load_state_dict({"steps": state["adam"]["steps"], "squares": squares})
        mine = [self.mesh.own(t.to(self.device)) for t in state["idle_rows"]]
        self.idle_rows.copy_(torch.cat(mine))
        self.control.load_state_dict(state["control"])
        self.level, self.first_l0 = float(state["level"]), float(state["first_l0"])

    def _collected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors, made one at a time and kept by the first process, in the host's memory."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            whole = self._whole(name, tensor)
            if self.mesh.is_first:
                found[name] = whole if self.mesh.latents == 1 else whole.cpu()
        return found

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        if self.mesh.latents == 1 or not layer_start.counts_latents(name):
            return tensor
        return self.mesh.whole(tensor.to(self.device)).to(tensor.device)  # what is offloaded meets on the device

    def _mine(self, name: str, tensor: Tensor) -> Tensor:
        return self.mesh.own(tensor) if layer_start.counts_latents(name) else tensor

    def finished(self, calibration: Rows) -> tuple[Dictionary, dict[str, float]]:
        """A correct dictionary for raw activations, and its numbers. Thresholds that are not frozen are set to the
        target L0 on ``calibration``, and with a frequency penalty so that no latent is active there on more than
        ``frequency_scale``.
        """
        config = self.config
        whole = {name: self._whole(name, t) for name, t in self.weights.items()}
        dictionary = build(config, whole, self.read, self.write, self.level)
        x = torch.stack([calibration[site].float() for site in config.reads], dim=1)
        if "threshold" in config.frozen:
            before, factor = mean_l0(dictionary, x), 1.0
        else:
            limit = config.frequency_scale if config.frequency_weight > 0 else None
            dictionary, before, factor = calibrated(
                dictionary, x, config.target_l0, limit if config.penalised else None
            )
        dead = torch.cat([self.mesh.whole(t) for t in self.idle_rows.view(self.n, -1)]) > config.dead_after_rows
        return dictionary, {
            "l0_train": before,
            "l0": mean_l0(dictionary, x),
            "threshold_factor": factor,
            "dead_fraction": dead.float().mean().item(),
            "scale_in": self.read[0].scale,
            "scale_out": self.write[0].scale,
            "bandwidth": self.bandwidth,
        }

    def warnings(self) -> tuple[str, ...]:
        """What the user should know about how it is going; empty when all is well."""
        said = self.control.warnings()
        dead = float((self.idle_rows > self.config.dead_after_rows).float().mean())
        if dead > 0.2:
            weight = "dead_weight" if self.config.penalised else "aux_weight"
            said += (f"{dead:.0%} of the latents are dead; train longer, use fewer, or raise {weight}.",)
        return said
