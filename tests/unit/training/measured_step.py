"""Prints predicted and measured bytes of one training step: ``measured_step.py LAYERS D F BATCH [bfloat16]``."""

import json
import resource
import sys
from pathlib import Path

import torch

from gemscope.core.sites import Site
from gemscope.training.multilayer import MultiLayerConfig, MultiLayerLearner
from gemscope.training.planner import plan


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most that this program held; ru_maxrss would count what its parent held when it was forked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main(n: int, d: int, latents: int, batch: int, moments: str) -> None:
    torch.set_num_threads(1)
    reads, writes = [Site("mlp_in", i) for i in range(n)], [Site("mlp_out", i) for i in range(n)]
    config = MultiLayerConfig(
        reads[0],
        target_site=writes[0],
        kind="clt",
        layers=tuple(range(n)),
        d_sae=latents,
        target_l0=50.0,
        steps=100,
        batch_size=batch,
        calibration_rows=max(256, batch),
        moments=moments,
        first_l0_factor=1.0,
    )
    small = torch.randn(64, 64) @ torch.randn(64, 64)  # the libraries' own buffers
    torch.sparse.sampled_addmm(small.to_sparse_csr(), small, small)
    before = resident()
    rows = {site: torch.randn(config.calibration_rows, d) for site in config.sites}
    learner = MultiLayerLearner(config, rows)
    for done in range(2):
        learner.update({site: x[:batch].clone() for site, x in rows.items()}, done)
    predicted = plan([config], dict.fromkeys(config.sites, d), held_out=0).phases["training"]
    sys.stdout.write(json.dumps({"predicted": predicted, "measured": peak() - before}) + "\n")


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:5]]
    main(*numbers, sys.argv[5] if len(sys.argv) > 5 else "float32")
