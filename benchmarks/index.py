"""What an index costs: the pass beside reading and encoding alone, bytes and memory a latent, cost by their number.

Wanted at width 640: 16,384 latents over 1 M tokens of a store in at most 1.3 times the time of reading and encoding
alone; peak memory within the stated bound (a bucket, 14 KB a latent, 600 MB); under 1.2 KB a latent on disk beside the
tokens; seconds a latent that do not grow with the number of latents. Every number is of one run, on made-up rows.
"""

import resource
import shutil
import tempfile
import time
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


def read_and_encode(store: Store, loaded: Loaded) -> int:
    """What a pass cannot do without."""
    active = 0
    with torch.no_grad():
        for batch in store.batches([SITE], 4096):
            active += len(loaded.dictionary.encode_sparse(batch[SITE])[1])
    return active


def seconds(work: object) -> float:
    """Wall seconds of a call."""
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - started


def peak() -> int:
    """Most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def size(folder: Path, *, tokens: bool) -> int:
    """Bytes of the token store, or of everything else."""
    names = {"tokens.npy", "special.npy", "starts.npy", "docs.npy"}
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and (p.name in names) == tokens)


def passes(folder: Path, store: Store, latents: int) -> list[Result]:
    """The pass beside reading and encoding alone, and the files."""
    loaded, config, out = dictionary(latents), IndexConfig(), folder / "index"
    rows, on = StoreRows(store), f"{latents} latents, L0 {L0}, {store.rows} tokens, width {WIDTH}, bf16; {machine()}"
    alone = seconds(lambda: read_and_encode(store, loaded))
    before = peak()
    counting = seconds(lambda: count_units(out, rows, {"made_up": loaded}, config))
    most = peak()
    finishing = seconds(lambda: index(out, rows, {"made_up": loaded}, config))
    bucket = 2 * WIDTH * max(one.rows for one in store.shards)
    found = [
        Result(f"reading and encoding alone, {latents} latents", alone, "s", on),
        Result(f"pass, {latents} latents", counting, "s", on),
        Result(f"pass / reading and encoding alone, {latents} latents", counting / alone, "ratio", on),
        Result(f"files, nearest latents and partners, {latents} latents", finishing, "s", on),
        Result(f"pass, {latents} latents: over encoding, a latent", 1e3 * (counting - alone) / latents, "ms", on),
        Result(f"bytes a latent beside the tokens, {latents} latents", size(out, tokens=False) / latents, "B", on),
        Result(f"bytes a token, {latents} latents", size(out, tokens=True) / store.rows, "B", on),
        Result(f"peak memory before the pass, {latents} latents", before / 1e6, "MB", on),
        Result(f"peak memory of the pass, {latents} latents", most / 1e6, "MB", on),
        Result(f"stated bound over the former, {latents} latents", (bucket + 14e3 * latents + 600e6) / 1e6, "MB", on),
    ]
    shutil.rmtree(out)
    return found


def main() -> None:
    """Run and print; the folder is made in the current one."""
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".index-bench-") as name:
        folder = Path(name)
        small = write_store(folder / "small", 2, 16_384)
        for latents in (512,) if options.quick else (4096, 8192, 16_384, 32_768):
            report(passes(folder, small, latents), options.json)
        if not options.quick:
            report(passes(folder, write_store(folder / "store", 8, 131_072), 16_384), options.json)


if __name__ == "__main__":
    main()
