"""The learner of SAEs, transcoders and skip transcoders, with every activation and objective.

Notable:
- trains on x / C with E||x / C||^2 = 1, and on targets scaled likewise; ``finished`` folds both scales;
- rows are centred before the encoder: an SAE's by its b_dec (Gemma Scope, appendix A), a transcoder's by the mean
  of the calibration rows, a constant; ``finished`` folds that too;
- b_dec starts at the mean, so no latent has to spend itself on it; a transcoder's decoder rows start as the mean of
  the targets weighted by the latents' first activations, the direction of the first gradient;
- thresholds are plain fp32 parameters, clamped at 0: under Adam a logarithm of them would hardly move;
- the biases learn in units of what they are added to, as thresholds do: without momentum every entry moves by about
  its learning rate in every step, however small its gradient, and a step of the size of the rows' shakes all codes;
- after one encoder product (``dictionaries.screening``) everything works on the active entries, the optimiser
  included (``training.optimizer``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Adam

from gemscope.core.arrays import Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.activations import jump_relu, step
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.screening import above, bf16_is_fast, top_of_batch, top_of_rows
from gemscope.dictionaries.single import SingleLayer
from gemscope.dictionaries.sparse import Support, dots
from gemscope.training import start
from gemscope.training.calibration import common_threshold, first_thresholds, mean_l0, set_thresholds
from gemscope.training.config import TrainConfig
from gemscope.training.control import L0Control
from gemscope.training.data import moments
from gemscope.training.learner import Rows, StepResult
from gemscope.training.objectives import (
    Splice,
    aux_error,
    dead_penalty,
    end_to_end,
    frequency_penalty,
    linear_l0,
    matryoshka_error,
    quadratic_l0,
    sampled_prefixes,
    soft_count,
    squared_error,
)
from gemscope.training.optimizer import TableAdam
from gemscope.training.outer import OuterGradient, decode, encode
from gemscope.training.schedules import geometric, linear_warmup, rate_factor

_SCREEN_FROM = 1 << 21
"""Weights of an encoder from which a bf16 screen saves more than it costs."""


@dataclass
class _Codes:
    """The entries of one batch: those active, and for JumpReLU those inside the estimator's window."""

    support: Support
    pre_acts: Tensor
    acts: Tensor
    active: Tensor
    """1 per active entry, with the estimate's gradient; for the other activations a soft count."""
    on: Tensor
    """Which entries are active."""
    tables: dict[str, OuterGradient]


class SingleLayerLearner:
    """The learner of SAEs and transcoders."""

    def __init__(
        self,
        config: TrainConfig,
        calibration: Rows,
        *,
        initial: SingleLayer | None = None,
        splice: Splice | None = None,
    ) -> None:
        """Initialise from raw rows of every site, on whose device everything then is.

        ``initial`` is a dictionary for raw activations to go on from, of the same kind, sizes and activation;
        raises InputError when it is not. ``splice`` is needed where ``config.end_to_end`` is above 0.
        """
        self.config = config
        x, y = _wide(calibration[config.reads[0]]), _wide(calibration[config.writes[0]])
        self.moments_in, self.moments_out = moments(x, config.reads[0]), moments(y, config.writes[0])
        self.centre = self.moments_in.mean.to(x) / self.moments_in.scale
        self.initial = initial if config.frozen else None
        self.own_centre = config.kind == "sae"
        self.splice = start.checked_splice(config, splice)
        scaled = x / self.moments_in.scale
        if initial is None:
            self.weights = start.fresh(config, scaled, y / self.moments_out.scale, self.centre)
        else:
            if start.keeps_origin(config):
                self.own_centre, self.centre = False, torch.zeros_like(self.centre)
            scales = self.moments_in.scale, self.moments_out.scale
            self.norms = start.row_norms(config, initial, scales[0] / scales[1])
            self.weights = start.taken(config, initial, *scales, self.centre, self.norms)
        w = self.weights
        wanted = config.first_l0 if initial is None else config.target_l0
        threshold, self.pre_scale = first_thresholds(scaled - self._centre().detach(), w["E"].T, w["b_enc"], wanted)
        if config.activation == "jumprelu" and "threshold" not in w:
            w["threshold"] = threshold
        self.bandwidth = config.bandwidth * self.pre_scale
        self._make_optimizers()
        self.idle_rows = torch.zeros(config.d_sae, dtype=torch.int64, device=x.device)
        self.frequency = torch.zeros(config.d_sae, device=x.device)
        self.control = L0Control(config)
        self.last_smallest: float | None = None
        fast = bf16_is_fast(x.device) and w["E"].numel() >= _SCREEN_FROM
        self.screen = fast if config.product_dtype == "auto" else config.product_dtype == "bfloat16"

    def _make_optimizers(self) -> None:
        config, betas = self.config, (self.config.beta1, self.config.beta2)
        self.tables = {
            name: TableAdam(self.weights[name], betas, unit_rows=name == "W_dec")
            for name in ("E", "W_dec")
            if start.PUBLIC.get(name, name) not in config.frozen
        }
        self.small = {n: t for n, t in self.weights.items() if n not in ("E", "W_dec")}
        groups = [{"params": [t.requires_grad_()], "lr": 0.0} for t in self.small.values()]
        self.optimizer = Adam(groups, betas=betas, fused=True)

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites that it reads or predicts."""
        return self.config.sites

    def update(self, batch: Rows, done: int) -> StepResult:
        """One update on raw rows, after ``done`` updates."""
        config = self.config
        x = _wide(batch[config.reads[0]]) / self.moments_in.scale
        y = x if config.kind == "sae" else _wide(batch[config.writes[0]]) / self.moments_out.scale
        gradients = {name: OuterGradient(tuple(self.weights[name].shape)) for name in ("E", "W_dec")}
        result = self._backward(x, y, done, gradients)
        rate = rate_factor(config, done)
        for name, table in self.tables.items():
            table.step(gradients[name], config.learning_rate * rate)
        rates = {
            "b_enc": config.learning_rate * self.pre_scale,
            "b_dec": config.learning_rate * (self.moments_out.spread / y.shape[1]) ** 0.5,
            "W_skip": config.learning_rate,
            "threshold": config.threshold_learning_rate * self.pre_scale,
        }
        for group, name in zip(self.optimizer.param_groups, self.small, strict=True):
            group["lr"] = rates[name] * rate
        for name, tensor in self.small.items():
            if name in config.frozen:
                tensor.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._control(float(result.l0), done)
        return result

    def _control(self, l0: float, done: int) -> None:
        """Move all thresholds towards the target."""
        config = self.config
        if not config.penalised:
            return
        factor = self.control.observe(l0, self._target(done), done)
        threshold = self.weights.get("threshold")
        if threshold is not None and "threshold" not in config.frozen:
            self.control.move(threshold, factor, self.frequency, self.pre_scale)

    def _centre(self) -> Tensor:
        return self.weights["b_dec"] if self.own_centre else self.centre

    def _backward(self, x: Tensor, y: Tensor, done: int, gradients: dict[str, OuterGradient]) -> StepResult:
        """Gradients of the objective on scaled rows."""
        config, spread = self.config, self.moments_out.spread
        centred = x - self._centre().detach()
        codes = self._encode(centred, done, gradients)
        recons = self._decode(codes, centred, done)
        error = squared_error(y, recons[-1])
        terms = {"error": error if len(recons) == 1 else matryoshka_error(y, recons)}
        if self.splice is not None and config.end_to_end > 0:
            divergence = self.splice(recons[-1] * self.moments_out.scale)
            terms["error"] = end_to_end(terms["error"], divergence, config.end_to_end)
        dead = self._count_idle(codes.support.latents[codes.on], len(x))
        terms |= self._sparsity(codes, done)
        terms |= self._revival(codes, centred, y, recons[-1].detach(), dead)
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        l0 = codes.on.sum() / len(x)
        parts = {name: term.detach() for name, term in terms.items()}
        return StepResult(loss.detach(), error.detach() / spread, l0, parts)

    def _encode(self, centred: Tensor, done: int, gradients: dict[str, OuterGradient]) -> _Codes:
        config, w = self.config, self.weights
        support, values = self._find(centred, done)
        pre_acts = encode(support, values, centred, w["E"], w["b_enc"], self._centre(), gradients["E"])
        if config.activation != "jumprelu":
            active = soft_count(pre_acts, config.tanh_scale / self.pre_scale)
            return _Codes(support, pre_acts, pre_acts, active, torch.ones_like(values, dtype=torch.bool), gradients)
        at = w["threshold"].index_select(0, support.latents)
        acts = jump_relu(pre_acts, at, self.bandwidth, config.ste_to_input)
        active = step(pre_acts, at, self.bandwidth, config.ste_to_input)
        return _Codes(support, pre_acts, acts, active, active.detach() > 0, gradients)

    @torch.no_grad()
    def _find(self, centred: Tensor, done: int) -> tuple[Support, Tensor]:
        """The one dense product, and which of its entries matter."""
        config, E, bias = self.config, self.weights["E"], self.weights["b_enc"]
        if config.activation == "topk":
            return top_of_rows(centred, E, bias, int(config.target_l0), screen=self.screen)
        if config.activation == "batchtopk":
            guess = None if self.last_smallest is None else 0.95 * self.last_smallest
            count = round(self._target(done) * len(centred))
            support, values, self.last_smallest = top_of_batch(centred, E, bias, count, guess=guess, screen=self.screen)
            return support, values
        floor = torch.zeros_like(bias)
        if config.activation == "jumprelu":
            floor = self.weights["threshold"] - self.bandwidth / 2
        return above(centred, E, bias, floor, screen=self.screen)

    def _decode(self, codes: _Codes, centred: Tensor, done: int) -> list[Tensor]:
        """Reconstructions of all nested dictionaries, the whole one last."""
        config, w = self.config, self.weights
        base = w["b_dec"] + centred @ w["W_skip"] if "W_skip" in w else w["b_dec"]
        prefixes = config.prefixes
        if config.sampled_prefixes:
            prefixes = sampled_prefixes(config.d_sae, config.sampled_prefixes, config.seed, done)
        gradient = codes.tables["W_dec"]
        if not prefixes:
            return [decode(codes.support, codes.acts, w["W_dec"], gradient) + base]
        found: list[Tensor] = []
        for first, last in zip([0, *prefixes], [*prefixes, config.d_sae], strict=True):
            part, inside = codes.support.between(first, last)
            found.append(decode(part, codes.acts[inside], w["W_dec"], gradient) + (found[-1] if found else base))
        return found

    def _target(self, done: int) -> float:
        config = self.config
        return geometric(done, config.first_l0, config.target_l0, config.annealing * config.steps)

    def _sparsity(self, codes: _Codes, done: int) -> dict[str, Tensor]:
        """The penalties on how often latents fire."""
        config, spread = self.config, self.moments_out.spread
        found: dict[str, Tensor] = {}
        weight = spread * linear_warmup(done, config.sparsity_warmup * config.steps)
        if config.penalised and config.sparsity_weight > 0:
            if config.sparsity == "quadratic":
                penalty = quadratic_l0(codes.support.per_row(codes.active), self._target(done))
            elif config.sparsity == "linear":
                penalty = linear_l0(codes.support.per_row(codes.active))
            else:  # the rows of W_dec have norm 1, so activations are sizes
                scale = config.tanh_scale / self.pre_scale
                sizes = soft_count(codes.acts, scale) if config.sparsity == "tanh" else codes.acts / self.pre_scale
                penalty = sizes.sum() / codes.support.batch
            found["sparsity"] = self.control.weight * weight * penalty
        if config.frequency_weight > 0:
            penalty = frequency_penalty(codes.support, codes.active, config.frequency_scale)
            found["frequency"] = config.frequency_weight * weight * penalty
        return found

    def _revival(self, codes: _Codes, centred: Tensor, y: Tensor, recon: Tensor, dead: Tensor) -> dict[str, Tensor]:
        """What draws dead latents back."""
        config, w = self.config, self.weights
        which = dead.nonzero()[:, 0]
        if not len(which):
            return {}
        if config.penalised:
            if config.dead_weight == 0:
                return {}
            mean = centred.mean(0, keepdim=True)
            row = Support(torch.zeros_like(which), which, 1, config.d_sae)
            values = dots(row, mean, w["E"]) + w["b_enc"].detach().index_select(0, which)
            constant = self._centre().detach()  # b_dec has to serve the reconstruction alone
            pre_acts = encode(row, values, mean, w["E"], w["b_enc"], constant, codes.tables["E"])
            threshold = w.get("threshold", torch.zeros_like(w["b_enc"]))
            penalty = dead_penalty(codes.support, codes.pre_acts, pre_acts, threshold, dead)
            return {"dead": config.dead_weight * self.moments_out.spread * penalty}
        if config.aux_weight == 0:
            return {}
        k = min(config.aux_k or max(1, y.shape[1] // 2), len(which))
        with torch.no_grad():
            E, bias = w["E"].index_select(0, which), w["b_enc"].detach().index_select(0, which)
            few, values = top_of_rows(centred, E, bias, k, screen=self.screen)
        support = Support(few.rows, which.index_select(0, few.latents), few.batch, config.d_sae)
        constant = self._centre().detach()
        acts = encode(support, values, centred, w["E"], w["b_enc"], constant, codes.tables["E"])
        found = decode(support, acts, w["W_dec"], codes.tables["W_dec"])
        return {"aux": config.aux_weight * aux_error(y - recon, found)}

    def _count_idle(self, active: Tensor, rows: int) -> Tensor:
        """Which latents are dead, this batch included."""
        counts = torch.bincount(active, minlength=self.config.d_sae)
        self.frequency = counts / rows
        self.idle_rows += rows
        self.idle_rows[counts > 0] = 0
        return self.idle_rows > self.config.dead_after_rows

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes."""
        return {
            "weights": {name: tensor.detach() for name, tensor in self.weights.items()},
            "tables": {name: table.state_dict() for name, table in self.tables.items()},
            "optimizer": self.optimizer.state_dict(),
            "idle_rows": self.idle_rows,
            "control": self.control.state_dict(),
            "scales": {"pre": self.pre_scale, "last_smallest": self.last_smallest},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the learner must have been built from the same config and calibration rows. Raises
        InputError for the state of another learner.
        """
        if "tables" not in state:
            raise InputError(
                f"this checkpoint of a {self.config.kind} was written by several processes, whose trainer is another;"
                " go on in several, or give another folder."
            )
        for name, tensor in self.weights.items():
            tensor.copy_(state["weights"][name])
        for name, table in self.tables.items():
            table.load_state_dict(state["tables"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.idle_rows.copy_(state["idle_rows"])
        self.control.load_state_dict(state["control"])
        self.pre_scale, self.last_smallest = state["scales"]["pre"], state["scales"]["last_smallest"]
        self.bandwidth = self.config.bandwidth * self.pre_scale

    def warnings(self) -> tuple[str, ...]:
        """What the user should know about how it is going."""
        return self.control.warnings()

    @torch.no_grad()
    def finished(self, calibration: Rows) -> tuple[Dictionary, dict[str, float]]:
        """The dictionary for raw activations, thresholds set to the target L0 on ``calibration``, and with a frequency
        penalty so that no latent is active there on more than ``frequency_scale``; and its numbers. What is frozen of a
        dictionary to go on from is as it was there.
        """
        config = self.config
        x = _wide(calibration[config.reads[0]])
        weights = {name: tensor.detach() for name, tensor in self.weights.items()}
        threshold, factor = weights.get("threshold"), 1.0
        if config.activation == "batchtopk":
            scaled = x / self.moments_in.scale - self._centre().detach()
            level = common_threshold(scaled, weights["E"], weights["b_enc"], config.target_l0)
            threshold = torch.full_like(weights["b_enc"], level)
        scales = (self.moments_in.scale, self.moments_out.scale)
        dictionary = start.folded(config, weights, threshold, *scales, None if self.own_centre else self.centre)
        if self.initial is not None:
            dictionary = start.kept(dictionary, self.initial, config.frozen, self.norms)
        l0_train = self.control.mean if config.penalised else config.target_l0
        if config.activation == "jumprelu":
            l0_train = mean_l0(dictionary, x)
            limit = config.frequency_scale if config.frequency_weight > 0 else None
            if "threshold" not in config.frozen:
                factor = set_thresholds(dictionary, x, config.target_l0, limit)
        dead = (self.idle_rows > config.dead_after_rows).float().mean().item()
        numbers = {"l0_train": float(l0_train), "l0": mean_l0(dictionary, x), "threshold_factor": factor}
        numbers |= {"dead_fraction": dead, "scale_in": scales[0], "scale_out": scales[1]}
        return dictionary, numbers | {"bandwidth": self.bandwidth}


def _wide(x: Tensor) -> Tensor:
    """Rows in fp32, or in fp64 where they are."""
    return x if x.dtype == torch.float64 else x.float()
