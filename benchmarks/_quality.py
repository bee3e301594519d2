"""One dictionary trained by one trainer on given rows; ``train_quality.py`` starts it.

usage: _quality.py TRAINER KIND --rows FOLDER --options JSON; FOLDER holds x.npy (training rows) and gets the finished
dictionary for raw activations as out.npz. The options are seed, l0, steps and d_sae, for peers rate (and weight) too,
for gemscope whatever TrainConfig has. Imports nothing else of the house but, for ``gemscope``, the package.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")
import numpy as np
import torch

BATCH = 1024
Tensors = dict[str, torch.Tensor]


def batches(x: torch.Tensor, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """The same batches for everybody."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    per_epoch = len(x) // BATCH
    for i in range(steps):
        if i and i % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator)
        at = i % per_epoch * BATCH
        yield x[order[at : at + BATCH]]


def gemscope(kind: str, x: torch.Tensor, o: dict[str, Any]) -> Tensors:
    """gemscope: what is not given is its default."""
    from gemscope.core.sites import Site
    from gemscope.training.config import TrainConfig
    from gemscope.training.single import SingleLayerLearner

    site, given = Site("resid_post", 0), dict(o)
    config = TrainConfig(site, target_l0=given.pop("l0"), activation=kind, batch_size=BATCH, **given)
    learner = SingleLayerLearner(config, {site: x[:16384]})
    for done, batch in enumerate(batches(x, config.steps, config.seed)):
        learner.update({site: batch}, done)
    return dict(learner.finished({site: x[:16384]})[0].named_parameters())


def saelens(kind: str, x: torch.Tensor, o: dict[str, Any]) -> Tensors:
    """SAELens on rows of norm sqrt(d), as it asks for."""
    import sae_lens as s
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    scale = float(x.square().sum(1).mean().sqrt()) / x.shape[1] ** 0.5
    size = {"d_in": x.shape[1], "d_sae": o["d_sae"], "dtype": "float32", "device": "cpu"}
    if kind == "topk":
        sae = s.TopKTrainingSAE(s.TopKTrainingSAEConfig(**size, k=int(o["l0"])))
    elif kind == "batchtopk":
        sae = s.BatchTopKTrainingSAE(s.BatchTopKTrainingSAEConfig(**size, k=int(o["l0"])))
    else:
        quadratic = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": o["l0"], "l0_coefficient": o["weight"]}
        sae = s.JumpReLUTrainingSAE(s.JumpReLUTrainingSAEConfig(**size, **quadratic))
    config = SAETrainerConfig(
        total_training_samples=BATCH * o["steps"],
        train_batch_size_samples=BATCH,
        lr=o["rate"],
        lr_end=o["rate"] / 10,
        lr_decay_steps=o["steps"] // 5,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0) / scale)
    for batch in batches(x, o["steps"], o["seed"]):
        trainer.step(batch / scale)
        trainer.n_training_steps += 1
    w = {name: t.detach() for name, t in sae.named_parameters()}
    norms = w["W_dec"].norm(dim=1)
    W_enc, b_enc = w["W_enc"], w["b_enc"]
    if kind != "jumprelu":  # chosen by activations times decoder norms
        W_enc, b_enc = W_enc * norms, b_enc * norms
        w["W_dec"] = w["W_dec"] / norms[:, None]
    subtract = bool(getattr(sae.cfg, "apply_b_dec_to_input", True))
    found = {"W_enc": W_enc, "b_enc": (b_enc - subtract * (w["b_dec"] @ W_enc)) * scale, "W_dec": w["W_dec"]}
    found["b_dec"] = w["b_dec"] * scale
    if kind == "jumprelu":
        found["threshold"] = sae.threshold.detach() * scale
    return found


def dictionary_learning(kind: str, x: torch.Tensor, o: dict[str, Any]) -> Tensors:
    """dictionary_learning on rows of norm 1, as it asks for."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    scale = float(x.square().sum(1).mean().sqrt())
    size = {"steps": o["steps"], "activation_dim": x.shape[1], "dict_size": o["d_sae"], "layer": 0, "lm_name": ""}
    size |= {"device": "cpu", "lr": o["rate"], "warmup_steps": o["steps"] // 20, "decay_start": o["steps"] * 4 // 5}
    if kind == "jumprelu":
        trainer = JumpReluTrainer(**size, target_l0=o["l0"], sparsity_warmup_steps=o["steps"] // 20)
    else:
        trainer = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[kind](**size, k=int(o["l0"]))
    for done, batch in enumerate(batches(x, o["steps"], o["seed"])):
        trainer.update(done, batch / scale)
    ae = trainer.ae
    if kind == "jumprelu":
        W_enc, b_enc, W_dec = ae.W_enc.detach(), ae.b_enc.detach(), ae.W_dec.detach()
        b_dec, subtract = ae.b_dec.detach(), ae.apply_b_dec_to_input
    else:
        W_enc, b_enc, W_dec = ae.encoder.weight.detach().T, ae.encoder.bias.detach(), ae.decoder.weight.detach().T
        b_dec, subtract = ae.b_dec.detach(), True
    found = {"W_enc": W_enc, "b_enc": (b_enc - subtract * (b_dec @ W_enc)) * scale, "W_dec": W_dec}
    found["b_dec"] = b_dec * scale
    if kind == "jumprelu":
        found["threshold"] = ae.threshold.detach() * scale
    return found


TRAINERS = {f.__name__: f for f in (gemscope, saelens, dictionary_learning)}


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("kind", choices=("topk", "batchtopk", "jumprelu"))
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, required=True)
    o = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(o.options["seed"])
    x = torch.from_numpy(np.load(o.rows / "x.npy"))
    found = TRAINERS[o.trainer](o.kind, x, o.options)
    np.savez(o.rows / "out.npz", **{name: t.detach().float().contiguous().numpy() for name, t in found.items()})


if __name__ == "__main__":
    main()
