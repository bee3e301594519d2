"""First weights of a single-layer dictionary, fresh or taken from a finished one, and the way back."""

from collections.abc import Mapping, Sequence

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.screening import top_of_rows
from gemscope.dictionaries.single import SingleLayer
from gemscope.dictionaries.sparse import times_rows
from gemscope.dictionaries.transcoder import SkipTranscoder, Transcoder
from gemscope.training.config import TrainConfig
from gemscope.training.objectives import Splice

CLASSES: dict[str, type[SingleLayer]] = {cls.kind: cls for cls in (SAE, Transcoder, SkipTranscoder)}
PUBLIC = {"E": "W_enc"}
"""What the rows of the encoder are called outside."""

Weights = dict[str, Tensor]
"""E [d_sae, d_in] = W_enc.T, b_enc, W_dec, b_dec; threshold and W_skip where there are any."""


def unit_rows(d_sae: int, d: int, seed: int) -> Float[Tensor, "d_sae d"]:
    """He-uniform rows scaled to norm 1: the same on every device."""
    rows = torch.rand(d_sae, d, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return rows / rows.norm(dim=1, keepdim=True)


def fresh(
    config: TrainConfig, x: Float[Tensor, "rows d_in"], y: Float[Tensor, "rows d_out"], centre: Float[Tensor, " d_in"]
) -> Weights:
    """From scaled rows: W_enc = W_dec' for an SAE (Gemma Scope, section 3.2); no latent of a transcoder starts with a
    decoder row of its encoder's space, so its row is the mean of y - E[y] over the rows that activate it.
    """
    E = unit_rows(config.d_sae, x.shape[1], config.seed).to(x)
    weights = {"E": E, "b_enc": E.new_zeros(len(E)), "W_dec": E.clone(), "b_dec": y.mean(0)}
    if config.kind != "sae":
        rows = slice(0, 4096)
        k = max(1, min(config.d_sae, round(config.first_l0)))
        support, values = top_of_rows(x[rows] - centre, E, weights["b_enc"], k)
        W_dec = times_rows(support, values, y[rows] - weights["b_dec"])
        norms = W_dec.norm(dim=1, keepdim=True)
        random = unit_rows(config.d_sae, y.shape[1], config.seed + 1).to(x)
        weights["W_dec"] = torch.where(norms > 0, W_dec / norms.clamp(min=1e-30), random)
    if config.kind == "skip_transcoder":
        weights["W_skip"] = x.new_zeros(x.shape[1], y.shape[1])
    return weights


def keeps_origin(config: TrainConfig) -> bool:
    """Whether rows are not centred in going on from a dictionary, since what is frozen would have to make up for it: a
    b_enc, and beside a skip connection b_dec."""
    return "b_enc" in config.frozen or (config.kind == "skip_transcoder" and "b_dec" in config.frozen)


def row_norms(config: TrainConfig, initial: SingleLayer, scale: float) -> Float[Tensor, " d_sae"]:
    """Norms of W_dec * ``scale``, by which ``taken`` divides the decoder rows and multiplies what they are read by.

    A TopK compares latents, so there nothing is scaled beside a frozen W_dec; raises InputError for a frozen W_enc or
    b_enc of one whose decoder rows, to be trained, differ in norm.
    """
    norms = (initial.W_dec.float() * scale).norm(dim=1).clamp(min=1e-30)
    if config.activation != "topk":
        return norms
    if "W_dec" in config.frozen:
        return torch.ones_like(norms)
    if {"W_enc", "b_enc"} & set(config.frozen) and norms.max() > 1.001 * norms.min():
        raise InputError(
            "the decoder rows of this topk dictionary differ in norm, so that its encoder cannot stay while they are"
            " trained; freeze W_dec too, or neither W_enc nor b_enc."
        )
    return norms


def taken(
    config: TrainConfig,
    initial: SingleLayer,
    scale_in: float,
    scale_out: float,
    centre: Float[Tensor, " d_in"],
    norms: Float[Tensor, " d_sae"],
) -> Weights:
    """From a dictionary for raw activations, such as a pretrained model's to be finetuned on chats."""
    wanted = (config.kind, config.d_sae, config.activation)
    have = (initial.kind, initial.d_sae, initial.activation.kind)
    if wanted != have or initial.d_in != len(centre):
        raise InputError(
            f"training goes on from a {wanted[0]} of {wanted[1]} latents with {wanted[2]} and d_in {len(centre)}, but"
            f" the one given is a {have[0]} of {have[1]} with {have[2]} and d_in {initial.d_in}; make them agree."
        )
    if config.kind == "sae":
        scaled = initial.fold_scale(1 / scale_in)
        scaled = scaled if keeps_origin(config) else scaled.unfold_pre_bias()
    else:
        scaled = initial.fold_scale(1 / scale_in, 1 / scale_out).to(centre.device).unfold_pre_bias(centre)
    size = norms.to(centre)
    weights = {
        "E": scaled.W_enc.T.to(centre) * size[:, None],
        "b_enc": scaled.b_enc.to(centre) * size,
        "W_dec": scaled.W_dec.to(centre) / size[:, None],
        "b_dec": scaled.b_dec.to(centre).clone(),
    }
    if config.activation == "jumprelu":
        assert scaled.threshold is not None
        weights["threshold"] = scaled.threshold.to(centre) * size
    if scaled.W_skip is not None:
        weights["W_skip"] = scaled.W_skip.to(centre).clone()
        weights["b_dec"] += centre @ weights["W_skip"]
    return {name: tensor.detach().contiguous() for name, tensor in weights.items()}


def folded(
    config: TrainConfig,
    weights: Mapping[str, Tensor],
    threshold: Tensor | None,
    scale_in: float,
    scale_out: float,
    centre: Float[Tensor, " d_in"] | None,
) -> SingleLayer:
    """The dictionary for raw activations; the weights are copied. An SAE that is centred by its b_dec has no
    ``centre``.
    """
    tensors = {name: weights[name].clone() for name in ("b_enc", "W_dec", "b_dec")}
    tensors["W_enc"] = weights["E"].T.contiguous()
    if threshold is not None:
        tensors["threshold"] = threshold.clone()
    if "W_skip" in weights:
        assert centre is not None
        tensors["W_skip"] = weights["W_skip"].clone()
        tensors["b_dec"] -= centre @ weights["W_skip"]
    made = CLASSES[config.kind](**tensors, activation=config.finished_activation, prefixes=config.prefixes)
    made = made.fold_pre_bias(centre)
    return made.fold_scale(scale_in) if config.kind == "sae" else made.fold_scale(scale_in, scale_out)


def kept(made: SingleLayer, initial: SingleLayer, frozen: Sequence[str], norms: Float[Tensor, " d_sae"]) -> SingleLayer:
    """``made`` with its ``frozen`` weights exactly as they are in ``initial``: what ``taken`` divided by ``norms`` gets
    them back, and the same latents are active.
    """
    names = [name for name in frozen if getattr(initial, name, None) is not None]
    tensors = {name: tensor.detach().clone() for name, tensor in made.named_parameters()}
    if {"W_enc", "b_enc", "W_dec", "threshold"} & set(names):
        size = norms.to(made.W_enc)
        tensors["W_dec"] *= size[:, None]
        for name in {"W_enc", "b_enc", "threshold"} & set(tensors):
            tensors[name] /= size
    tensors |= {name: getattr(initial, name).detach().to(made.W_enc).clone() for name in names}
    return type(made)(**tensors, activation=made.activation, prefixes=made.prefixes)


def checked_splice(config: TrainConfig, splice: Splice | None) -> Splice | None:
    """Raise InputError when end-to-end training has no model to splice into."""
    if config.end_to_end > 0 and splice is None:
        raise InputError(
            "end_to_end training splices reconstructions into whole contexts, which these rows do not have; train on a"
            " LiveContexts (on the command line: --live MODEL)."
        )
    return splice
