"""What it costs to open a dictionary: all of it, a hundred of its decoder rows, or its codes while it stays on disk.

Wanted: a 16k x 2560 SAE loads at 80 % or more of the rate at which the same disk hands over the same file, with a peak
of 1.1 times its bytes; a hundred decoder rows of a dictionary with 262k latents touch under 1 % of the file; a million
latents encode within 1 GiB of memory, Python and torch included. Every cold read begins with the file's pages dropped
from the system's cache. SAELens does the same beside it where ``make interop`` installed it.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from _common import Result, arguments, machine, report
from safetensors.torch import load_file

from gemscope.artifacts import native
from gemscope.artifacts.config import DictionaryConfig
from gemscope.artifacts.lazy import LazyDictionary
from gemscope.core.files import write_json
from gemscope.core.sites import Site
from gemscope.core.tensor_files import CHUNK, TensorFile
from gemscope.dictionaries.activation import Activation

ROWS = 64
"""Activations that are encoded against the streamed dictionary."""

PEER = Path(__file__).parents[1] / ".venv-interop/bin/python"
"""An environment with SAELens in it."""

THEIRS = {
    "architecture": "jumprelu",
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": False,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"hook_name": "blocks.0.hook_resid_post", "model_name": "random"},
}
"""``cfg.json`` without the sizes."""


def write(folder: Path, d_in: int, d_sae: int) -> Path:
    """A random SAE in the native format, and the same in SAELens' beside it as ``FOLDER/saelens``."""
    config = DictionaryConfig(
        kind="sae",
        activation=Activation("jumprelu"),
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        dtype="float32",
        reads=(Site("resid_post", 0),),
        writes=(Site("resid_post", 0),),
        model="random",
    )
    folder.mkdir(parents=True)
    write_json(folder / native.CONFIG_FILE, native.as_json(config))
    shapes = native.tensor_shapes(config)
    write_weights(folder / native.WEIGHTS_FILE, shapes)
    if PEER.exists():
        (folder / "saelens").mkdir()
        write_json(folder / "saelens/cfg.json", THEIRS | {"d_in": d_in, "d_sae": d_sae})
        renamed = {"W_enc" if n == "W_enc_T" else n: s[::-1] if n == "W_enc_T" else s for n, s in shapes.items()}
        write_weights(folder / "saelens/sae_weights.safetensors", renamed)
    return folder


def write_weights(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Noise of the right size, block by block: it need not fit in memory. Every threshold is 14."""
    header, start = {}, 0
    for name, shape in shapes.items():
        stop = start + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) / math.sqrt(shapes["W_dec"][1])
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            left = math.prod(shape)
            values = torch.full((1 << 22,), 14.0) if name == "threshold" else noise
            while left:
                part = values[: min(left, len(values))]
                file.write(part.numpy().tobytes())
                left -= len(part)
        file.flush()
        os.fsync(file.fileno())


def drop(folder: Path) -> None:
    """Let the system forget what it has cached of the weights."""
    with TensorFile(folder / native.WEIGHTS_FILE) as file:
        file.forget()


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def sequential(path: Path) -> None:
    """The file from its first byte to its last, into one buffer again and again: what the disk can give."""
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(buffer):
            pass


def peer(path: Path) -> None:
    """safetensors' own loader, its memory map touched as a first use would."""
    for tensor in load_file(path).values():
        tensor.sum()


def loading(folder: Path, rounds: int, label: str) -> list[Result]:
    """Rates of the whole file: cold, in turns, the best of each; a busy neighbour only makes them slower."""
    path = folder / native.WEIGHTS_FILE
    size = path.stat().st_size
    modes: dict[str, Callable[[], object]] = {
        "disk, sequential": lambda: sequential(path),
        "native.load": lambda: native.load(folder),
        "safetensors load_file and one look": lambda: peer(path),
    }
    results: list[Result] = []
    for state in ("cold", "cached"):
        taken: dict[str, list[float]] = {name: [] for name in modes}
        for _ in range(rounds):
            for name, run in modes.items():
                if state == "cold":
                    drop(folder)
                taken[name].append(seconds(run))
        best = {name: min(some) for name, some in taken.items()}
        ratios = [d / n for d, n in zip(taken["disk, sequential"], taken["native.load"], strict=True)]
        on = f"{label}, {size / 1e6:.0f} MB, {state}, {{}} of {rounds}; {machine()}"
        results += [
            Result(f"{name}, {state}", size / one / 1e6, "MB/s", on.format("best")) for name, one in best.items()
        ]
        results += [
            Result(
                f"native.load / disk, {state}",
                best["disk, sequential"] / best["native.load"],
                "ratio",
                on.format("best"),
            ),
            Result(f"native.load / disk, {state}, median", statistics.median(ratios), "ratio", on.format("median")),
        ]
    found = json.loads(subprocess.check_output([sys.executable, __file__, "--load", str(folder)], text=True))
    on = f"{label}, {size / 1e6:.0f} MB, a process of its own; {machine()}"
    results.append(Result("native.load, peak memory / file", found["grown"] / size, "ratio", on))
    if theirs := saelens("load", folder):
        cold = on.replace("a process", "cold, a process")
        results.append(Result("SAELens load_from_disk and one look", size / theirs["seconds"] / 1e6, "MB/s", cold))
        grown = (theirs["peak"] - theirs["before"]) / size
        results.append(Result("SAELens load_from_disk, peak memory / file", grown, "ratio", on))
    return results


def memory(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def saelens(task: str, folder: Path) -> dict[str, float]:
    """What ``_saelens.py`` measures; nothing where SAELens is not installed, which is said once."""
    if not PEER.exists():
        print(f"no SAELens beside it ({task}): make interop installs it", file=sys.stderr)
        return {}
    script = Path(__file__).with_name("_saelens.py")
    command = [str(PEER), str(script), task, str(folder / "saelens"), str(ROWS if task == "encode" else 100)]
    return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])


def storage_bytes() -> int:
    """Bytes that this process made the disk hand over."""
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


def ranges(folder: Path, label: str) -> list[Result]:
    """A hundred random decoder rows, cold."""
    latents = torch.randint(0, native.read_config(folder).d_sae, (100,), generator=torch.Generator().manual_seed(1))
    drop(folder)
    before = storage_bytes()
    start = time.perf_counter()
    lazy = native.open_lazy(folder)
    lazy.decoder_rows(latents)
    taken = time.perf_counter() - start
    touched, size = storage_bytes() - before, lazy.nbytes
    on = f"{label}, {size / 1e6:.0f} MB, cold, opening included; {machine()}"
    theirs = saelens("rows", folder)
    beside = [Result("100 decoder rows, SAELens, which loads all", 1e3 * theirs["seconds"], "ms", on)] if theirs else []
    return [
        Result("100 decoder rows", 1e3 * taken, "ms", on),
        Result("100 decoder rows, read by the program", 100 * lazy.bytes_read / size, "%", on),
        Result("100 decoder rows, handed over by the disk", 100 * touched / size, "%", on),
        *beside,
    ]


def stream(folder: Path) -> dict[str, float]:
    """Encode ``ROWS`` rows against the dictionary on disk; run in a process of its own, for its peak of memory."""
    lazy: LazyDictionary = native.open_lazy(folder)
    x = 4 * torch.randn(ROWS, lazy.config.d_in, generator=torch.Generator().manual_seed(2))
    drop(folder)
    start = time.perf_counter()
    support, _ = lazy.encode_streamed(x)
    taken = time.perf_counter() - start
    return {"seconds": taken, "peak": memory("VmHWM"), "l0": len(support.rows) / ROWS, "read": lazy.bytes_read}


def load_once(folder: Path) -> dict[str, float]:
    """What memory grows by at most while the dictionary is loaded; run in a process of its own."""
    before = memory("VmRSS")
    loaded = native.load(folder)
    return {"grown": memory("VmHWM") - before, "d_sae": loaded.dictionary.d_sae}


def streaming(folder: Path, label: str) -> list[Result]:
    """What ``stream`` measures, from a fresh process."""
    found = json.loads(subprocess.check_output([sys.executable, __file__, "--stream", str(folder)], text=True))
    on = f"{label}, {ROWS} rows at L0 {found['l0']:.0f}, cold; {machine()}"
    theirs = saelens("encode", folder)
    beside = (
        []
        if not theirs
        else [
            Result("SAELens, load and encode", theirs["seconds"], "s", on),
            Result("SAELens, load and encode, peak memory of the process", theirs["peak"] / 2**20, "MiB", on),
        ]
    )
    return [
        Result("streamed encode", found["seconds"], "s", on),
        Result("streamed encode, rate", found["read"] / found["seconds"] / 1e6, "MB/s", on),
        Result("streamed encode, peak memory of the process", found["peak"] / 2**20, "MiB", on),
        *beside,
    ]


def main() -> None:
    """Run and print."""
    alone = {"--stream": stream, "--load": load_once}
    if len(sys.argv) == 3 and sys.argv[1] in alone:
        print(json.dumps(alone[sys.argv[1]](Path(sys.argv[2]))))
        return
    options = arguments(__doc__ or "")
    shapes = (
        [(64, 1 << 10), (64, 1 << 14), (64, 1 << 16)]
        if options.quick
        else [(2560, 1 << 14), (640, 1 << 18), (640, 1 << 20)]
    )
    labels = [f"random SAE of {d_sae} latents, d_in {d_in}, fp32" for d_in, d_sae in shapes]
    with tempfile.TemporaryDirectory(dir=os.environ.get("GEMSCOPE_BENCH_DIR")) as name:
        for number, measure in enumerate((lambda f, on: loading(f, 2 if options.quick else 15, on), ranges, streaming)):
            folder = write(Path(name) / str(number), *shapes[number])
            report(measure(folder, labels[number]), options.json)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
