"""What an index costs: the pass beside reading and encoding alone, bytes and memory a latent, cost by their number.

Wanted at width 640: 16,384 latents over 1 M tokens of a store in at most 1.3 times the time of reading and encoding
alone; peak memory within the stated bound (a bucket, 14 KB a latent, 600 MB); under 1.2 KB a latent on disk beside the
tokens; seconds a latent that do not grow with the number of latents. Every number is of one run, on made-up rows.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _activations import rows as mixtures
from _common import Result, arguments, machine, report

from gemscope.activations.finishing import finish
from gemscope.activations.plan import Plan, SitePlan
from gemscope.activations.statistics import none_yet
from gemscope.activations.store import Store
from gemscope.activations.units import Bucket, UnitFiles
from gemscope.artifacts.config import DictionaryConfig, Loaded
from gemscope.core.files import write_json
from gemscope.core.sites import Site
from gemscope.dictionaries.sae import SAE
from gemscope.features.blocks import StoreRows
from gemscope.features.config import IndexConfig
from gemscope.features.index import index
from gemscope.features.passing import count_units

WIDTH, DOCUMENT, L0 = 640, 128, 64
SITE = Site("resid_post", 12)


def write_store(folder: Path, units: int, unit_rows: int) -> Store:
    """Documents of 128 tokens whose rows are mixtures of 2048 directions; a unit is one shuffled bucket."""
    config = {"dtype": "bfloat16", "seed": 0, "outlier_factor": 10.0, "drop_outliers": False, "context": 1024}
    documents = unit_rows // DOCUMENT
    plan = Plan(config, {SITE: SitePlan(WIDTH, 1.0)}, units * documents, documents, unit_rows, float(DOCUMENT))
    write_json(folder / "plan.json", plan.as_dict())
    x = mixtures(unit_rows, WIDTH).bfloat16()
    random = np.random.default_rng(0)
    for unit in range(units):
        bucket, order = Bucket.empty(plan, unit_rows), random.permutation(unit_rows)
        bucket.data[SITE].copy_(x.roll(unit * 7919, 0)[torch.from_numpy(order)])
        bucket.rows, bucket.statistics = unit_rows, {SITE: none_yet(WIDTH)}
        bucket.doc = (order // DOCUMENT + unit * documents).astype(np.int32)
        bucket.pos = (order % DOCUMENT + 1).astype(np.int32)
        bucket.token = random.integers(0, 6000, unit_rows).astype(np.int32)
        files = UnitFiles(folder, plan, unit)
        files.append(bucket)
        files.finish(0)
    finish(folder, plan)
    return Store.open(folder)


def dictionary(latents: int) -> Loaded:
    """A JumpReLU SAE with random unit directions, of which 64 are above their threshold in the mean."""
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(WIDTH, latents, generator=generator)
    W /= W.norm(dim=0)
    few = mixtures(2048, WIDTH) @ W
    threshold = few.view(-1).kthvalue(int(few.numel() * (1 - L0 / latents))).values
    sae = SAE(W, torch.zeros(latents), W.T.contiguous(), torch.zeros(WIDTH), torch.full((latents,), float(threshold)))
    return Loaded(sae, DictionaryConfig.of(sae, SITE, model="made-up"))


def read_and_encode(store: Store, loaded: Loaded) -> None:
    """What a pass cannot do without, for the first unit."""
    first = replace(store, shards=store.shards[:1])
    with torch.no_grad():
        for batch in first.batches([SITE], 8192):
            loaded.dictionary.encode_sparse(batch[SITE])


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of a call, which neighbours on a busy machine change less than the clock's."""
    started = time.process_time()
    work()
    return time.process_time() - started


def forget_peak() -> None:
    """Count the peak of this process's memory anew from here."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most since the peak was forgotten."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def size(folder: Path, *, tokens: bool) -> int:
    """Bytes of the token store, or of everything else."""
    names = {"tokens.npy", "special.npy", "starts.npy", "docs.npy"}
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and (p.name in names) == tokens)


def passes(folder: Path, store: Store, latents: int, as_json: bool) -> None:
    """The pass beside reading and encoding alone, printed unit by unit, and the files."""
    loaded, config, out = dictionary(latents), IndexConfig(), folder / "index"
    rows, unit = StoreRows(store), store.shards[0].rows
    on = f"{latents} latents, L0 {L0}, {{}} tokens, width {WIDTH}, bf16, CPU seconds; {machine()}"
    alone = seconds(lambda: read_and_encode(store, loaded)) / unit
    forget_peak()
    before, started = memory("VmRSS"), time.process_time()

    def progress(done: int, total: int) -> None:
        if done % unit == 0 and done < total:
            ratio(done, time.process_time() - started)

    def ratio(done: int, spent: float) -> None:
        name = f"pass / reading and encoding alone, {latents} latents, {done} tokens"
        report([Result(name, spent / (alone * done), "ratio", on.format(done))], as_json)

    counting = seconds(lambda: count_units(out, rows, {"made_up": loaded}, config, progress=progress))
    ratio(store.rows, counting)
    most, over = memory("VmHWM"), 1e6 * (counting - alone * store.rows) / latents
    finishing = seconds(lambda: index(out, rows, {"made_up": loaded}, config))
    bound = 2 * WIDTH * unit + 14e3 * latents + 600e6
    on = on.format(store.rows)
    found = [
        Result(f"reading and encoding alone, {latents} latents", 1e6 * alone, "us/tok", on),
        Result(f"pass over encoding, a latent, {latents} latents", over, "us", on),
        Result(f"files, nearest latents and partners, {latents} latents", finishing, "s", on),
        Result(f"bytes a latent beside the tokens, {latents} latents", size(out, tokens=False) / latents, "B", on),
        Result(f"bytes a token, {latents} latents", size(out, tokens=True) / store.rows, "B", on),
        Result(f"peak memory over that before the pass, {latents} latents", (most - before) / 1e6, "MB", on),
        Result(f"its stated bound, {latents} latents", bound / 1e6, "MB", on),
    ]
    report(found, as_json)
    shutil.rmtree(out)


def main() -> None:
    """Run and print; the folder is made in the current one."""
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".index-bench-") as name:
        folder = Path(name)
        small = write_store(folder / "small", 2, 16_384)
        for latents in (512,) if options.quick else (2048, 4096, 8192):
            passes(folder, small, latents, options.json)
        if not options.quick:
            passes(folder, write_store(folder / "store", 16, 65_536), 16_384, options.json)


if __name__ == "__main__":
    main()
