"""SAELens' ``cfg.json`` of any version as that of version 6: where the site and the model are said moved over time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemscope.artifacts.reading import mapping, shown
from gemscope.core.errors import FormatError

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_METADATA = (
    "model_name",
    "hook_name",
    "hook_head_index",
    "prepend_bos",
    "neuronpedia_id",
    "context_size",
    "dataset_path",
    "sae_lens_version",
    "hook_name_out",
    "hf_hook_name",
    "hf_hook_name_out",
)


def current(raw: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The config with ``architecture`` and a ``metadata`` table; raises FormatError when it cannot be one."""
    if "metadata" in raw:
        cfg = {**raw, "metadata": mapping(raw["metadata"], f"'metadata' in {where}")}
    else:
        cfg = _from_before_6(raw, where)
    if "architecture" not in cfg or "d_sae" not in cfg:
        raise FormatError(f"{where} names no architecture or no d_sae; it is no config of SAELens.")
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(cfg.get(name, False), bool):
            raise FormatError(f"{name!r} in {where} is {shown(cfg[name])}; it should be true or false.")
    return cfg


def _from_before_6(raw: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Before version 6 the metadata stood beside the sizes, and some names and defaults were others."""
    old = {_RENAMED.get(name, name): value for name, value in raw.items()}
    activation = old.get("activation_fn", "relu")
    if activation not in ("relu", "topk"):
        raise FormatError(f"the activation {shown(activation)} in {where} is not read; relu and topk are.")
    cfg = {"architecture": "standard", "apply_b_dec_to_input": True, **old}
    if activation == "topk":
        arguments = mapping(old.get("activation_fn_kwargs"), f"'activation_fn_kwargs' in {where}")
        cfg |= {"architecture": "topk", "k": arguments.get("k")}
    normalisation = cfg.get("normalize_activations")
    if isinstance(normalisation, bool):
        cfg["normalize_activations"] = "expected_average_only_in" if normalisation else "none"
    if cfg.get("finetuning_scaling_factor"):
        raise FormatError(f"{where} has a finetuning_scaling_factor, which is not read; fold it into W_dec first.")
    return cfg | {"metadata": {name: old[name] for name in _METADATA if name in old}}
