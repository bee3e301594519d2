"""One optimiser step of one trainer, timed in a process of its own; ``train_step.py`` starts it.

usage: _step.py TRAINER KIND --d-sae N --batch N --k N --threads N --product DTYPE; prints one JSON object. The peers'
trainers are imported from whatever environment runs this file, which therefore imports nothing else of the house.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable

os.environ.setdefault("WANDB_MODE", "disabled")
import torch
from _activations import rows

D_IN = 640
Step = Callable[[torch.Tensor], object]


def own(kind: str, o: argparse.Namespace, x: torch.Tensor) -> Step:
    """gemscope."""
    from gemscope.core.sites import Site
    from gemscope.training.config import TrainConfig
    from gemscope.training.single import SingleLayerLearner

    prefixes = (o.d_sae // 16, o.d_sae // 4) if kind == "matryoshka" else ()
    activation = "batchtopk" if kind == "matryoshka" else kind
    config = TrainConfig(
        Site("resid_post", 0),
        d_sae=o.d_sae,
        target_l0=o.k,
        activation=activation,
        prefixes=prefixes,
        batch_size=o.batch,
        first_l0_factor=1.0,
        product_dtype=o.product,
        calibration_rows=1024,
    )
    learner = SingleLayerLearner(config, {config.site: x[:1024]})
    done = iter(range(1_000_000))
    return lambda batch: learner.update({config.site: batch}, next(done)).l0.item()


def dense(kind: str, o: argparse.Namespace, x: torch.Tensor) -> Step:
    """The five matrix products of a dense step, and nothing else; ``encoder`` is the first of them alone."""
    W = torch.randn(o.d_sae, D_IN) / D_IN**0.5
    dtype = torch.bfloat16 if o.product == "bfloat16" else torch.float32
    E = W.T.contiguous().to(dtype)

    def step(batch: torch.Tensor) -> object:
        acts = batch.to(dtype) @ E
        if kind == "encoder":
            return None
        recon = acts @ W
        return acts.T @ recon, batch.T @ (recon @ W.T)

    return step


def saelens(kind: str, o: argparse.Namespace, x: torch.Tensor) -> Step:
    """SAELens: its SAETrainer's step."""
    import sae_lens as s
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

    size = {"d_in": D_IN, "d_sae": o.d_sae, "dtype": "float32", "device": "cpu"}
    if kind == "topk":
        sae = s.TopKTrainingSAE(s.TopKTrainingSAEConfig(**size, k=o.k))
    elif kind == "batchtopk":
        sae = s.BatchTopKTrainingSAE(s.BatchTopKTrainingSAEConfig(**size, k=o.k))
    elif kind == "matryoshka":
        widths = [o.d_sae // 16, o.d_sae // 4, o.d_sae]
        config = s.MatryoshkaBatchTopKTrainingSAEConfig(**size, k=o.k, matryoshka_widths=widths)
        sae = MatryoshkaBatchTopKTrainingSAE(config)
    else:
        quadratic = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": o.k, "l0_coefficient": 1e-3}
        sae = s.JumpReLUTrainingSAE(s.JumpReLUTrainingSAEConfig(**size, **quadratic))
    config = SAETrainerConfig(
        total_training_samples=o.batch * 1000,
        train_batch_size_samples=o.batch,
        lr=3e-4,
        lr_end=3e-5,
        device="cpu",
        autocast=o.product == "bfloat16",
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(batch: torch.Tensor) -> object:
        loss = trainer.step(batch).loss.item()
        trainer.n_training_steps += 1
        return loss

    return step


def dictionary_learning(kind: str, o: argparse.Namespace, x: torch.Tensor) -> Step:
    """dictionary_learning: its trainers' update."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    size = {"steps": 100_000, "activation_dim": D_IN, "dict_size": o.d_sae, "layer": 0, "lm_name": "", "device": "cpu"}
    if kind == "jumprelu":
        trainer = JumpReluTrainer(**size, target_l0=o.k)
    elif kind == "matryoshka":
        trainer = MatryoshkaBatchTopKTrainer(**size, k=o.k, group_fractions=[1 / 16, 3 / 16, 12 / 16])
    else:
        trainer = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[kind](**size, k=o.k)
    done = iter(range(1_000_000))
    return lambda batch: trainer.update(next(done), batch)


def sparsify(kind: str, o: argparse.Namespace, x: torch.Tensor) -> Step:
    """sparsify: the operations of its Trainer.fit for one site, with Adam."""
    from sparsify import SaeConfig
    from sparsify.sparse_coder import SparseCoder

    coder = SparseCoder(D_IN, SaeConfig(num_latents=o.d_sae, k=o.k, activation=kind), device="cpu", dtype=torch.float32)
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4)

    def step(batch: torch.Tensor) -> object:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x=batch, y=batch, dead_mask=None)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        return float(out.fvu.detach())

    return step


TRAINERS = {f.__name__: f for f in (own, dense, saelens, dictionary_learning, sparsify)}


def _resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("kind")
    for name, value in {"d-sae": 16384, "batch": 4096, "k": 64, "threads": 1, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--product", default="float32")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    x = rows(4 * o.batch, D_IN)
    before = _resident_mb()
    step = TRAINERS[o.trainer](o.kind, o, x)
    cpu: list[float] = []
    wall: list[float] = []
    for i in range(o.rounds + 1):
        batch = x[(i % 4) * o.batch : (i % 4 + 1) * o.batch]
        c, w = time.process_time(), time.perf_counter()
        step(batch)
        if i > 0:
            cpu.append(time.process_time() - c)
            wall.append(time.perf_counter() - w)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    print(json.dumps({"per_cpu_s": o.batch / min(cpu), "per_wall_s": o.batch / min(wall), "peak_mb": peak}))


if __name__ == "__main__":
    main()
