"""One SAE trained by SAELens on a world of its own making; ``worlds.py`` starts it with a Python that has SAELens.

usage: _worlds_saelens.py FOLDER; reads FOLDER/task.json and writes FOLDER/out.npz: the SAE for raw rows, SAELens' own
directions and biases of the world, wall and CPU seconds of the training (its rows' making included). Imports nothing
of the house.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "disabled")
import numpy as np
import sae_lens as s
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.synthetic.firing_magnitudes import FoldedNormalMagnitudeConfig, LinearMagnitudeConfig
from sae_lens.synthetic.firing_probabilities import ZipfianFiringProbabilityConfig
from sae_lens.synthetic.hierarchy import HierarchyConfig
from sae_lens.synthetic.synthetic_model import (
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
)
from sae_lens.synthetic.training import SyntheticActivationIterator
from sae_lens.training.sae_trainer import SAETrainer

BATCH = 1024


def world(config: dict) -> SyntheticModel:
    """The same world in SAELens' words."""
    codes = config["codes"]
    hierarchy = HierarchyConfig(
        codes["roots"],
        codes["branching"],
        codes["depth"],
        mutually_exclusive_portion=1.0,
        compensate_probabilities=True,
        scale_children_by_parent=True,
    )
    return SyntheticModel(
        SyntheticModelConfig(
            num_features=codes["features"],
            hidden_dim=config["d"],
            firing_probability=ZipfianFiringProbabilityConfig(codes["exponent"], codes["most"], codes["least"]),
            hierarchy=hierarchy if codes["roots"] else None,
            orthogonalization=OrthogonalizationConfig(config["orthogonal_steps"], config["orthogonal_rate"]),
            correlation=LowRankCorrelationConfig(codes["rank"], codes["correlation"]) if codes["correlation"] else None,
            std_firing_magnitudes=FoldedNormalMagnitudeConfig(codes["spread"], codes["spread"]),
            mean_firing_magnitudes=LinearMagnitudeConfig(codes["mean_first"], codes["mean_last"]),
            bias=config["bias"],
            seed=config["seed"],
        )
    )


def sae_of(task: dict) -> s.TrainingSAE:
    """A BatchTopK or Matryoshka SAE with SAELens' defaults."""
    size = {"d_in": task["world"]["d"], "d_sae": task["d_sae"], "dtype": "float32", "device": "cpu", "k": task["l0"]}
    if task["prefixes"]:
        widths = [*task["prefixes"], task["d_sae"]]
        config = s.MatryoshkaBatchTopKTrainingSAEConfig(**size, matryoshka_widths=widths)
        return s.MatryoshkaBatchTopKTrainingSAE(config)
    return s.BatchTopKTrainingSAE(s.BatchTopKTrainingSAEConfig(**size))


def main() -> None:
    """Train and write."""
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text("utf-8"))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = world(task["world"])
    torch.manual_seed(task["seed"])
    sae = sae_of(task)
    config = SAETrainerConfig(
        total_training_samples=task["rows"],
        train_batch_size_samples=BATCH,
        lr=task["rate"],
        lr_end=0.0,
        lr_decay_steps=round(task["decay"] * task["rows"] / BATCH),
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False, eval_every_n_wandb_logs=2**31 - 1),
    )
    rows = SyntheticActivationIterator(model.feature_dict, model.activation_generator, BATCH)
    begun = time.perf_counter(), time.process_time()
    SAETrainer(cfg=config, sae=sae, data_provider=rows).fit()
    seconds = time.perf_counter() - begun[0], time.process_time() - begun[1]
    w = {name: t.detach() for name, t in sae.named_parameters()}
    norms = w["W_dec"].norm(dim=1)  # latents are chosen by activation times decoder norm
    W_enc, b_enc = w["W_enc"] * norms, w["b_enc"] * norms
    if sae.cfg.apply_b_dec_to_input:
        b_enc = b_enc - w["b_dec"] @ W_enc
    np.savez(
        folder / "out.npz",
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=w["W_dec"] / norms[:, None],
        b_dec=w["b_dec"],
        directions=model.feature_dict.feature_vectors.detach(),
        bias=model.feature_dict.bias.detach(),
        rates=model.activation_generator.firing_probabilities,
        means=model.activation_generator.mean_firing_magnitudes,
        spreads=model.activation_generator.std_firing_magnitudes,
        seconds=np.array(seconds),
        version=np.array(s.__version__),
    )


if __name__ == "__main__":
    main()
