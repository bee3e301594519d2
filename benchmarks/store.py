"""What a store costs: harvesting beside forward passes, bytes a token, writing and reading beside the disk itself.

Wanted: a harvest takes at most 1.1 times its forward passes; bytes a token within 2 % of 2 x width x sites; writing at
70 % and shuffled reading at 80 % of sequential I/O on the same disk in the same run, cold cache; 600,000 tokens read a
CPU-second at width 640; three readers together cost the disk about one.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Result, machine, report
from capture import SHAPE_270M, SHAPE_QUICK, build

from gemscope.activations.finishing import finish
from gemscope.activations.harvesting import HarvestProgress, harvest_to
from gemscope.activations.pieces import PieceBatch, batches, encode, row_tokens
from gemscope.activations.plan import HarvestConfig, Plan, SitePlan, make_plan
from gemscope.activations.sources import Documents
from gemscope.activations.statistics import none_yet
from gemscope.activations.store import Store
from gemscope.activations.units import Bucket, UnitFiles, bucket_pieces
from gemscope.core.files import write_json
from gemscope.core.sites import Site
from gemscope.models.gemma import Gemma
from gemscope.suites.corpus import GeneratedText

WIDTH = 640
CHUNK = 16 << 20


def harvesting(
    gemma: Gemma, texts: list[str], units: int, batch_tokens: int, rounds: int, label: str, folder: Path
) -> list[Result]:
    """A harvest of resid_post in every layer, from the first forward pass to the last synced file, beside the forward
    passes of the very same batches; and what comes before the first one.
    """
    sites = gemma.every_layer("resid_post")
    row_bytes = 2 * sum(gemma.width(site) for site in sites)
    rows = int(encode(gemma, texts, 0, 1024).content.sum())
    sizes = {"unit_rows": rows // units, "bucket_rows": rows // units * 4 // 3}
    config = HarvestConfig(tuple(map(str, sites)), batch_tokens=batch_tokens, **sizes)
    source, out = Documents(texts), folder / "harvest"
    plan = make_plan(gemma, source, config)  # once, whatever the size of the harvest
    ready = [one for unit in range(plan.units) for one in unit_batches(gemma, texts, plan, unit)]
    seen: dict[str, list[float]] = {"forward": [], "units": [], "whole": []}

    def forward() -> None:
        begun = time.perf_counter()
        for one in ready:
            gemma.capture(one.batch, sites)
        seen["forward"].append(time.perf_counter() - begun)

    def harvest() -> None:
        shutil.rmtree(out, ignore_errors=True)
        write_json(out / "plan.json", plan.as_dict())
        reports: list[HarvestProgress] = []
        begun = time.perf_counter()
        harvest_to(out, gemma, source, config, progress=reports.append)
        seen["whole"].append(time.perf_counter() - begun)
        seen["units"].append(reports[-1].seconds)

    for round_ in range(rounds + 1):  # the first one warms up; which comes first changes from round to round
        for work in (forward, harvest) if round_ % 2 else (harvest, forward):
            work()
    time_of = {name: np.array(values[1:]) for name, values in seen.items()}
    times = {name: float(np.median(values)) for name, values in time_of.items()}
    size = sum(path.stat().st_size for name in ("acts", "rows") for path in out.rglob(f"{name}/**/*.safetensors"))
    on = f"{label}, {len(sites)} sites, {rows} tokens in {units} units, {gemma.dtype}, median of {rounds}; {machine()}"
    ratios = time_of["units"] / time_of["forward"]
    fastest = float(time_of["units"].min() / time_of["forward"].min())
    every = " ".join(f"{ratio:.3f}" for ratio in ratios)
    return [
        Result(f"forward passes alone, {label}", rows / times["forward"], "tok/s", on),
        Result(f"harvest, {label}", rows / times["units"], "tok/s", on),
        Result(f"harvest / forward passes, {label}", float(np.median(ratios)), "ratio", f"{every}; {on}"),
        Result(f"fastest harvest / fastest forward passes, {label}", fastest, "ratio", on),
        Result(f"before the first forward pass, {label}", times["whole"] - times["units"], "s", on),
        Result(f"bytes a token / (2 x width x sites), {label}", size / rows / row_bytes, "ratio", on),
    ]


def unit_batches(gemma: Gemma, texts: list[str], plan: Plan, unit: int) -> Iterator[PieceBatch]:
    """What a harvest feeds the model for one unit."""
    start, stop = plan.range(unit)
    pieces = encode(gemma, texts[start:stop], start, int(plan.config["context"]))
    for chosen in bucket_pieces(pieces, plan.bucket_rows):
        yield from batches(gemma, pieces, chosen, int(plan.config["batch_tokens"]), plan.row_tokens)


def packing(gemma: Gemma, texts: list[str], batch_tokens: int, rounds: int, label: str) -> list[Result]:
    """Padding, batches and forward passes to the last block when each text has a row for itself, and when short ones
    share rows.
    """
    pieces, last = encode(gemma, texts, 0, 1024), gemma.every_layer("resid_post")[-1:]
    width = row_tokens(gemma.shape, 1024)
    ready = {
        name: list(batches(gemma, pieces, np.arange(len(pieces)), batch_tokens, packed))
        for name, packed in (("bucketed", None), ("packed", width))
    }
    seen: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds + 1):
        for name, all_ in ready.items():
            seen[name].append(
                timed(lambda all_=all_: [gemma.capture(one.batch, last)[last[0]].sum() for one in all_])[0]
            )
    tokens, results = len(pieces.ids), list[Result]()
    on = f"{label}, {len(texts)} texts, {tokens} tokens, rows of {width}, {gemma.dtype}, best of {rounds}; {machine()}"
    for name, all_ in ready.items():
        area = sum(one.batch.ids.numel() for one in all_)
        results += [
            Result(f"padding, {name}, {label}", 1 - tokens / area, "share", on),
            Result(f"tokens a batch, {name}, {label}", tokens / len(all_), "tokens", on),
            Result(f"forward passes, {name}, {label}", tokens / min(seen[name][1:]), "tok/s", on),
        ]
    return results


def made_up_plan(unit_rows: int, units: int) -> Plan:
    """One site of width 640; a document a row."""
    config = {
        "dtype": "bfloat16",
        "seed": 0,
        "row_tokens": None,
        "outlier_factor": 10.0,
        "drop_outliers": False,
        "context": 2,
    }
    sites = {Site("resid_post", 0): SitePlan(WIDTH, 1.0)}
    return Plan(config, sites, units * unit_rows, unit_rows, unit_rows, 1.0)


def made_up_bucket(plan: Plan, rows: int) -> Bucket:
    """Random rows."""
    bucket = Bucket.empty(plan, rows)
    for x in bucket.data.values():
        x.copy_(torch.randn(x.shape).to(x.dtype))
    bucket.rows = rows
    bucket.doc = bucket.pos = bucket.token = np.arange(rows, dtype=np.int32)
    bucket.statistics = {site: replace(none_yet(WIDTH), rows=rows) for site in plan.sites}
    return bucket


def write_store(folder: Path, plan: Plan, bucket: Bucket) -> None:
    """Units as a harvest writes them: checksums, sync in another thread, rename, record."""
    write_json(folder / "plan.json", plan.as_dict())
    with ThreadPoolExecutor(1) as syncing:
        done: list[Future[Any]] = []
        for unit in range(plan.units):
            files = UnitFiles(folder, plan, unit)
            files.append(bucket)
            done.append(syncing.submit(files.finish, 0))
        for one in done:
            one.result()


def write_plain(path: Path, parts: int, data: memoryview) -> None:
    """What dd would do: one file, large writes, one sync at the end."""
    with path.open("wb", buffering=0) as file:
        for _ in range(parts):
            for start in range(0, len(data), CHUNK):
                file.write(data[start : start + CHUNK])
        os.fsync(file.fileno())


def read_plain(paths: list[Path]) -> None:
    """What dd would do: one file after the other, in order, into one buffer."""
    buffer = bytearray(CHUNK)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def read_store(folder: Path, epoch: int = 0) -> int:
    """One epoch in batches of 4096; gives the rows."""
    store = Store.open(folder)
    return sum(len(batch[store.sites[0]]) for batch in store.batches(store.sites, 4096, 0, epoch))


def disk_bytes() -> int:
    """Bytes that this process has had fetched from the disk."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def together(folder: Path, readers: int) -> int:
    """Bytes that several processes reading at the same time have fetched from the disk in all."""

    def read(results: "multiprocessing.Queue[int]") -> None:
        torch.set_num_threads(1)
        before = disk_bytes()
        read_store(folder)
        results.put(disk_bytes() - before)

    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=read, args=(results,)) for _ in range(readers)]
    for process in processes:
        process.start()
    total = sum(results.get() for _ in processes)
    for process in processes:
        process.join()
    return total


def input_output(unit_rows: int, units: int, rounds: int, folder: Path) -> list[Result]:
    """Writing and reading beside sequential I/O, in turn; medians."""
    plan, out, plain = made_up_plan(unit_rows, units), folder / "store", folder / "plain"
    bucket = made_up_bucket(plan, unit_rows)
    data = next(iter(bucket.data.values())).view(torch.uint8).numpy().data.cast("B")
    size = units * unit_rows * 2 * WIDTH
    seen: dict[str, list[float]] = {}

    def note(name: str, work: Callable[[], object]) -> None:
        wall, cpu = timed(work)
        seen.setdefault(name, []).append(wall)
        seen.setdefault(f"{name} cpu", []).append(cpu)

    def remove() -> None:
        shutil.rmtree(out, ignore_errors=True)
        plain.unlink(missing_ok=True)

    for round_ in range(rounds + 1):  # the first one warms up; which comes first changes from round to round
        writes = {
            "plain write": lambda: write_plain(plain, units, data),
            "store write": lambda: write_store(out, plan, bucket),
        }
        for name in sorted(writes, reverse=round_ % 2 == 0):
            remove()
            note(name, writes[name])
        if not out.is_dir():
            write_store(out, plan, bucket)
        finish(out, plan)
        shards = sorted(out.rglob("acts/*/*.safetensors"))
        reads = {"plain read": partial(read_plain, shards), "store read": lambda: read_store(out)}
        for name in sorted(reads, reverse=round_ % 2 == 0):
            forget(folder)
            before = disk_bytes()
            note(name, reads[name])
            seen.setdefault(f"{name} disk", []).append((disk_bytes() - before) / size)
        note("warm", lambda: read_store(out))
        forget(folder)
        seen.setdefault("three", []).append(together(out, 3) / size)
    mid = {name: float(np.median(values[1:])) for name, values in seen.items()}

    def ratio(of: str, to: str) -> float:
        """Speed of one beside that of the other in the same round."""
        return float(np.median(np.divide(seen[to][1:], seen[of][1:])))

    rows = unit_rows * units
    on = f"{size / 1e9:.2f} GB in {units} shards, width {WIDTH}, bf16, median of {rounds}; {machine()}"
    return [
        Result("sequential write and sync", size / mid["plain write"] / 1e6, "MB/s", on),
        Result("store write and sync", size / mid["store write"] / 1e6, "MB/s", on),
        Result("store write / sequential write", ratio("store write", "plain write"), "ratio", on),
        Result("store write, tokens a CPU-second", rows / mid["store write cpu"], "tok/s", on),
        Result("sequential read, cold", size / mid["plain read"] / 1e6, "MB/s", on),
        Result("store read, shuffled, cold", size / mid["store read"] / 1e6, "MB/s", on),
        Result("store read / sequential read, cold", ratio("store read", "plain read"), "ratio", on),
        Result("store read, tokens a CPU-second, cold", rows / mid["store read cpu"], "tok/s", on),
        Result("store read, tokens a CPU-second, warm", rows / mid["warm cpu"], "tok/s", on),
        Result("bytes from the disk / bytes of the store, one reader", mid["store read disk"], "ratio", on),
        Result("bytes from the disk / bytes of the store, three readers", mid["three"], "ratio", on),
    ]


def saelens(python: str, rows: int, folder: Path) -> list[Result]:
    """The cached store of SAELens on the same disk, by the interpreter of an environment that has it."""
    script = Path(__file__).with_name("_store_peer.py")
    quiet = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    command = [python, str(script), str(folder), str(rows), str(WIDTH)]
    found = json.loads(subprocess.check_output(command, text=True, env=quiet).splitlines()[-1])
    on = f"{rows} rows, width {WIDTH}, float32 and synced, contexts of 128; {machine()}"
    name = f"SAELens {found['version']}"
    return [
        Result(f"{name} write", found["write"]["wall"], "tok/s", on),
        Result(f"{name} write, tokens a CPU-second", found["write"]["cpu"], "tok/s", on),
        Result(f"{name} read through its mixing buffer, cold", found["read"]["wall"], "tok/s", on),
        Result(f"{name} read through its mixing buffer, tokens a CPU-second", found["read"]["cpu"], "tok/s", on),
        Result(f"{name} bytes a token / (2 x width)", found["bytes"] / (2 * WIDTH), "ratio", on),
    ]


def main() -> None:
    """Run and print; the folder is made in the current one, whose disk is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds: does it run?")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--peers", metavar="PYTHON", help="measure SAELens' store too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".store-bench-") as name:
        folder = Path(name)
        report(input_output(*(20_000, 4, 2) if options.quick else (200_000, 16, 7), folder), options.json)
        if options.peers:
            report(saelens(options.peers, 20_000 if options.quick else 200_000, folder), options.json)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        shape = SHAPE_QUICK if options.quick else SHAPE_270M
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        random = build(shape, dtype, device)
        generator = torch.Generator().manual_seed(0)
        count = 16 if device.type == "cpu" else 1600
        words = torch.randint(2, shape["vocab_size"], (count, 255), generator=generator)
        texts = [" ".join(random.tokenizer.convert_ids_to_tokens(row.tolist())) for row in words]
        label = "tiny random Gemma 3" if options.quick else "random Gemma 3 270M"
        report(harvesting(random, texts, 4, 2048, 3, label, folder), options.json)
        mixed = [" ".join(text.split()[: 15 + 15 * i]) for i, text in enumerate(texts[:16])]
        report(packing(random, mixed, 2048, 2, label), options.json)
        microworld = Gemma.load("microworld-it")
        texts = list(GeneratedText(chat=True).read(0, 400 if options.quick else 4000))
        report(packing(microworld, texts[:500], 4096, 2, "microworld-it"), options.json)
        for threads in sorted({1, torch.get_num_threads()}, reverse=True):
            torch.set_num_threads(threads)
            label = "microworld-it" if threads > 1 else "microworld-it on one thread"
            report(harvesting(microworld, texts, 8, 4096, 8 if threads > 1 else 5, label, folder), options.json)


if __name__ == "__main__":
    main()
