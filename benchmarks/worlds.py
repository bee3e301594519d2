"""What trainers find of worlds whose features are known: ours, and SAELens on the same worlds in the same run.

SAELens (with --peers PYTHON, or .venv-interop if it is there) makes the same worlds with its own generator; the script
checks that directions, rates and sizes agree. It is given as many rows, and the better of two learning rates tried in
earlier runs, 1e-3, falling linearly to zero over the last 30 %. All dictionaries are measured by the same code on the
same rows, their thresholds set to the same L0 on others. CPU seconds include the making of the rows; one thread each,
one after the other. Finished runs are kept in --out, so that a stopped benchmark goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch
from _common import Result, machine, report

from gemscope.benchmark.worlds import BATCH, Run, add_run, benchmark, lines, read_runs
from gemscope.dictionaries.sae import SAE
from gemscope.evaluation.worlds.metrics import score
from gemscope.evaluation.worlds.tiers import TIERS, Tier
from gemscope.evaluation.worlds.world import World
from gemscope.training.calibration import threshold_factor

PEER = Path(__file__).with_name("_worlds_saelens.py")
INTEROP = Path(__file__).parents[1] / ".venv-interop" / "bin" / "python"
PEERS_ON = ("nano",)
RATE, DECAY = 1e-3, 0.3


def saelens(python: Path, one: Tier, method: str, seed: int, rows: int) -> Run:
    """One run of SAELens in a process of its own, measured here."""
    task = {
        "world": one.world.as_dict(),
        "d_sae": one.d_sae,
        "l0": one.l0,
        "prefixes": list(one.prefixes) if method == "matryoshka" else [],
        "rows": rows,
        "seed": seed,
        "rate": RATE,
        "decay": DECAY,
    }
    with tempfile.TemporaryDirectory() as name:
        Path(name, "task.json").write_text(json.dumps(task), "utf-8")
        subprocess.run([python, PEER, name], check=True, capture_output=True)
        with np.load(Path(name, "out.npz"), allow_pickle=False) as file:
            found = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files if key != "version"}
            version = str(file["version"])
    world = World(one.world)
    same = {"directions": world.read[0], "bias": world.b_read[0], "rates": world.codes.rates}
    for key, ours in (same | {"means": world.codes.means, "spreads": world.codes.spreads}).items():
        torch.testing.assert_close(found[key], ours, atol=1e-4, rtol=1e-3)
    weights = {key: found[key].float() for key in ("W_enc", "b_enc", "W_dec", "b_dec")}
    sae = SAE(**weights, threshold=torch.full((one.d_sae,), 1e-3))
    calibration = world.draw(16_384, world.generator(3)).x[:, 0]
    assert sae.threshold is not None
    for _ in range(3):
        sae.threshold.mul_(threshold_factor(sae, calibration, one.l0))
    wall, cpu = found["seconds"].tolist()
    given = {"learning_rate": RATE, "decay": DECAY}
    return Run(one.name, method, seed, rows, wall, cpu, score(world, sae).as_dict(), given, f"SAELens {version}")


def with_peers(python: Path, one: Tier, methods: Sequence[str], seeds: int, rows: int, file: Path) -> list[Run]:
    """Those that are not in the file yet are made."""
    found: list[Run] = []
    kept = {(r.trainer.split()[0], r.tier, r.method, r.seed, r.rows): r for r in read_runs(file)}
    for method in [m for m in methods if m != "jumprelu"]:
        for seed in range(seeds):
            run = kept.get(("SAELens", one.name, method, seed, rows))
            if run is None:
                run = saelens(python, one, method, seed, rows)
                add_run(file, run)
            found.append(run)
    return found


def results(runs: Sequence[Run]) -> list[Result]:
    """The means of every line, and the seeds one by one for the two headline scores."""
    found: list[Result] = []
    for line in lines(runs):
        one = TIERS[line.tier]
        group = [r for r in runs if (r.tier, r.method, r.trainer) == (line.tier, line.method, line.trainer)]
        on = f"{one.about}; {group[0].rows:,} rows, mean of seeds {list(line.seeds)}; "
        name = f"{line.trainer} {line.tier} {line.method}"
        for key, mean in line.means.items():
            each = " ".join(f"{run.value(key):.4f}" for run in group) if key in ("mcc", "f1") else ""
            unit = "s" if key.endswith("seconds") else ""
            found.append(Result(f"{name}, {key}", round(mean, 5), unit, on + (f"{each}; " if each else "") + machine()))
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows: does it run?")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--peers", metavar="PYTHON", type=Path, default=INTEROP, help="a Python that has SAELens")
    parser.add_argument("--tier", action="append", help="which worlds; may be repeated")
    parser.add_argument("--method", action="append", help="which methods; may be repeated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file of the runs")
    o = parser.parse_args()
    torch.set_num_threads(1)
    has_peer = o.peers.is_file()
    if not has_peer:
        print(f"no SAELens at {o.peers}: ours alone (make interop, or --peers PYTHON)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        file, runs = o.out or Path(name, "runs.jsonl"), list[Run]()
        for tier in o.tier or [name for name in TIERS if name != "16k"]:
            one = TIERS[tier]
            methods = [m for m in one.methods if not o.method or m in o.method]
            rows = 50 * BATCH if o.quick else one.rows
            runs += benchmark([tier], range(o.seeds), methods, file=file, rows=rows)
            if has_peer and tier in PEERS_ON:
                runs += with_peers(o.peers, one, methods, o.seeds, rows, file)
        report(results(runs), o.json)


if __name__ == "__main__":
    main()
