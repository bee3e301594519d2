"""Started by torchrun: trains with latents and rows sharded, and writes what came out."""

import sys
from pathlib import Path

import torch

from gemscope.core.sites import Site
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.outcome import Keeping, Trained
from gemscope.training.sharding import start, stop
from gemscope.training.trainer import train
from unit.training.worlds import MemorySource, superposition

SITES = [Site("resid_post", i) for i in (1, 2)]


def source() -> MemorySource:
    return MemorySource({site: superposition(1500, d=16, seed=i)[0] for i, site in enumerate(SITES)})


def configs(steps: int = 30) -> list[MultiLayerConfig]:
    base = {"steps": steps, "batch_size": 128, "calibration_rows": 400, "dead_after_rows": 900}
    crosscoder = {"kind": "crosscoder", "layers": (1, 2), "d_sae": 24, "target_l0": 6.0, **base}
    sae = {"d_sae": 32, "target_l0": 4.0, **base}
    return [
        MultiLayerConfig(SITES[0], prefixes=(8,), frequency_weight=0.1, **crosscoder),
        MultiLayerConfig(SITES[0], activation="topk", **crosscoder),
        MultiLayerConfig(SITES[0], activation="batchtopk", **crosscoder),
        MultiLayerConfig(SITES[0], prefixes=(8,), **sae),
        MultiLayerConfig(SITES[1], activation="topk", **sae),
        MultiLayerConfig(SITES[1], activation="batchtopk", **sae),
    ]


def weights(done: list[Trained]) -> dict[str, torch.Tensor]:
    return {f"{one.name}.{k}": v.detach().clone() for one in done for k, v in one.dictionary.named_parameters()}


def main(folder: Path, latents: int, steps: int) -> None:
    torch.set_num_threads(1)
    mesh = start(latents)
    done = train(source(), configs(), mesh=mesh, keep=Keeping(folder, every=steps), report_every=1)
    if mesh.is_first:
        from gemscope.core.files import write_tensors

        write_tensors(folder / "weights.safetensors", weights(done))
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
