"""SAEBench's core evaluation of some SAEs; ``evaluate.py`` starts it with a Python that has SAEBench.

usage: _evaluate_saebench.py MODEL FOLDER; reads FOLDER/task.npz (tokens [rows, context], how many rows for the losses,
the weights of each SAE) and writes FOLDER/out.json: loss of the model, seconds, measures and version. The model is
converted to TransformerLens by its own code. Imports nothing of the house.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sae_bench.custom_saes.jumprelu_sae import JumpReluSAE
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gemma_weights
from transformers import AutoModelForCausalLM

BATCH = 16


class Rows:
    """Tokens in order, as SAEBench asks its store for them."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens, self.at = tokens, 0
        self.store_batch_size_prompts, self.context_size = BATCH, tokens.shape[1]

    def get_batch_tokens(self, count: int) -> torch.Tensor:
        """The next rows."""
        self.at += count
        return self.tokens[self.at - count : self.at]

    def reset_input_dataset(self) -> None:
        """Begin again."""
        self.at = 0


def converted(folder: str) -> HookedTransformer:
    """A Gemma 3 in TransformerLens, nothing folded."""
    gemma = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    of = gemma.config
    config = HookedTransformerConfig(
        n_layers=of.num_hidden_layers,
        d_model=of.hidden_size,
        d_head=of.head_dim,
        n_heads=of.num_attention_heads,
        n_key_value_heads=of.num_key_value_heads,
        d_mlp=of.intermediate_size,
        d_vocab=of.vocab_size,
        n_ctx=of.max_position_embeddings,
        eps=of.rms_norm_eps,
        act_fn="gelu_pytorch_tanh",
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=of.head_dim,
        rotary_base=int(of.rope_parameters["full_attention"]["rope_theta"]),
        rotary_base_local=int(of.rope_parameters["sliding_attention"]["rope_theta"]),
        use_attn_scale=True,
        gated_mlp=True,
        use_normalization_before_and_after=True,
        use_qk_norm=True,
        use_local_attn=True,
        window_size=of.sliding_window,
        attn_types=["global" if kind == "full_attention" else "local" for kind in of.layer_types],
        dtype=torch.float32,
        device="cpu",
    )
    model = HookedTransformer(config)
    model.load_state_dict(convert_gemma_weights(gemma, config), strict=False)
    return model


@torch.no_grad()
def main(model_folder: str, folder: Path) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    model = converted(model_folder)
    with np.load(folder / "task.npz", allow_pickle=False) as file:
        task = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    rows = Rows(task["tokens"].long())
    wanted = CoreEvalConfig(
        batch_size_prompts=BATCH,
        n_eval_reconstruction_batches=int(task["loss_rows"]) // BATCH,
        n_eval_sparsity_variance_batches=len(rows.tokens) // BATCH,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    seconds, measures = [], []
    for i, layer in enumerate(task["layers"].tolist()):
        d_in, d_sae = task[f"{i}.W_enc"].shape
        sae = JumpReluSAE(d_in, d_sae, "", layer, torch.device("cpu"), torch.float32)
        sae.load_state_dict({name: task[f"{i}.{name}"] for name in sae.state_dict()})
        rows.reset_input_dataset()
        started = time.perf_counter()
        measures.append(run_evals(sae, rows, model, wanted)[0])
        seconds.append(time.perf_counter() - started)
    out = {"seconds": seconds, "measures": measures, "version": importlib.metadata.version("sae-bench")}
    (folder / "out.json").write_text(json.dumps(out), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
