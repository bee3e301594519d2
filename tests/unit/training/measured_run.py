"""Prints predicted and measured bytes of a whole run, steps, checkpoint, export and evaluation, as JSON:
``measured_run.py FOLDER KIND ACTIVATION D F BATCH CALIBRATION``.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from measured_step import peak, resident
from worlds import MemorySource

from gemscope.core.sites import Site
from gemscope.training.config import TrainConfig
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.outcome import Progress
from gemscope.training.planner import plan
from gemscope.training.run import RunOptions, run

READ, WRITTEN = Site("mlp_in", 0), Site("mlp_out", 0)


def go(config: TrainConfig, d: int, folder: Path) -> dict[str, int]:
    generator = torch.Generator().manual_seed(0)
    count = max(config.calibration_rows, 2 * config.batch_size)
    rows, held = (
        MemorySource({site: torch.randn(n, d, generator=generator) for site in config.sites})
        for n in (count, config.calibration_rows)
    )
    before, stepped = resident(), [0]

    def at_the_last_step(now: Progress) -> None:
        stepped[0] = peak() - before

    run(rows, held, [config], RunOptions(folder, "m", evaluate_every=None), progress=at_the_last_step)
    found = plan([config], dict.fromkeys(config.sites, d), held_out=held.rows)
    steps = max(found.phases["starting"], found.phases["training"])
    return {"steps": steps, "measured_steps": stepped[0], "whole": found.total, "measured_whole": peak() - before}


def main(folder: Path, kind: str, activation: str, d: int, latents: int, batch: int, calibration: int) -> None:
    torch.set_num_threads(1)
    config = TrainConfig(READ, latents, 50.0, activation=activation, steps=2, batch_size=batch)  # pyright: ignore
    config = dataclasses.replace(config, calibration_rows=calibration, product_dtype="float32")
    if kind == "clt":
        given = {name: getattr(config, name) for name in TrainConfig.__dataclass_fields__}
        given |= {"kind": "clt", "target_site": WRITTEN, "layers": tuple(range(6)), "first_l0_factor": 1.0}
        config = MultiLayerConfig(**given)
    small = dataclasses.replace(config, d_sae=64, target_l0=2.0, batch_size=16, calibration_rows=64)
    go(small, 16, folder / "small")  # the libraries' own memory
    sys.stdout.write(json.dumps(go(config, d, folder / "run")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], *map(int, sys.argv[4:8]))
