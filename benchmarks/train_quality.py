"""Dictionaries at equal L0 and equal tokens: what they leave unexplained, and which known features they found.

Two sets of rows. ``synthetic``: sums of a few of many known directions, more than there are dimensions, of unequal
frequency, with noise. ``microworld-it``: its residual stream after layer 1, read from a store; held-out rows are of
other documents, and no features are known. Every trainer sees the same batches. All dictionaries are then measured by
the same code, with the same L0 on held-out rows: thresholds, or k where there are none, are set to it on other rows.
Every trainer is tried with four settings, SAELens' JumpReLU (with --peers PYTHON) with six; the one with the best FVU
is then trained with other seeds too, and the mean over the seeds counts. A seed gives everybody the same batches.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Result, machine, report

from gemscope.activations.harvesting import harvest_to
from gemscope.activations.plan import HarvestConfig
from gemscope.activations.sources import Documents
from gemscope.activations.store import Store
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.sae import SAE
from gemscope.models.gemma import Gemma
from gemscope.suites.corpus import GeneratedText
from gemscope.training.calibration import threshold_factor

TRAIN = Path(__file__).with_name("_quality.py")
DATA, PEERS = ("synthetic", "microworld-it"), ("saelens", "dictionary_learning")
D, FEATURES, ACTIVE, D_SAE = 128, 256, 12.0, 512
LARGER_K, MOMENTUM = {"first_k_factor": 8 / 3}, {"beta1": 0.9}
LINEAR = {"sparsity": "linear", "sparsity_weight": 0.01, "first_l0_factor": 10.0, "annealing": 0.6, "decay": 0.4}
SLOW, FAST = {"threshold_learning_rate": 4e-3}, {"threshold_learning_rate": 8e-3, "dead_weight": 0.0, **MOMENTUM}
QUADRATIC = {"sparsity_weight": 0.1, "threshold_learning_rate": 5e-4, "bandwidth": 1.5}
RATES = [{"rate": r} for r in (1e-3, 3e-3, 6e-3, 1e-2)]
SEARCH: dict[str, list[dict[str, Any]]] = {
    "gemscope": [{"learning_rate": r, **how} for r in (1e-2, 1.6e-2) for how in (LARGER_K, MOMENTUM)],
    "gemscope jumprelu": [{"learning_rate": r, **LINEAR, **how} for r, how in ((6e-3, SLOW), (1e-2, FAST))]
    + [{"learning_rate": r, **QUADRATIC} for r in (6e-3, 1e-2)],
    "saelens": RATES,
    "saelens jumprelu": [{"rate": r, "weight": w} for r in (1e-3, 3e-3, 1e-2) for w in (1e-2, 1e-1)],
    "dictionary_learning": RATES,
}


Known = tuple[torch.Tensor, torch.Tensor]
"""Which features each row holds, and their directions."""


def world(
    rows: int, seed: int, features: int = FEATURES, active: float = ACTIVE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [rows, D], which features each holds, and their directions."""
    fixed = torch.Generator().manual_seed(1234)
    directions = torch.nn.functional.normalize(torch.randn(features, D, generator=fixed), dim=1)
    mean = torch.randn(D, generator=fixed)
    frequency = torch.logspace(0, -1.5, features)
    frequency *= active / frequency.sum()
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(rows, features, generator=generator) < frequency
    size = 0.7 + 0.6 * torch.rand(rows, features, generator=generator)
    x = (on * size) @ directions + mean + 0.05 * torch.randn(rows, D, generator=generator)
    return x, on, directions


def stored(folder: Path, documents: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of microworld-it for training, for setting thresholds and for measuring, split by document."""
    gemma, site = Gemma.load("microworld-it"), Site("resid_post", 1)
    texts = list(GeneratedText(chat=True).read(0, documents))
    harvest_to(folder, gemma, Documents(texts), HarvestConfig((str(site),)))
    train, other = Store.open(folder).split(0.12)
    sides = (train, *other.split(0.5, seed=1))
    found = [torch.cat([batch[site].float() for batch in side.batches([site], 4096, 0)]) for side in sides]
    return found[0], found[1], found[2]


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


def scored(
    weights: dict[str, torch.Tensor],
    kind: str,
    calibration: torch.Tensor,
    held_out: torch.Tensor,
    known: Known | None,
) -> dict[str, float]:
    """FVU, L0, dead latents; of known features the mean cosine of the best latent, and its mean F1 as a detector."""
    sae, x = at_l0(weights, kind, calibration, ACTIVE), held_out
    support, _ = sae.encode_sparse(x)
    fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    fires = torch.zeros(len(x), sae.d_sae, dtype=torch.bool)
    fires[support.rows, support.latents] = True
    dead = 1 - fires.any(0).float().mean()
    found = {"FVU": float(fvu), "L0": len(support.rows) / len(x), "dead": float(dead)}
    if known is None:
        return found
    on, directions = known
    cosines = directions @ torch.nn.functional.normalize(sae.W_dec, dim=1).T
    best, which = cosines.max(1)
    hits = fires[:, which]
    f1 = 2 * (hits & on).sum(0) / (hits.sum(0) + on.sum(0)).clamp(min=1)
    return found | {"mean cosine": float(best.mean()), "mean F1": float(f1.mean())}


def train(python: str, trainer: str, kind: str, folder: Path, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One run in a process of its own."""
    command = [python, str(TRAIN), trainer, kind, "--rows", str(folder), "--options", json.dumps(options)]
    subprocess.run(command, check=True, capture_output=True)
    with np.load(folder / "out.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps: does it run?")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--peers", metavar="PYTHON", help="train these too")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", choices=DATA, action="append", help="only these rows")
    o = parser.parse_args()
    steps, rows = (30, 20_000) if o.quick else (o.steps, 300_000)
    runs = [("gemscope", "float32"), ("gemscope", "bfloat16")]
    runs += [(peer, "") for peer in PEERS] if o.peers else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for data in o.data or DATA:
            if data == "synthetic":
                x, calibration, (held_out, *features) = world(rows, 0)[0], world(20_000, 1)[0], world(20_000, 2)
                about, known = f"{FEATURES} features in {D} dimensions", (features[0], features[1])
            else:
                x, calibration, held_out = stored(folder / "store", rows // 47)
                about, known = f"{data} after layer 1, {len(x)} rows from a store", None
            np.save(folder / "x.npy", x.numpy())
            for kind in ("jumprelu", "topk", "batchtopk"):
                for trainer, product in runs:
                    settings = SEARCH.get(f"{trainer} {kind}", SEARCH[trainer])
                    fixed = {"steps": steps, "l0": ACTIVE, "d_sae": D_SAE, "product_dtype": product}
                    run = partial(train, o.peers if trainer in PEERS else sys.executable, trainer, kind, folder)
                    score = partial(scored, kind=kind, calibration=calibration, held_out=held_out, known=known)
                    tried = [(score(run(setting | fixed | {"seed": 0})), setting) for setting in settings]
                    first, best = min(tried, key=lambda pair: pair[0]["FVU"])
                    seen = [first, *(score(run(best | fixed | {"seed": seed})) for seed in range(1, o.seeds))]
                    label = " ".join(filter(None, (f"{data},", trainer, product, kind)))
                    every = " ".join(f"{one['FVU']:.4f}" for one in seen)
                    on = f"mean of {len(seen)} seeds (FVU {every}); {about}, d_sae {D_SAE}, {steps} steps of 1024 rows"
                    on += f", {best}"
                    means = {name: float(np.mean([one[name] for one in seen])) for name in first}
                    report([Result(f"{label}, {n}", v, "", f"{on}; {machine()}") for n, v in means.items()], o.json)


if __name__ == "__main__":
    main()
