"""Started once for each process; the second gets a SIGTERM while it reads its third batch."""

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distributed.sharded_run import SITES
from gemscope.training.config import TrainConfig
from gemscope.training.outcome import Keeping
from gemscope.training.sharding import start
from gemscope.training.trainer import train
from unit.training.worlds import MemorySource, superposition

CALIBRATION_BATCHES = 2


@dataclass
class Interrupting(MemorySource):
    rank: int = 0

    def batches(self, *given: Any) -> Iterator[Any]:
        for number, batch in enumerate(super().batches(*given)):
            if self.rank == 1 and number == CALIBRATION_BATCHES:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    mesh = start(2)
    data = Interrupting({SITES[0]: superposition(800, d=12)[0]}, rank=mesh.rank)
    config = TrainConfig(SITES[0], d_sae=24, target_l0=4.0, steps=12, batch_size=64, calibration_rows=128)
    train(data, [config], mesh=mesh, keep=Keeping(folder, every=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
