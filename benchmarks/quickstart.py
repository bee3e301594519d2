"""What the quickstart takes and gives: seconds of each stage, and the measures of each layer's dictionary.

Runs on a built-in microworld model; --quick takes a tenth of the tokens and steps.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from _common import Result, arguments, machine, report

from gemscope.suites.config import QuickstartConfig
from gemscope.suites.quickstart import StageProgress, quickstart


class Clock:
    """Notes when each stage was first and last heard of."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def __call__(self, at: StageProgress) -> None:
        now = time.perf_counter()
        self.seen.setdefault(at.stage, [now, now])[1] = now


def measure(model: str, config: QuickstartConfig) -> list[Result]:
    """Build a suite in a temporary folder."""
    clock, started = Clock(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        suite = quickstart(model, Path(folder) / "suite", config, report=clock)
        total = time.perf_counter() - started
        evaluations = [suite.evaluation(site) for site in suite.sites]
    on = f"{model}, {config.tokens} tokens, {config.d_sae} latents, {config.steps} steps; {machine()}"
    results = [Result("quickstart", total, "s", on)]
    results += [Result(f"stage {name}", end - start, "s", on) for name, (start, end) in clock.seen.items()]
    for found in evaluations:
        fidelity, concepts = found.fidelity, found.concepts
        numbers = {
            "L0": fidelity.l0,
            "L0 / target": fidelity.l0 / config.target_l0,
            "FVU": fidelity.fvu,
            "delta loss": found.loss.delta_loss,
            "dead fraction": fidelity.dead_fraction,
        }
        if concepts is not None:
            for name, (found_, of) in (("concepts", concepts.found), ("passages", concepts.found_passages)):
                numbers |= {f"{name} with AUROC at least 0.9": found_, f"{name} measured": of}
        units = {"delta loss": "nats"}
        results += [Result(f"{found.site} {name}", value, units.get(name, ""), on) for name, value in numbers.items()]
    return results


def main() -> None:
    """Run and print."""
    options = arguments(__doc__ or "")
    config = QuickstartConfig()
    if options.quick:
        config = replace(
            config, tokens=config.tokens // 10, heldout_tokens=4000, splice_tokens=1000, steps=config.steps // 10
        )
    for model in ("microworld-it",) if options.quick else ("microworld-it", "microworld-pt"):
        report(measure(model, config), options.json)


if __name__ == "__main__":
    main()
