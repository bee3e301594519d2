"""Small dictionaries as files of exactly the published layouts, written without gemscope; and their formulas.

Every size is different, so that no transposition goes unseen, and thresholds are above zero on purpose.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

D_IN, D_SAE, D_OUT, N = 6, 11, 5, 3


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(
    d_in: int = D_IN, d_sae: int = D_SAE, d_out: int = D_IN, seed: int = 0, scale: float = 1.0
) -> dict[str, Any]:
    """The five tensors in Gemma Scope 2's names and orientation."""
    g = generator(seed)
    return {
        "w_enc": torch.randn(d_in, d_sae, generator=g) * scale,
        "b_enc": torch.randn(d_sae, generator=g) * 0.3,
        "threshold": torch.rand(d_sae, generator=g) * 0.5 + 0.1,
        "w_dec": torch.randn(d_sae, d_out, generator=g),
        "b_dec": torch.randn(d_out, generator=g),
    }


def jump(pre: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """z 1[z > threshold], as the paper writes it."""
    return pre * (pre > threshold).to(pre.dtype)


def oracle(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The reconstruction in float64, by the formula of Gemma Scope 2."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    recon = jump(x.double() @ t["w_enc"] + t["b_enc"], t["threshold"]) @ t["w_dec"] + t["b_dec"]
    return recon + x.double() @ t["affine_skip_connection"] if "affine_skip_connection" in t else recon


def multi_weights(n: int = N, skip: bool = False, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Per position, the tensors of a ``params_layer_{i}.safetensors``; the unused half of the decoder is zero."""
    found = []
    for at in range(n):
        g = generator(100 * seed + at)
        t = weights(seed=50 * seed + at)
        w_dec = torch.randn(D_SAE, n, D_IN, generator=g)
        w_dec[:, :at] = 0
        t["w_dec"] = w_dec
        if skip:
            t["affine_skip_connection"] = torch.randn(D_IN, D_IN, generator=g)
        found.append(t)
    return found


def multi_oracle(layers: list[dict[str, torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    """x [batch, n, d]: y_m = b_dec[m] + sum over l <= m of f_l w_dec[l][:, m] (+ x_m skip[m]), in float64."""
    x = x.double()
    n = len(layers)
    out = []
    for m in range(n):
        y = layers[m]["b_dec"].double().expand(len(x), -1).clone()
        for at in range(m + 1):
            t = {name: tensor.double() for name, tensor in layers[at].items()}
            f = jump(x[:, at] @ t["w_enc"] + t["b_enc"], t["threshold"])
            y = y + f @ t["w_dec"][:, m]
        if "affine_skip_connection" in layers[m]:
            y = y + x[:, m] @ layers[m]["affine_skip_connection"].double()
        out.append(y)
    return torch.stack(out, 1)


def hooks_2(category: str, layer: int | str) -> tuple[str, str]:
    """Hook points as the published configs spell them."""
    at = f"model.layers.{layer}"
    return {
        "resid_post": (f"{at}.output", f"{at}.output"),
        "attn_out": (f"{at}.self_attn.o_proj.input", f"{at}.self_attn.o_proj.input"),
        "mlp_out": (f"{at}.post_feedforward_layernorm.output", f"{at}.post_feedforward_layernorm.output"),
        "transcoder": (f"{at}.pre_feedforward_layernorm.output", f"{at}.post_feedforward_layernorm.output"),
    }[category]


def config_2(category: str, layer: int | str = 3, width: int = D_SAE, **changes: Any) -> dict[str, Any]:
    """A ``config.json`` with the eight published keys."""
    kind = {"transcoder": "transcoder"}.get(category, "sae")
    into, out = hooks_2(category, layer)
    return {
        "hf_hook_point_in": into,
        "hf_hook_point_out": out,
        "width": width,
        "model_name": "google/gemma-3-1b-it",
        "architecture": "jump_relu",
        "l0": 10,
        "affine_connection": False,
        "type": kind,
    } | changes


def folder_2(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def multi_folder_2(folder: Path, layers: list[dict[str, torch.Tensor]], config: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for at, tensors in enumerate(layers):
        save_file(tensors, folder / f"params_layer_{at}.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_clt(n: int = N, **changes: Any) -> dict[str, Any]:
    return {
        "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output".replace("{all}", _all(n)),
        "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output".replace("{all}", _all(n)),
        "width": n * D_SAE,
        "model_name": "google/gemma-3-270m-pt",
        "architecture": "jump_relu",
        "l0": 150,
        "affine_connection": False,
        "type": "clt",
    } | changes


def _all(n: int) -> str:
    return "{" + ",".join(map(str, range(n))) + "}"


def config_crosscoder(**changes: Any) -> dict[str, Any]:
    point = "model.layers.{5,9,12}.output"
    both = {"hf_hook_point_in": point, "hf_hook_point_out": point, "type": "crosscoder"}
    return config_clt(**both, **changes)


def folder_1(folder: Path, tensors: dict[str, torch.Tensor], lower: bool = False, **more: torch.Tensor) -> Path:
    """Gemma Scope 1: ``params.npz`` in a folder of the release's path."""
    folder.mkdir(parents=True, exist_ok=True)
    w = "w" if lower else "W"
    arrays = {
        f"{w}_enc": tensors["w_enc"],
        f"{w}_dec": tensors["w_dec"],
        "b_enc": tensors["b_enc"],
        "b_dec": tensors["b_dec"],
        "threshold": tensors["threshold"],
    }
    np.savez(folder / "params.npz", **{name: t.numpy() for name, t in (arrays | more).items()})
    return folder


def config_saelens(architecture: str, d_sae: int = D_SAE, d_out: int | None = None, **changes: Any) -> dict[str, Any]:
    """A ``cfg.json`` as SAELens 6.54 writes it."""
    metadata = {
        "sae_lens_version": "6.54.12",
        "sae_lens_training_version": "6.54.12",
        "model_name": "google/gemma-3-1b-it",
        "hook_name": "blocks.3.hook_resid_post",
        "prepend_bos": True,
        "hf_hook_name": "model.layers.3.output",
    }
    if d_out is not None:
        metadata |= {
            "hook_name": "blocks.3.mlp.hook_in",
            "hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output",
            "hook_name_out": "blocks.3.hook_mlp_out",
            "hf_hook_name_out": "model.layers.3.post_feedforward_layernorm.output",
        }
    found = {
        "d_in": D_IN,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if d_out is not None:
        found["d_out"] = d_out
    return found | {"metadata": metadata, "architecture": architecture} | changes


def folder_saelens(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    """SAELens: W_skip is [d_out, d_in] in the file."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}
    found = {names.get(name, name): (t.T if name == "affine_skip_connection" else t) for name, t in tensors.items()}
    save_file({name: t.contiguous() for name, t in found.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def yaml_config(kind: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_name": "google/gemma-3-1b-it",
        "model_kind": kind,
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": "gemma-3-1b-it",
    } | changes


def folder_set(folder: Path, layers: list[dict[str, torch.Tensor]], config: dict[str, Any] | None = None) -> Path:
    """circuit-tracer's transcoder set: encoders as rows, the skip [d_out, d_in]."""
    folder.mkdir(parents=True, exist_ok=True)
    for at, t in enumerate(layers):
        found = {"W_enc": t["w_enc"].T, "W_dec": t["w_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
        if "threshold" in t:
            found["activation_function.threshold"] = t["threshold"]
        if "affine_skip_connection" in t:
            found["W_skip"] = t["affine_skip_connection"].T
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / f"layer_{at}.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(config or yaml_config("transcoder_set"), sort_keys=False))
    return folder


def folder_clt(folder: Path, layers: list[dict[str, torch.Tensor]], config: dict[str, Any] | None = None) -> Path:
    """circuit-tracer's CLT: the skip [d_in, d_out], the decoder of layer i without the layers before it."""
    folder.mkdir(parents=True, exist_ok=True)
    for at, t in enumerate(layers):
        encoder = {
            f"W_enc_{at}": t["w_enc"].T,
            f"b_enc_{at}": t["b_enc"],
            f"b_dec_{at}": t["b_dec"],
            f"threshold_{at}": t["threshold"],
        }
        if "affine_skip_connection" in t:
            encoder[f"W_skip_{at}"] = t["affine_skip_connection"]
        save_file({name: tensor.contiguous() for name, tensor in encoder.items()}, folder / f"W_enc_{at}.safetensors")
        decoder = {f"W_dec_{at}": t["w_dec"][:, at:].contiguous()}
        save_file(decoder, folder / f"W_dec_{at}.safetensors")
    (folder / "config.yaml").write_text(
        yaml.safe_dump(config or yaml_config("cross_layer_transcoder"), sort_keys=False)
    )
    return folder


def same_files(a: Path, b: Path, *names: str) -> None:
    """Files of two folders are the same bytes."""
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def rows(n: int = 7, d: int = D_IN, seed: int = 9) -> torch.Tensor:
    return torch.randn(n, d, generator=generator(seed))
