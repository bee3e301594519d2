"""What a store costs: harvesting beside forward passes, bytes a token, writing and reading beside the disk itself.

Wanted: a harvest takes at most 1.1 times its forward passes; bytes a token within 2 % of 2 x width x sites; writing at
70 % and shuffled reading at 80 % of sequential I/O on the same disk in the same run, cold cache; 600,000 tokens read a
CPU-second at width 640; three readers together cost the disk about one.
"""

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _common import Result, arguments, interleaved, machine, report
from capture import SHAPE_270M, SHAPE_QUICK, build

from gemscope.activations.finishing import finish
from gemscope.activations.harvesting import harvest_to
from gemscope.activations.pieces import batches, encode
from gemscope.activations.plan import HarvestConfig, Plan, SitePlan
from gemscope.activations.sources import Documents
from gemscope.activations.statistics import none_yet
from gemscope.activations.store import Store
from gemscope.activations.units import Bucket, UnitFiles
from gemscope.core.files import write_json
from gemscope.core.sites import Site
from gemscope.models.gemma import Gemma
from gemscope.suites.corpus import GeneratedText

WIDTH = 640
CHUNK = 16 << 20


def harvesting(
    gemma: Gemma, texts: list[str], batch_tokens: int, rounds: int, label: str, folder: Path
) -> list[Result]:
    """A harvest of resid_post in every layer, text to synced files, beside the forward passes of the same batches."""
    sites = gemma.every_layer("resid_post")
    row_bytes = 2 * sum(gemma.width(site) for site in sites)
    pieces = encode(gemma, texts, 0, 1024)
    rows = int(pieces.content.sum())
    config = HarvestConfig(tuple(map(str, sites)), batch_tokens=batch_tokens, bucket_rows=rows, unit_rows=rows // 4)
    ready = list(batches(gemma, pieces, np.arange(len(pieces)), batch_tokens))
    source, out = Documents(texts), folder / "harvest"
    harvest_to(out, gemma, source, config)  # the plan is made once, whatever the size of the harvest
    plan = (out / "plan.json").read_bytes()

    def forward() -> None:
        for one in ready:
            gemma.capture(one.batch, sites)

    def harvest() -> None:
        shutil.rmtree(out)
        out.mkdir()
        (out / "plan.json").write_bytes(plan)
        harvest_to(out, gemma, source, config)

    times = interleaved({"forward": forward, "harvest": harvest}, rounds)
    size = sum(path.stat().st_size for name in ("acts", "rows") for path in out.rglob(f"{name}/**/*.safetensors"))
    on = f"{label}, {len(sites)} sites, {rows} tokens, {gemma.dtype}, best of {rounds}; {machine()}"
    return [
        Result(f"forward passes alone, {label}", rows / times["forward"], "tok/s", on),
        Result(f"harvest, {label}", rows / times["harvest"], "tok/s", on),
        Result(f"harvest / forward passes, {label}", times["harvest"] / times["forward"], "ratio", on),
        Result(f"bytes a token / (2 x width x sites), {label}", size / rows / row_bytes, "ratio", on),
    ]


def made_up_plan(unit_rows: int, units: int) -> Plan:
    """One site of width 640; a document a row."""
    config = {"dtype": "bfloat16", "seed": 0, "outlier_factor": 10.0, "drop_outliers": False, "context": 2}
    sites = {Site("resid_post", 0): SitePlan(WIDTH, 1.0)}
    return Plan(config, sites, units * unit_rows, unit_rows, unit_rows, 1.0)


def write_store(folder: Path, plan: Plan, bucket: Bucket) -> None:
    """Units as a harvest writes them: checksums, sync, rename, record."""
    write_json(folder / "plan.json", plan.as_dict())
    for unit in range(plan.units):
        files = UnitFiles(folder, plan, unit)
        files.append(bucket)
        files.finish(0)


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
    bucket = Bucket.empty(plan, unit_rows)
    for x in bucket.data.values():
        x.copy_(torch.randn(x.shape).to(x.dtype))
    bucket.rows, numbers = unit_rows, np.arange(unit_rows, dtype=np.int32)
    bucket.doc = bucket.pos = bucket.token = numbers
    bucket.statistics = {site: replace(none_yet(WIDTH), rows=unit_rows) for site in plan.sites}
    data = next(iter(bucket.data.values())).view(torch.uint8).numpy().data.cast("B")
    size = units * unit_rows * 2 * WIDTH
    seen: dict[str, list[float]] = {}
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        plain.unlink(missing_ok=True)
        seen.setdefault("plain write", []).append(timed(lambda: write_plain(plain, units, data))[0])
        seen.setdefault("store write", []).append(timed(lambda: write_store(out, plan, bucket))[0])
        finish(out, plan)
        shards = sorted(out.rglob("acts/*/*.safetensors"))
        forget(folder)
        seen.setdefault("plain read", []).append(timed(partial(read_plain, shards))[0])
        forget(folder)
        before = disk_bytes()
        wall, cpu = timed(lambda: read_store(out))
        seen.setdefault("store read", []).append(wall)
        seen.setdefault("store read cpu", []).append(cpu)
        seen.setdefault("amplification", []).append((disk_bytes() - before) / size)
        seen.setdefault("warm cpu", []).append(timed(lambda: read_store(out))[1])
        forget(folder)
        seen.setdefault("three", []).append(together(out, 3) / size)
    mid = {name: float(np.median(values)) for name, values in seen.items()}
    rows = unit_rows * units
    on = f"{size / 1e9:.2f} GB in {units} shards, width {WIDTH}, bf16, median of {rounds}; {machine()}"
    return [
        Result("sequential write and sync", size / mid["plain write"] / 1e6, "MB/s", on),
        Result("store write and sync", size / mid["store write"] / 1e6, "MB/s", on),
        Result("store write / sequential write", mid["plain write"] / mid["store write"], "ratio", on),
        Result("sequential read, cold", size / mid["plain read"] / 1e6, "MB/s", on),
        Result("store read, shuffled, cold", size / mid["store read"] / 1e6, "MB/s", on),
        Result("store read / sequential read, cold", mid["plain read"] / mid["store read"], "ratio", on),
        Result("tokens a CPU-second, cold", rows / mid["store read cpu"], "tok/s", on),
        Result("tokens a CPU-second, warm", rows / mid["warm cpu"], "tok/s", on),
        Result("bytes from the disk / bytes of the store, one reader", mid["amplification"], "ratio", on),
        Result("bytes from the disk / bytes of the store, three readers", mid["three"], "ratio", on),
    ]


def main() -> None:
    """Run and print; the folder is made in the current one, whose disk is measured."""
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".store-bench-") as name:
        folder = Path(name)
        report(input_output(*(20_000, 4, 2) if options.quick else (200_000, 8, 5), folder), options.json)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        shape = SHAPE_QUICK if options.quick else SHAPE_270M
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        random = build(shape, dtype, device)
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(2, shape["vocab_size"], (8 if device.type == "cpu" else 800, 255), generator=generator)
        texts = ["".join(random.tokenizer.convert_ids_to_tokens(row.tolist())) for row in words]
        del words
        label = "tiny random Gemma 3" if options.quick else "random Gemma 3 270M"
        report(harvesting(random, texts, 2048, 3, label, folder), options.json)
        microworld = Gemma.load("microworld-it")
        count = 400 if options.quick else 4000
        texts = list(GeneratedText(chat=True).read(0, count))
        report(harvesting(microworld, texts, 4096, 3, "microworld-it", folder), options.json)


if __name__ == "__main__":
    main()
