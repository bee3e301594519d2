"""Evaluations in SAEBench's JSON, with right numbers under its keys.

Notable:
- the required keys hold the correct values; what SAEBench 0.6.0 would print for its two wrong ones (explained variance
  with squares before the mean, mse divided by the tokens of a batch) stands in ``eval_result_unstructured.compat`` and
  is named in ``eval_config``; ``explained_variance_legacy`` is a mean over tokens with the mean of our batches;
- sparse probing and absorption are measured on other data than SAEBench's, by its definitions; ``eval_config`` says
  how. Labels are of tokens and mostly rare, so accuracies are balanced: what a test set of as many positives as
  negatives, which SAEBench's are, would give;
- its plots choose the figures by the *path*: every eval has a folder of its name;
- its core reads ``sae_cfg_dict``'s ``architecture`` and ``d_sae``; ``training_tokens`` is there when it is known.
"""

import re
import statistics
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemscope import __version__
from gemscope.core.files import write_json
from gemscope.core.sites import Site
from gemscope.evaluation.probes import Probed, mean_accuracy
from gemscope.evaluation.result import Evaluation

SCHEMA: Mapping[str, Mapping[str, Sequence[str]]] = {
    "core": {
        "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
        "model_performance_preservation": (
            "ce_loss_score",
            "ce_loss_with_ablation",
            "ce_loss_with_sae",
            "ce_loss_without_sae",
        ),
        "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "mse", "cossim"),
        "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
        "sparsity": ("l0", "l1"),
        "token_stats": ("total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"),
        "misc_metrics": (
            "freq_over_1_percent",
            "freq_over_10_percent",
            "normalized_freq_over_1_percent",
            "normalized_freq_over_10_percent",
            "average_max_encoder_cosine_sim",
            "average_max_decoder_cosine_sim",
            "frac_alive",
        ),
    },
    "absorption": {
        "mean": (
            "mean_absorption_fraction_score",
            "mean_full_absorption_score",
            "mean_num_split_features",
            "std_dev_absorption_fraction_score",
            "std_dev_full_absorption_score",
            "std_dev_num_split_features",
        ),
    },
    "sparse_probing": {
        "llm": ("llm_test_accuracy", "llm_top_1_test_accuracy", "llm_top_2_test_accuracy", "llm_top_5_test_accuracy"),
        "sae": ("sae_test_accuracy", "sae_top_1_test_accuracy", "sae_top_2_test_accuracy", "sae_top_5_test_accuracy"),
    },
}
"""Folder (what SAEBench's plots find in the path) -> category -> metrics that it requires."""

EVAL_TYPE = {"core": "core", "absorption": "absorption_first_letter", "sparse_probing": "sparse_probing"}
PROBES = {"llm": ("dense", "neurons"), "sae": ("all latents", "latents")}
"""Of each category of ``sparse_probing`` the methods behind ``test_accuracy`` and ``top_k_test_accuracy``."""
DETAILS: Mapping[str, Sequence[str]] = {
    "core": (
        "index",
        "feature_density",
        "consistent_activation_heuristic",
        "encoder_bias",
        "encoder_norm",
        "encoder_decoder_cosine_sim",
        "max_decoder_cosine_sim",
        "max_encoder_cosine_sim",
    ),
    "absorption": (
        "first_letter",
        "mean_absorption_fraction",
        "full_absorption_rate",
        "num_full_absorption",
        "num_probe_true_positives",
        "num_split_features",
    ),
    "sparse_probing": ("dataset_name", *SCHEMA["sparse_probing"]["llm"], *SCHEMA["sparse_probing"]["sae"]),
}
REQUIRED = (
    "eval_config",
    "eval_id",
    "datetime_epoch_millis",
    "eval_result_metrics",
    "sae_bench_commit_hash",
    "sae_lens_id",
    "sae_lens_release_id",
    "sae_lens_version",
    "sae_cfg_dict",
)


def export(folder: Path, measured: Sequence[Evaluation]) -> list[Path]:
    """Write every eval that was measured; returns the files, ``core/{release}_{id}_eval_results.json`` and so on."""
    made: Mapping[str, Callable[[Evaluation], dict[str, Any] | None]] = {
        "core": core,
        "sparse_probing": sparse_probing,
        "absorption": absorption,
    }
    values = ((name, one, make(one)) for name, make in made.items() for one in measured)
    return [_write(folder, name, one, value) for name, one, value in values if value is not None]


def _write(folder: Path, name: str, one: Evaluation, value: Mapping[str, Any]) -> Path:
    path = folder / name / f"{_plain(release(one))}_{_plain(one.name)}_eval_results.json"
    write_json(path, value)
    return path


def release(one: Evaluation) -> str:
    """SAEBench's name for where a dictionary comes from: here its model's."""
    return f"gemscope_{_plain(one.model)}"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.\-]+", "_", name)


def core(one: Evaluation) -> dict[str, Any]:
    """The ``core`` eval of one dictionary."""
    fidelity, loss = one.fidelity, one.loss
    compat, sites = _mean_compat(one), fidelity.by_site
    metrics = {
        "model_behavior_preservation": {
            "kl_div_score": _score(loss.kl_zero, loss.kl),
            "kl_div_with_ablation": loss.kl_zero,
            "kl_div_with_sae": loss.kl,
        },
        "model_performance_preservation": {
            "ce_loss_score": _score(loss.zero - loss.original, loss.delta_loss),
            "ce_loss_with_ablation": loss.zero,
            "ce_loss_with_sae": loss.spliced,
            "ce_loss_without_sae": loss.original,
        },
        "reconstruction_quality": {
            "explained_variance": 1 - fidelity.fvu,
            "explained_variance_legacy": compat.get("explained_variance_legacy"),
            "mse": fidelity.mse,
            "cossim": fidelity.cosine,
        },
        "shrinkage": {
            "l2_norm_in": sum(site.norm_in for site in sites) / max(len(sites), 1),
            "l2_norm_out": sum(site.norm_out for site in sites) / max(len(sites), 1),
            "l2_ratio": compat.get("l2_ratio"),
            "relative_reconstruction_bias": fidelity.bias,
        },
        "sparsity": {"l0": fidelity.l0, "l1": fidelity.l1},
        "token_stats": {
            "total_tokens_eval_reconstruction": loss.predictions,
            "total_tokens_eval_sparsity_variance": fidelity.rows,
        },
        "misc_metrics": _misc(one),
    }
    wrong = {name: compat[name] for name in ("explained_variance_saebench_bug", "mse_saebench_bug") if name in compat}
    note = (
        "eval_result_unstructured.compat holds what SAEBench 0.6.0's formulas give where they are wrong: "
        "explained_variance_saebench_bug (squares before the mean), mse_saebench_bug (divided by a batch's tokens)"
    )
    return _frame(one, "core", metrics, _details(one), {"compat": wrong}, {"compat": note})


def sparse_probing(one: Evaluation) -> dict[str, Any] | None:
    """The ``sparse_probing`` eval, each label a data set; None where nothing was probed."""
    report = one.probes
    if report is None or not report.concepts:
        return None

    def values(accuracy: Callable[[str, int | None], float | None]) -> dict[str, dict[str, float | None]]:
        return {
            kind: {_key(kind, k): accuracy(sparse if k else dense, k) for k in (None, 1, 2, 5)}
            for kind, (dense, sparse) in PROBES.items()
        }

    def of_label(label: Probed) -> dict[str, Any]:
        def own(method: str, k: int | None) -> float | None:
            score = label.score(method, k)
            return None if score is None else score.accuracy

        return {"dataset_name": label.concept, **{key: v for kind in values(own).values() for key, v in kind.items()}}

    metrics = values(lambda method, k: mean_accuracy(report, method, k))
    note = (
        f"labels of tokens, fitted on {report.train_rows} and scored on {report.test_rows} of other documents; balanced"
        " accuracies, at the threshold that is best on the training tokens; features chosen by mean difference"
    )
    return _frame(one, "sparse_probing", metrics, list(map(of_label, report.concepts)), {}, {"method": note})


def _key(kind: str, k: int | None) -> str:
    return f"{kind}_test_accuracy" if k is None else f"{kind}_top_{k}_test_accuracy"


def absorption(one: Evaluation) -> dict[str, Any] | None:
    """The ``absorption_first_letter`` eval; None where first letters were not measured, or the model knows none."""
    if one.first_letters is None:
        return None
    found = [
        {
            "first_letter": label.concept,
            "mean_absorption_fraction": label.absorption.partial,
            "full_absorption_rate": label.absorption.full,
            "num_full_absorption": round(label.absorption.full * label.absorption.true_positives),
            "num_probe_true_positives": label.absorption.true_positives,
            "num_split_features": label.splits or 1,
        }
        for label in one.first_letters.letters
        if label.absorption is not None
    ]
    if not found:
        return None
    names = {
        "absorption_fraction_score": "mean_absorption_fraction",
        "full_absorption_score": "full_absorption_rate",
        "num_split_features": "num_split_features",
    }
    columns = {name: [float(line[key]) for line in found] for name, key in names.items()}
    mean = {f"mean_{name}": statistics.fmean(values) for name, values in columns.items()}
    mean |= {
        f"std_dev_{name}": statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in columns.items()
    }
    note = (
        f"{one.first_letters.words} words of the vocabulary; letters whose dense probe is too weak are left out:"
        f" {', '.join(one.first_letters.left_out) or 'none'}"
    )
    return _frame(one, "absorption", {"mean": mean}, found, {}, {"method": note})


def _score(ablated: float | None, own: float | None) -> float | None:
    """Share of what ablation costs that is avoided, whatever its sign; 0 where ablation costs nothing."""
    if ablated is None or own is None:
        return None
    return (ablated - own) / ablated if ablated else 0.0


def _mean_compat(one: Evaluation) -> dict[str, float]:
    sites = one.fidelity.by_site
    names = sites[0].compat if sites else {}
    return {name: sum(site.compat[name] for site in sites) / len(sites) for name in names}


def _misc(one: Evaluation) -> dict[str, float | None]:
    density, shape = one.fidelity.density, one.geometry
    whole = float(density.sum()) or 1.0
    return {
        "freq_over_1_percent": float((density > 0.01).double().mean()),
        "freq_over_10_percent": float((density > 0.1).double().mean()),
        "normalized_freq_over_1_percent": float(density[density > 0.01].sum()) / whole,
        "normalized_freq_over_10_percent": float(density[density > 0.1].sum()) / whole,
        "average_max_encoder_cosine_sim": None if shape is None else shape.mean_max_encoder_cosine,
        "average_max_decoder_cosine_sim": None if shape is None else shape.mean_max_decoder_cosine,
        "frac_alive": 1 - one.fidelity.dead_fraction,
    }


def _details(one: Evaluation) -> list[dict[str, Any]]:
    shape, fidelity = one.geometry, one.fidelity
    if shape is None:
        return []

    def at(values: Sequence[float], i: int) -> float | None:
        return values[i] if i < len(values) else None

    return [
        {
            "index": i,
            "feature_density": count / fidelity.rows,
            "consistent_activation_heuristic": count / texts if texts else 0.0,
            "encoder_bias": shape.encoder_bias[i],
            "encoder_norm": shape.encoder_norm[i],
            "encoder_decoder_cosine_sim": at(shape.encoder_decoder_cosine, i),
            "max_decoder_cosine_sim": shape.max_decoder_cosine[i],
            "max_encoder_cosine_sim": shape.max_encoder_cosine[i],
        }
        for i, (count, texts) in enumerate(zip(fidelity.firings, fidelity.texts_fired, strict=True))
    ]


def _frame(
    one: Evaluation,
    name: str,
    metrics: Mapping[str, Any],
    details: list[dict[str, Any]],
    free: Mapping[str, Any],
    notes: Mapping[str, str],
) -> dict[str, Any]:
    kept = {
        category: {key: value for key, value in values.items() if value is not None}
        for category, values in metrics.items()
    }
    missing = [f"{c}.{k}" for c, values in metrics.items() for k, value in values.items() if value is None]
    return {
        "eval_type_id": EVAL_TYPE[name],
        "eval_config": {
            "tool": f"gemscope {__version__}",
            "model_name": one.model,
            "text": one.about.get("text"),
            "excluded_positions": one.about.get("positions"),
            "precision": "fp32 activations, fp64 sums",
            "not_measured": missing,
            **notes,
        },
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": kept,
        "eval_result_details": details,
        "sae_bench_commit_hash": "not SAEBench",
        "sae_lens_id": one.name,
        "sae_lens_release_id": release(one),
        "sae_lens_version": "not SAELens",
        "sae_cfg_dict": _config(one),
        "eval_result_unstructured": dict(free),
    }


def _config(one: Evaluation) -> dict[str, Any]:
    site = Site.parse(one.site)
    return {
        "architecture": one.architecture,
        "activation_fn_str": one.architecture,
        "d_sae": one.d_sae,
        "training_tokens": int(one.about.get("training_tokens", 0)),
        "model_name": one.model,
        "hook_name": site.tl_name,
        "hook_layer": site.layer if site.layer is not None else 0,
        "kind": one.kind,
        "reads": list(one.reads),
        "writes": list(one.writes),
    }


def problems(value: Any, name: str) -> list[str]:
    """What keeps a JSON value from being a SAEBench result of this eval; empty when nothing does."""
    if not isinstance(value, dict):
        return ["it is no object"]
    found = [f"{key} is missing" for key in REQUIRED if key not in value]
    if value.get("eval_type_id") != EVAL_TYPE[name]:
        found.append(f"eval_type_id is {value.get('eval_type_id')!r}")
    metrics = value.get("eval_result_metrics", {})
    for category, keys in SCHEMA[name].items():
        for key in keys:
            number = metrics.get(category, {}).get(key)
            wanted: Callable[[Any], bool] = _is_count if category == "token_stats" else _is_number
            if not wanted(number):
                found.append(f"{category}.{key} is {number!r}")
    config = value.get("sae_cfg_dict", {})
    found += [
        f"sae_cfg_dict.{key} is missing" for key in ("architecture", "d_sae", "training_tokens") if key not in config
    ]
    details = value.get("eval_result_details", [])[:1]
    return found + [f"details lack {key}" for one in details for key in DETAILS[name] if key not in one]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")
