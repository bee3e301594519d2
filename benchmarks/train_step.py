"""Tokens per CPU-second of one optimiser step, of this trainer and, with --peers PYTHON, of three others.

Every number comes from a process of its own on the same seeded rows (d_in 640, batch 4096, k = L0 = 64; optimiser,
constraints and firing counts included), so that peak memory is attributable. CPU-seconds, because they bear a busy
machine better than wall time. ``bf16 screen`` finds the same latents as fp32 (``dictionaries.screening``); the peers'
bf16 is autocast. PYTHON is the interpreter of an environment with sae-lens, eai-sparsify and dictionary-learning.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from _common import Result, machine, report

STEP = Path(__file__).with_name("_step.py")
KINDS = ("topk", "batchtopk", "jumprelu", "matryoshka")
PEERS = (
    *(("saelens", kind) for kind in KINDS),
    *(("dictionary_learning", kind) for kind in KINDS),
    ("sparsify", "topk"),
)
PRODUCTS = {"float32": "fp32", "bfloat16": "bf16 screen"}


def measure(python: str, trainer: str, kind: str, product: str, d_sae: int, threads: int, rounds: int) -> list[Result]:
    """One configuration; nothing where it cannot run."""
    command = [python, str(STEP), trainer, kind, "--product", product, "--d-sae", str(d_sae)]
    command += ["--threads", str(threads), "--rounds", str(rounds)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
    )
    if done.returncode:
        print(f"{trainer} {kind}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return []
    numbers = json.loads(done.stdout.strip().splitlines()[-1])
    how = PRODUCTS[product] if trainer == "own" else product
    name = f"{'gemscope' if trainer == 'own' else trainer} {kind}, {how}, d_sae {d_sae}, {threads} thread(s)"
    load = f"load {os.getloadavg()[0]:.1f}"
    on = f"d_in 640, batch 4096, k 64, best of {rounds}, {load}; {machine()}"
    return [
        Result(f"{name}", numbers["per_cpu_s"], "tok/CPU-s", on),
        Result(f"{name}, wall", numbers["per_wall_s"], "tok/s", on),
        Result(f"{name}, peak", numbers["peak_mb"], "MB", on),
    ]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few latents, one round, one kind: does it run?")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--peers", metavar="PYTHON", help="measure these too")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--d-sae", type=int, nargs="*", default=[16384, 65536])
    o = parser.parse_args()
    if o.quick:
        report(measure(sys.executable, "own", "topk", "float32", 1024, 1, 1), o.json)
        return
    for d_sae in o.d_sae:
        for threads in o.threads:
            for product in PRODUCTS:
                for trainer, kind in (("dense", "encoder"), *(("own", kind) for kind in KINDS)):
                    rounds = 8 if d_sae == min(o.d_sae) else 3
                    report(measure(sys.executable, trainer, kind, product, d_sae, threads, rounds), o.json)
            if o.peers and d_sae == min(o.d_sae) and threads == min(o.threads):
                for trainer, kind in PEERS:
                    report(measure(o.peers, trainer, kind, "float32", d_sae, threads, 2), o.json)


if __name__ == "__main__":
    main()
