"""From weights in training to a dictionary for raw activations, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gemscope.artifacts.config import KINDS
from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.multilayer import MultiLayer
from gemscope.dictionaries.single import SingleLayer
from gemscope.dictionaries.sparse import Slice, select
from gemscope.training.config import TrainConfig
from gemscope.training.data import Moments

_ROWS = 2048


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


def parts_of_dictionary(
    start: Dictionary, config: TrainConfig, scale_in: Sequence[float], scale_out: Sequence[float]
) -> dict[str, Tensor]:
    """The weights by name of a dictionary for raw activations, for x_l / scale_in[l] -> y_m / scale_out[m].

    Raises InputError when the dictionary is not what ``config`` asks for.
    """
    n = len(scale_in)
    if start.kind != config.kind or start.n_positions != n or start.d_sae != config.d_sae:
        raise InputError(
            f"the dictionary to start from is a {start.kind} of {start.n_positions} x {start.d_sae} latents, but a"
            f" {config.kind} of {n} x {config.d_sae} was asked for; ask for the same kind and size."
        )
    if getattr(config, "tied", False):
        raise InputError("a finished dictionary has a decoder for every pair of layers; start from it without 'tied'.")
    if isinstance(start, MultiLayer):
        folded = start.fold_scale([1 / s for s in scale_in], [1 / s for s in scale_out])
        found = {f"{name}.{i}": t for name in ("W_enc", "b_enc", "b_dec") for i, t in enumerate(getattr(folded, name))}
        found |= {f"W_dec.{i}.{i + j}": t for i, tables in enumerate(folded.W_dec) for j, t in enumerate(tables)}
        for name in ("threshold", "W_skip"):
            found |= {f"{name}.{i}": t for i, t in enumerate(getattr(folded, name, None) or [])}
    else:
        assert isinstance(start, SingleLayer)
        one = start.fold_scale(1 / scale_in[0], 1 / scale_out[0])
        found = {f"{name}.0": t for name, t in one.named_parameters() if name != "W_dec"} | {"W_dec.0.0": one.W_dec}
    found = {name: t.detach().T.contiguous() if name.startswith("W_enc") else t.detach() for name, t in found.items()}
    if config.activation != "jumprelu":
        found = {name: t for name, t in found.items() if not name.startswith("threshold")}
    return found


@torch.no_grad()
def calibrated(
    dictionary: Dictionary, x: Float[Tensor, "rows positions d_in"], target_l0: float
) -> tuple[Dictionary, float, float]:
    """The dictionary with all thresholds times the factor that gives it a mean L0 of ``target_l0`` on ``x``; its L0
    before, and the factor. One number, found as a quantile; 1 where there are no thresholds or none can do it.
    """
    thresholds = _thresholds(dictionary)
    if not thresholds:
        count = sum(len(dictionary._select(part)[1]) for part in x.split(_ROWS))  # pyright: ignore[reportPrivateUsage]
        return dictionary, count / len(x), 1.0
    flat = torch.cat([t.detach() for t in thresholds])
    wanted, before = round(len(x) * target_l0), 0
    for floor in (0.5, 0.125, 0.0):
        ratios: list[Tensor] = []
        for part in x.split(_ROWS):
            slices = [
                Slice(s.position, s.first, s.W_enc, s.b_enc, None if s.floor is None else s.floor * floor)
                for s in dictionary._slices()  # pyright: ignore[reportPrivateUsage]
            ]
            support, values = select(part.to(flat.device), slices, dictionary.n_latents)
            ratios.append(values / flat[support.latents])
        every = torch.cat(ratios)
        before = int((every > 1).sum())
        if len(every) > wanted:
            factor = every.topk(wanted + 1)[0][-2:].double().mean().item()
            if factor < float("inf"):
                for t in thresholds:
                    t.mul_(factor)
                return dictionary, before / len(x), factor
            break
    return dictionary, before / len(x), 1.0


def _thresholds(dictionary: Dictionary) -> list[Tensor]:
    found = getattr(dictionary, "threshold", None)
    if found is None:
        return []
    return [found] if isinstance(found, Tensor) else list(found)
