"""Whether the L0 that is asked for comes out, with no latent too frequent and few dead.

JumpReLU with the frequency penalty, for targets 10, 20, 50 and 100, on the rows of ``train_quality.py``: a synthetic
world (more features here, and more of them at once) and microworld-it after layer 1. Thresholds are set on some
held-out rows and everything is counted on others; ``L0 as trained`` is where the controller alone had brought it.
"""

import tempfile
from pathlib import Path

import torch
from _common import Result, arguments, machine, report
from train_quality import stored, world

from gemscope.core.sites import Site
from gemscope.dictionaries.single import SingleLayer
from gemscope.training.config import TrainConfig
from gemscope.training.single import SingleLayerLearner

SITE = Site("resid_post", 1)
TARGETS = (10.0, 20.0, 50.0, 100.0)
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def measure(label: str, rows: Rows, d_sae: int, target: float, steps: int) -> list[Result]:
    """One dictionary."""
    x, calibration, held_out = rows
    config = TrainConfig(SITE, d_sae=d_sae, target_l0=target, steps=steps, batch_size=512, frequency_weight=0.1)
    learner = SingleLayerLearner(config, {SITE: x[: config.calibration_rows]})
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for done in range(steps):
        at = done * 512 % (len(x) - 512)
        learner.update({SITE: x[order[at : at + 512]]}, done)
    sae, numbers = learner.finished({SITE: calibration})
    assert isinstance(sae, SingleLayer)
    support, _ = sae.encode_sparse(held_out)
    frequency = torch.bincount(support.latents, minlength=d_sae) / len(held_out)
    found = {
        "L0": len(support.rows) / len(held_out),
        "L0 as trained": numbers["l0_train"],
        "largest frequency": float(frequency.max()),
        "dead": float((frequency == 0).float().mean()),
    }
    on = f"{len(x)} rows, {len(held_out)} held out, d_sae {d_sae}, {steps} steps of 512; {machine()}"
    return [Result(f"{label}, target {target:g}, {name}", value, "", on) for name, value in found.items()]


def main() -> None:
    """Run and print."""
    o = arguments(__doc__ or "")
    torch.set_num_threads(1)
    steps, many, d_sae = (40, 20_000, 256) if o.quick else (1500, 400_000, 4096)
    with tempfile.TemporaryDirectory() as name:
        x, calibration, held_out = (world(n, seed, 512, 20.0)[0] for seed, n in enumerate((many, 20_000, 20_000)))
        worlds = {
            "synthetic": ((x, calibration, held_out), d_sae),
            "microworld-it": (stored(Path(name), many // 60), d_sae),
        }
        for label, (rows, size) in worlds.items():
            for target in TARGETS[:1] if o.quick else TARGETS:
                report(measure(label, rows, size, target, steps), o.json)


if __name__ == "__main__":
    main()
