"""What every benchmark shares: interleaved timing, one JSON object a line, and the machine it ran on."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
import transformers


@dataclass(frozen=True)
class Result:
    """One number."""

    name: str
    value: float
    unit: str
    measured_on: str
    """What was run, and on which machine."""


def arguments(description: str) -> argparse.Namespace:
    """The two flags of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds: does it run?")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser.parse_args()


def machine() -> str:
    """Processor, threads and versions."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{accelerator}, {threads}, torch {torch.__version__}, transformers {transformers.__version__}"


def interleaved(modes: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least wall seconds of each mode; every round runs all modes, so that a busy moment hits them alike."""
    best = dict.fromkeys(modes, float("inf"))
    for round_ in range(rounds + 1):
        for name, run in modes.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            if round_ > 0:  # the first round warms up
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def report(results: list[Result], as_json: bool) -> None:
    """Print the results, as JSON lines or as a table."""
    for result in results:
        if as_json:
            print(json.dumps(asdict(result)), flush=True)
        else:
            print(f"{result.name:58s} {result.value:10.4g} {result.unit:6s} {result.measured_on}", flush=True)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
