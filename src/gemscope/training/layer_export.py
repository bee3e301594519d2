"""From weights in training to a dictionary for raw activations, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gemscope.artifacts.config import KINDS
from gemscope.core.arrays import Float, Tensor
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.multilayer import MultiLayer
from gemscope.dictionaries.single import SingleLayer
from gemscope.training.calibration import mean_l0, set_thresholds, thresholds
from gemscope.training.config import TrainConfig
from gemscope.training.data import Moments


def build(
    config: TrainConfig,
    weights: Mapping[str, Tensor],
    read: Sequence[Moments],
    write: Sequence[Moments],
    level: float,
) -> Dictionary:
    """The dictionary that reads raw x_l and writes raw y_m; BatchTopK becomes a JumpReLU of threshold ``level``."""
    n, tied = len(read), "W_dec.0" in weights
    device = weights["W_enc.0"].device
    given: dict[str, list[Tensor]] = {
        "W_enc": [weights[f"W_enc.{i}"].T.contiguous() for i in range(n)],
        "b_enc": [weights[f"b_enc.{i}"].clone() for i in range(n)],
        "b_dec": [weights[f"b_dec.{i}"].clone() for i in range(n)],
        "W_dec": [
            torch.stack([weights[f"W_dec.{i}" if tied else f"W_dec.{i}.{m}"].to(device) for m in range(i, n)])
            for i in range(n)
        ],
    }
    if config.activation == "topk":
        activation = Activation("topk", float(int(config.target_l0)))
    else:
        activation = Activation("jumprelu")
        fixed = torch.full_like(given["b_enc"][0], level)
        given["threshold"] = [weights.get(f"threshold.{i}", fixed).clone() for i in range(n)]
    if "W_skip.0" in weights:
        given["W_skip"] = [weights[f"W_skip.{i}"].clone() for i in range(n)]
    centre = [m.mean.to(device) / m.scale for m in read]
    for i in range(n):
        given["b_enc"][i] -= centre[i] @ given["W_enc"][i]
        if "W_skip" in given:
            given["b_dec"][i] -= centre[i] @ given["W_skip"][i]
    scale_in, scale_out = [m.scale for m in read], [m.scale for m in write]
    made: dict[str, Any] = {**given, "activation": activation, "prefixes": config.prefixes}
    kind: Any = KINDS[config.kind]
    if config.layers:
        multi = kind(**made)
        assert isinstance(multi, MultiLayer)
        return multi.fold_scale(scale_in, scale_out)
    one = {name: value[0] for name, value in given.items() if name != "W_dec"}
    single = kind(**{**made, **one, "W_dec": given["W_dec"][0][0]})
    assert isinstance(single, SingleLayer)
    return single.fold_scale(scale_in[0], scale_out[0])


def calibrated(
    dictionary: Dictionary, x: Float[Tensor, "rows positions d_in"], target_l0: float, limit: float | None = None
) -> tuple[Dictionary, float, float]:
    """The dictionary with its thresholds set (``calibration.set_thresholds``), its L0 on ``x`` before, and the factor;
    1 where there are no thresholds or none can do it.
    """
    before = mean_l0(dictionary, x)
    factor = set_thresholds(dictionary, x, target_l0, limit) if thresholds(dictionary) else 1.0
    return dictionary, before, factor
