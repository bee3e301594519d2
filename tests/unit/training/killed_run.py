"""A small pass over three kinds of dictionary, to be killed: ``killed_run.py FOLDER [steps-per-second-limit]``."""

import sys
import time
from pathlib import Path

import torch

from gemscope.core.sites import Site
from gemscope.training.config import TrainConfig
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.outcome import Keeping, Progress
from gemscope.training.trainer import train
from unit.training.worlds import MemorySource, superposition

STEPS = 60
SITES = [Site("resid_post", 1), Site("resid_post", 2)]


def source() -> MemorySource:
    return MemorySource({site: superposition(1500, d=16, seed=i)[0] for i, site in enumerate(SITES)})


def configs() -> list[TrainConfig]:
    base = {"steps": STEPS, "batch_size": 128, "calibration_rows": 400}
    single = TrainConfig(SITES[0], d_sae=32, target_l0=4.0, **base)
    sharp = TrainConfig(SITES[1], d_sae=32, target_l0=4.0, activation="topk", seed=1, **base)
    several = MultiLayerConfig(
        SITES[0], d_sae=24, target_l0=6.0, kind="crosscoder", layers=(1, 2), moments="bfloat16", **base
    )
    return [single, sharp, several]


def main(folder: Path, pause: float) -> None:
    torch.set_num_threads(1)

    def slow(_: Progress) -> None:
        time.sleep(pause)

    keep = Keeping(folder, every=7)
    done = train(source(), configs(), keep=keep, progress=slow, report_every=1)
    (folder / "done").write_text(repr([float(d.dictionary(source().data[SITES[0]][:5]).sum()) for d in done[:1]]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
