"""Frozen weights come back in the finished dictionary, for raw activations, whatever else has moved."""

from typing import Any

import pytest
import torch

from gemscope.core.sites import Site
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.multilayer import Crosscoder, CrossLayerTranscoder
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.transcoder import SkipTranscoder, Transcoder
from gemscope.training.multilayer import MultiLayerConfig, MultiLayerLearner

N, D, D_OUT, F = 2, 8, 6, 12
READS = [Site("mlp_in", i) for i in range(N)]
WRITES = [Site("mlp_out", i) for i in range(N)]
KINDS = {"sae": SAE, "transcoder": Transcoder, "skip_transcoder": SkipTranscoder, "crosscoder": Crosscoder}
PARTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
CASES = [(kind, part) for kind in (*KINDS, "clt") for part in PARTS] + [
    ("skip_transcoder", "W_skip"),
    ("clt", "W_skip"),
]


def rows(seed: int = 0) -> dict[Site, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    found = {site: 2.0 * torch.randn(600, D, generator=g) + 1.5 for site in READS}
    return found | {site: 0.3 * torch.randn(600, D_OUT, generator=g) - 1.0 for site in WRITES}


def dictionary(kind: str) -> Dictionary:
    """With decoder rows of many sizes, biases and a skip."""
    g = torch.Generator().manual_seed(5)
    n, out = N if kind in ("crosscoder", "clt") else 1, D if kind in ("sae", "crosscoder") else D_OUT
    sizes = 0.3 + 2 * torch.rand(F, 1, generator=g)
    given: dict[str, Any] = {
        "W_enc": [torch.randn(D, F, generator=g) for _ in range(n)],
        "b_enc": [torch.randn(F, generator=g) for _ in range(n)],
        "W_dec": [sizes * torch.randn(n - i, F, out, generator=g) for i in range(n)],
        "b_dec": [torch.randn(out, generator=g) for _ in range(n)],
        "threshold": [1 + torch.rand(F, generator=g) for _ in range(n)],
    }
    if kind in ("skip_transcoder", "clt"):
        given["W_skip"] = [torch.randn(D, out, generator=g) for _ in range(n)]
    if kind == "clt":
        return CrossLayerTranscoder(**given)
    if kind == "crosscoder":
        return Crosscoder(**given)
    return KINDS[kind](**{name: t[0][0] if name == "W_dec" else t[0] for name, t in given.items()})


def config(kind: str, frozen: tuple[str, ...]) -> MultiLayerConfig:
    several = kind in ("crosscoder", "clt")
    return MultiLayerConfig(
        READS[0],
        kind=kind,  # pyright: ignore[reportArgumentType]
        target_site=None if kind in ("sae", "crosscoder") else WRITES[0],
        layers=tuple(range(N)) if several else (),
        skip=kind == "clt",
        d_sae=F,
        target_l0=3.0,
        first_l0_factor=1.0,
        annealing=0.0,
        sparsity_warmup=0.0,
        steps=8,
        batch_size=100,
        calibration_rows=600,
        learning_rate=0.02,
        threshold_learning_rate=0.02,
        frozen=frozen,
    )


def parts(one: Dictionary) -> dict[str, torch.Tensor]:
    """By the name of the part, all layers in one."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in one.named_parameters():
        found.setdefault(name.split(".")[0], []).append(tensor.detach().clone().flatten())
    return {name: torch.cat(tensors) for name, tensors in found.items()}


@pytest.mark.parametrize(("kind", "part"), CASES, ids=["-".join(case) for case in CASES])
def test_a_frozen_part_is_unchanged_and_the_others_have_moved(kind: str, part: str) -> None:
    before, data = dictionary(kind), rows()
    start = parts(before)
    learner = MultiLayerLearner(config(kind, (part,)), data, start=before)
    for done in range(8):
        learner.update({site: x[done * 50 : done * 50 + 100] for site, x in data.items()}, done)
    finished, numbers = learner.finished(rows(1))
    after = parts(finished)
    assert after.keys() == start.keys()
    for name, old in start.items():
        distance = ((after[name] - old).abs().max() / old.abs().max()).item()
        assert distance < 1e-6 if name == part else distance > 1e-3, (name, distance)
    if part == "threshold":
        assert numbers["threshold_factor"] == 1.0
    else:
        assert numbers["l0"] == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize("kind", [*KINDS, "clt"])
def test_all_parts_frozen_leave_the_function_as_it_was(kind: str) -> None:
    before, data = dictionary(kind), rows()
    learner = MultiLayerLearner(config(kind, (*PARTS, "W_skip")), data, start=before)
    learner.update({site: x[:100] for site, x in data.items()}, 0)
    after = learner.finished(data)[0]
    for name, old in parts(before).items():
        torch.testing.assert_close(parts(after)[name], old, rtol=1e-6, atol=1e-6)
