"""One dictionary being trained: its weights, its optimiser, and one update.

Notable:
- trains on x / C with E||x / C||^2 = 1 and with the pre-encoder bias of Gemma Scope (appendix A);
  ``finished`` folds both;
- b_dec starts at the mean, so the pre-activations start centred and no latent has to spend itself on the
  mean;
- thresholds are plain fp32 parameters, clamped at 0: under Adam a logarithm of them would hardly move;
- the update touches only the entries near or above their thresholds (``dictionaries.sparse``).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Adam

from gemscope.core.arrays import Float, Tensor
from gemscope.core.sites import Site
from gemscope.dictionaries.activations import jump_relu, step
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.sparse import decode_prefixes, encode_above
from gemscope.training.calibration import first_thresholds, threshold_factor
from gemscope.training.config import TrainConfig
from gemscope.training.data import moments as measure
from gemscope.training.learner import Rows, StepResult
from gemscope.training.objectives import dead_penalty, l0_penalty, matryoshka_error, squared_error
from gemscope.training.schedules import cosine_warmup, geometric, linear_decay, linear_warmup


class SingleLayerLearner:
    """The learner of SAEs and transcoders."""

    def __init__(self, config: TrainConfig, calibration: Rows) -> None:
        """Initialise from raw rows of every site, on whose device everything then is."""
        self.config = config
        x = calibration[config.site]
        self.moments = moments = measure(x, config.site)
        W_dec = _unit_rows(config.d_sae, x.shape[1], config.seed).to(x.device)
        W_enc = W_dec.T.contiguous()
        b_enc, b_dec = torch.zeros(config.d_sae, device=x.device), moments.mean.to(x.device) / moments.scale
        threshold, pre_scale = first_thresholds(x / moments.scale, W_enc, b_enc - b_dec @ W_enc, config.first_l0)
        self.weights = {
            "W_enc": W_enc,
            "b_enc": b_enc,
            "W_dec": W_dec,
            "b_dec": b_dec,
            "threshold": threshold,
        }
        for tensor in self.weights.values():
            tensor.requires_grad_()
        self.bandwidth = config.bandwidth * pre_scale
        self.rates = (config.learning_rate, config.threshold_learning_rate * pre_scale)
        groups = [[t for name, t in self.weights.items() if name != "threshold"], [threshold]]
        self.optimizer = Adam(
            [{"params": group, "lr": rate} for group, rate in zip(groups, self.rates, strict=True)],
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        self.idle_rows = torch.zeros(config.d_sae, dtype=torch.int64, device=x.device)

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites that it reads or predicts."""
        return self.config.sites

    def update(self, batch: Rows, done: int) -> StepResult:
        """One update on raw rows, after ``done`` updates."""
        x = batch[self.config.site].float()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._rate_factor(done)
        result = self._backward(x / self.moments.scale, done)
        W_dec = self.weights["W_dec"]
        assert W_dec.grad is not None
        remove_parallel(W_dec.grad, W_dec.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            self.weights["threshold"].clamp_(min=0)
        return result

    def _rate_factor(self, done: int) -> float:
        config = self.config
        decay = 1.0 if config.decay is None else linear_decay(done, config.steps, config.decay * config.steps)
        return cosine_warmup(done, config.warmup * config.steps) * decay

    def _backward(self, x: Tensor, done: int) -> StepResult:
        """Gradients of the objective on scaled rows."""
        config, spread = self.config, self.moments.spread
        W_enc, b_enc, W_dec, b_dec, threshold = self.weights.values()
        floor = threshold.detach() - self.bandwidth / 2
        bias = b_enc - b_dec @ W_enc
        support, pre_acts = encode_above(x, W_enc, bias, floor)
        at = threshold[support.latents]
        acts = jump_relu(pre_acts, at, self.bandwidth)
        active = step(pre_acts, at, self.bandwidth)
        nested = decode_prefixes(support, acts, W_dec, [*config.prefixes, config.d_sae])
        recons = [recon + b_dec for recon in nested]
        l0 = support.per_row(active)
        error = squared_error(x, recons[-1])
        weight = config.sparsity_weight * spread * linear_warmup(done, config.sparsity_warmup * config.steps)
        target = geometric(done, config.first_l0, config.target_l0, config.annealing * config.steps)
        loss = matryoshka_error(x, recons) + weight * l0_penalty(l0, target)
        dead = self._count_idle(support.latents[active.detach() > 0], len(x))
        if config.dead_weight > 0:
            own_bias = b_enc - b_dec.detach() @ W_enc  # b_dec has to serve the reconstruction alone
            penalty = dead_penalty(x, W_enc, own_bias, threshold, dead, support, pre_acts)
            loss = loss + config.dead_weight * spread * penalty
        loss.backward()
        return StepResult(loss.detach(), error.detach() / spread, l0.detach().mean())

    def _count_idle(self, active: Tensor, rows: int) -> Tensor:
        """Which latents are dead, this batch included."""
        self.idle_rows += rows
        self.idle_rows[active] = 0
        return self.idle_rows > self.config.dead_after_rows

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes."""
        weights = {name: tensor.detach() for name, tensor in self.weights.items()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict(), "idle_rows": self.idle_rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        with torch.no_grad():
            for name, tensor in self.weights.items():
                tensor.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.idle_rows.copy_(state["idle_rows"])

    def warnings(self) -> tuple[str, ...]:
        """None yet."""
        return ()

    def finished(self, calibration: Rows) -> tuple[Dictionary, dict[str, float]]:
        """The dictionary for raw activations, thresholds set to the target L0 on ``calibration``, and its numbers."""
        W_enc, b_enc, W_dec, b_dec, threshold = (tensor.detach().clone() for tensor in self.weights.values())
        sae = SAE(W_enc, b_enc, W_dec, b_dec, threshold)
        sae = sae.fold_pre_bias().fold_scale(self.moments.scale)
        x = calibration[self.config.site]
        before = len(sae.encode_sparse(x)[1]) / len(x)
        factor = threshold_factor(sae, x, self.config.target_l0)
        assert sae.threshold is not None
        sae.threshold.mul_(factor)
        after = len(sae.encode_sparse(x)[1]) / len(x)
        dead = (self.idle_rows > self.config.dead_after_rows).float().mean().item()
        numbers = {"l0_train": before, "l0": after, "threshold_factor": factor, "dead_fraction": dead}
        scale = {"scale_in": self.moments.scale, "scale_out": self.moments.scale, "bandwidth": self.bandwidth}
        return sae, numbers | scale


def _unit_rows(d_sae: int, d_in: int, seed: int) -> Float[Tensor, "d_sae d_in"]:
    """He-uniform rows scaled to norm 1: the same on every device."""
    rows = torch.rand(d_sae, d_in, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return rows / rows.norm(dim=1, keepdim=True)


def remove_parallel(grad: Float[Tensor, "d_sae d_in"], W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Take from each row of ``grad`` its part along the unit row of ``W_dec``, in place."""
    grad -= (grad * W_dec).sum(1, keepdim=True) * W_dec
