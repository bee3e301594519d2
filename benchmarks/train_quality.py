"""Dictionaries at equal L0 and equal tokens: what they leave unexplained, and which known features they found.

A synthetic world: rows are sums of a few of many known directions, more than there are dimensions, of unequal
frequency, with noise. Every trainer sees the same batches. All dictionaries are then measured by the same code, with
the same L0 on held-out rows: thresholds, or k where there are none, are set to it on other rows. The peers (with
--peers PYTHON) are tried at several learning rates, and at several weights for JumpReLU; their best FVU counts.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from _common import Result, machine, report

from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.sae import SAE
from gemscope.training.calibration import threshold_factor

TRAIN = Path(__file__).with_name("_quality.py")
D, FEATURES, ACTIVE = 128, 512, 20.0
SEARCH = {
    "own": [{}],
    "saelens": [{"rate": r, "weight": w} for r in (3e-4, 1e-3, 3e-3) for w in (1e-3, 1e-2)],
    "dictionary_learning": [{"rate": r} for r in (3e-4, 1e-3, 3e-3)],
}


def world(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [rows, D], which features each holds, and their directions."""
    fixed = torch.Generator().manual_seed(1234)
    directions = torch.nn.functional.normalize(torch.randn(FEATURES, D, generator=fixed), dim=1)
    mean = torch.randn(D, generator=fixed)
    frequency = torch.logspace(0, -1.5, FEATURES)
    frequency *= ACTIVE / frequency.sum()
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(rows, FEATURES, generator=generator) < frequency
    size = 0.7 + 0.6 * torch.rand(rows, FEATURES, generator=generator)
    x = (on * size) @ directions + mean + 0.05 * torch.randn(rows, D, generator=generator)
    return x, on, directions


def at_l0(found: dict[str, torch.Tensor], kind: str, x: torch.Tensor, l0: float) -> SAE:
    """The dictionary with the L0 asked for, set on ``x``."""
    if kind == "topk":
        given = {name: t for name, t in found.items() if name != "threshold"}
        return SAE(**given, activation=Activation("topk", l0))
    threshold = found.get("threshold")
    if kind == "batchtopk" or threshold is None or not bool((threshold > 0).all()):
        threshold = torch.full_like(found["b_enc"], 1e-3)  # one for all: the factor below makes it right
    sae = SAE(**(found | {"threshold": threshold}))
    assert sae.threshold is not None
    for _ in range(3):
        sae.threshold.mul_(threshold_factor(sae, x, l0))
    return sae


def scores(sae: SAE, x: torch.Tensor, on: torch.Tensor, directions: torch.Tensor) -> dict[str, float]:
    """FVU, L0, mean cosine of each feature's best latent, and the mean F1 of its firing as a detector of it."""
    support, _ = sae.encode_sparse(x)
    fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    cosines = directions @ torch.nn.functional.normalize(sae.W_dec, dim=1).T
    best, which = cosines.max(1)
    fires = torch.zeros(len(x), sae.d_sae, dtype=torch.bool)
    fires[support.rows, support.latents] = True
    hits = fires[:, which]
    f1 = 2 * (hits & on).sum(0) / (hits.sum(0) + on.sum(0)).clamp(min=1)
    dead = 1 - fires.any(0).float().mean()
    return {
        "FVU": float(fvu),
        "L0": len(support.rows) / len(x),
        "mean cosine": float(best.mean()),
        "mean F1": float(f1.mean()),
        "dead": float(dead),
    }


def train(python: str, trainer: str, kind: str, folder: Path, options: dict[str, float]) -> dict[str, torch.Tensor]:
    """One run in a process of its own."""
    command = [python, str(TRAIN), trainer, kind, "--rows", str(folder)]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run(command, check=True, capture_output=True)
    with np.load(folder / "out.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps: does it run?")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--peers", metavar="PYTHON", help="train these too")
    parser.add_argument("--steps", type=int, default=1500)
    o = parser.parse_args()
    steps, rows = (30, 20_000) if o.quick else (o.steps, 300_000)
    x = world(rows, 0)[0]
    calibration = world(20_000, 1)[0]
    held_out = world(20_000, 2)
    runs = [("own", "float32"), ("own", "bfloat16")]
    runs += [("saelens", "float32"), ("dictionary_learning", "float32")] if o.peers else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "x.npy", x.numpy())
        for kind in ("jumprelu", "topk", "batchtopk"):
            for trainer, product in runs:
                python = sys.executable if trainer == "own" else o.peers
                options = [dict(search) for search in SEARCH[trainer]]
                if kind != "jumprelu":
                    options = [s for s in options if s.get("weight", 1e-2) == 1e-2]
                tried = []
                for search in options:
                    given = search | {"steps": steps, "l0": ACTIVE}
                    command = given | ({"product": product} if trainer == "own" else {})
                    sae = at_l0(train(python, trainer, kind, folder, command), kind, calibration, ACTIVE)
                    tried.append((scores(sae, *held_out), search))
                best, search = min(tried, key=lambda pair: pair[0]["FVU"])
                label = f"gemscope {product}" if trainer == "own" else trainer
                on = f"{FEATURES} features in {D} dimensions, d_sae 1024, {steps} steps of 1024 rows, {search}; "
                report([Result(f"{label} {kind}, {n}", v, "", on + machine()) for n, v in best.items()], o.json)


if __name__ == "__main__":
    main()
