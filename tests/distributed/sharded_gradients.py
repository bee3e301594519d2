"""Started by torchrun: the gradients of one batch in float64, with latents and with rows sharded."""

import sys
from pathlib import Path
from typing import Any

import torch

from gemscope.core.files import write_tensors
from gemscope.core.sites import Site
from gemscope.training.layer_start import counts_latents
from gemscope.training.multilayer import MultiLayerConfig, MultiLayerLearner
from gemscope.training.sharding import ALONE, Mesh, start, stop

N, F, B = 3, 12, 64
READS = [Site("mlp_in", i) for i in range(N)]
WRITES = [Site("mlp_out", i) for i in range(N)]
TOPK = {"activation": "topk"}
BATCHTOPK = {"activation": "batchtopk", "target_l0": 5.3}
CROSSCODER = {"kind": "crosscoder", "target_site": None, "skip": False}
CASES: dict[str, dict[str, Any]] = {
    "clt": {"frequency_weight": 0.2, "prefixes": (5,)},
    "clt tied": {"tied": True},
    "clt ste": {"ste_to_input": True, "frequency_weight": 0.1},
    "clt topk": TOPK | {"aux_weight": 0.5, "prefixes": (3, 7)},
    "clt batchtopk": BATCHTOPK | {"aux_k": 3, "frequency_weight": 0.1},
    "crosscoder": CROSSCODER,
    "crosscoder topk": CROSSCODER | TOPK | {"aux_k": 5},
    "crosscoder batchtopk": CROSSCODER | BATCHTOPK | {"prefixes": (4,)},
    "skip_transcoder topk": TOPK | {"kind": "skip_transcoder", "layers": (), "target_l0": 2.0},
    "sae": {"kind": "sae", "target_site": None, "skip": False, "layers": (), "ste_to_input": True},
}


def config(case: str) -> MultiLayerConfig:
    given: dict[str, Any] = {
        "target_site": WRITES[0],
        "kind": "clt",
        "layers": tuple(range(N)),
        "skip": True,
        "d_sae": F,
        "target_l0": 5.0,
        "first_l0_factor": 1.2,
        "batch_size": B,
        "calibration_rows": 400,
        "dead_after_rows": 100,
        "sparsity_warmup": 0.0,
    }
    return MultiLayerConfig(READS[0], **{**given, **CASES[case]})


def rows() -> dict[Site, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    sources = (torch.rand(400, 20, generator=g) < 0.15) * (0.5 + torch.rand(400, 20, generator=g))
    return {site: sources @ torch.randn(20, 8, generator=g) + 1.0 for site in (*READS, *WRITES)}


def gradients(case: str, mesh: Mesh = ALONE) -> dict[str, torch.Tensor]:
    """Of every weight, whole, by ``case.name``, and the loss and L0; every fourth latent is dead."""
    data = rows()
    learner = MultiLayerLearner(config(case), data, mesh=mesh)
    layers, g = learner.n, torch.Generator().manual_seed(3)
    seldom = torch.arange(layers * F).view(layers, F) % 4 == 3
    for name, tensor in learner.weights.items():
        sizes = (F, *tensor.shape[1:]) if counts_latents(name) else tensor.shape
        noise = 0.02 * torch.randn(sizes, generator=g, dtype=torch.float64)
        learner.weights[name] = tensor.double() + (mesh.own(noise) if counts_latents(name) else noise)
    for layer, some in enumerate(seldom):
        penalised = learner.config.penalised
        name = f"threshold.{layer}" if penalised else f"b_enc.{layer}"
        learner.weights[name][mesh.own(some)] += 2.0 if penalised else -0.6
    learner.idle_rows[:] = torch.cat([mesh.own(some) for some in seldom]) * 90
    batch = {site: mesh.rows(x[:B]) for site, x in data.items()}
    x = [rows.double() for rows in learner._inputs(batch)]
    y = [rows.double() for rows in learner._targets(batch)]
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, grad: torch.Tensor) -> None:
        grad = mesh.sum_over_data(grad.clone())
        found[f"{case}.{name}"] = mesh.whole(grad) if counts_latents(name) else grad

    result = learner.backward(x, y, 6, keep)
    assert ("dead" if learner.config.penalised else "aux") in result.terms
    assert mesh.mean_over_latents(float((learner.idle_rows > 100).sum())) > 0, "no latent was dead"
    return found | {f"{case}.loss": result.loss[None], f"{case}.l0": result.l0[None]}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for latents in (2, 1):
        mesh = start(latents)
        found = {name: grad for case in CASES for name, grad in gradients(case, mesh).items()}
        state = MultiLayerLearner(config("clt"), rows(), mesh=mesh).state_dict()
        assert bool(state["weights"]) == mesh.is_first, "the other processes keep no whole weights"
        if mesh.is_first:
            assert state["weights"]["W_dec.0.1"].shape == (F, 8)
            write_tensors(folder / f"{latents}.safetensors", found)
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
