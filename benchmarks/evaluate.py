"""What it costs to evaluate 30 dictionaries of one model: one pass of the model serves all of them.

Printed: seconds of one pass that only captures, of the 30 encodings (and decodings) of its rows alone, of the reading
pass of ``evaluate`` with everything that it sums, and their ratio. Then the passes for the losses, which cannot be
shared: one for each dictionary, and their time against as many plain passes. With --peers PYTHON SAEBench's core
evaluation of one of them a layer, on as many tokens in rows of 128, each dictionary by itself as SAEBench does it; the
loss of the model that it is given must be ours.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Result, machine, report

import gemscope
from gemscope.activations.positions import bucketed, content_mask
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.sae import SAE
from gemscope.evaluation.evaluate import EvaluateConfig, read
from gemscope.evaluation.splice import splice_losses
from gemscope.evaluation.subject import Subject
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Batch, Tokens
from gemscope.suites.corpus import heldout_text

DICTIONARIES, L0 = 30, 32.0
DATA = Path(gemscope.__file__).parent / "data"


def subjects(gemma: Gemma, d_sae: int, rows: dict[Site, torch.Tensor]) -> list[Subject]:
    """Random SAEs of an L0 of 32, in turn at every layer's residual stream."""
    found: list[Subject] = []
    for i in range(DICTIONARIES):
        site = Site("resid_post", i % gemma.shape.n_layers)
        generator = torch.Generator().manual_seed(i)
        W = torch.randn(d_sae, gemma.width(site), generator=generator)
        W /= W.norm(dim=1, keepdim=True)
        x = rows[site][:2000]
        center = x.mean(0)
        pre_acts = (x - center) @ W.T
        floor = float(pre_acts.flatten().topk(int(L0 * len(x))).values[-1])
        threshold = torch.full((d_sae,), floor)
        one = SAE(W.T.contiguous(), -(W @ center), W, center, threshold, activation=Activation("jumprelu"))
        found.append(Subject(str(i), one, (site,), (site,)))
    return found


def seconds(run: Callable[[], object], rounds: int) -> float:
    """The least of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


CONTEXT, ROWS = 128, 16


@torch.no_grad()
def saebench(
    python: str, gemma: Gemma, items: Sequence[Tokens], loss_items: int, some: Sequence[Subject]
) -> tuple[str, list[float]]:
    """SAEBench's version, and its seconds for each dictionary, by itself, on as many tokens; ValueError if its model is
    another.
    """

    def rows(of: Sequence[Tokens]) -> torch.Tensor:
        ids = torch.cat([item.ids for item in of])
        return ids[: len(ids) // (CONTEXT * ROWS) * CONTEXT * ROWS].view(-1, CONTEXT)

    tokens, loss_rows = rows(items), len(rows(items[:loss_items]))
    task: dict[str, Any] = {"tokens": tokens.numpy(), "loss_rows": np.array(loss_rows)}
    task["layers"] = np.array([subject.reads[0].layer for subject in some])
    for i, subject in enumerate(some):
        task |= {f"{i}.{name}": weight.numpy() for name, weight in subject.dictionary.state_dict().items()}
    with tempfile.TemporaryDirectory() as name:
        np.savez(Path(name, "task.npz"), **task)
        command = [python, Path(__file__).with_name("_evaluate_saebench.py"), DATA / gemma.name, name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        out = json.loads(Path(name, "out.json").read_text("utf-8"))
    own: list[torch.Tensor] = []
    for part in tokens[:loss_rows].split(ROWS):
        logits = gemma.logits(Batch(part, torch.ones_like(part, dtype=torch.bool), (), "right"))
        own.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()))
    theirs = out["measures"][0]["model_performance_preservation"]["ce_loss_without_sae"]
    if abs(theirs - float(torch.stack(own).mean())) > 1e-3:
        raise ValueError(f"the converted model's loss is {theirs}, ours {float(torch.stack(own).mean())}")
    return out["version"], out["seconds"]


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few tokens and latents: does it run?")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--peers", metavar="PYTHON", help="run SAEBench's core evaluation too")
    options = parser.parse_args()
    tokens, d_sae, rounds = (2500, 256, 1) if options.quick else (20_000, 1024, 3)
    torch.set_num_threads(1)
    gemma = Gemma.load("microworld-it", device="cpu")
    items = heldout_text(gemma, tokens, 0).items
    sites = gemma.every_layer("resid_post")
    config = EvaluateConfig(batch_tokens=2048, controls=False, probes=False)

    def passing() -> dict[Site, list[torch.Tensor]]:
        parts: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
        for _, batch in bucketed(gemma, items, config.batch_tokens):
            seen, mask = gemma.capture(batch, sites), content_mask(batch)
            for site in sites:
                parts[site].append(seen[site][mask])
        return parts

    parts = passing()
    several = subjects(gemma, d_sae, {site: torch.cat(part) for site, part in parts.items()})

    def encoding(decode: bool) -> None:
        for subject in several:
            for rows in parts[subject.reads[0]]:
                codes = subject.codes(rows[:, None])
                if decode:
                    subject.reconstruct(rows[:, None], *codes)

    one_pass = seconds(passing, rounds)
    encodes = seconds(lambda: encoding(False), rounds)
    both = seconds(lambda: encoding(True), rounds)
    reading = seconds(lambda: read(gemma, several, items, None, config, lambda *_: None), rounds)
    means = {site: torch.cat(parts[site]).mean(0) for site in sites}
    some = items[: len(items) // 8]
    plain = seconds(lambda: [gemma.logits(batch) for _, batch in bucketed(gemma, some, config.batch_tokens)], rounds)
    losses = seconds(lambda: splice_losses(gemma, several, means, some, batch_tokens=config.batch_tokens), 1)
    passes = 1 + len(several) + 2 * len(sites)
    where = f"microworld-it, {tokens} tokens, {DICTIONARIES} SAEs of {d_sae} latents, L0 {L0:g}; {machine()}"
    report(
        [
            Result("evaluate: one pass of the model", one_pass, "s", where),
            Result("evaluate: 30 encodings alone", encodes, "s", where),
            Result("evaluate: 30 encodings and decodings alone", both, "s", where),
            Result("evaluate: reading pass, all measures", reading, "s", where),
            Result("evaluate: reading pass / (pass + encodings)", reading / (one_pass + encodes), "x", where),
            Result("evaluate: reading pass / (pass + enc. + dec.)", reading / (one_pass + both), "x", where),
            Result(f"evaluate: losses / {passes} plain passes", losses / (passes * plain), "x", where),
        ],
        options.json,
    )
    if options.peers:
        version, theirs = saebench(
            options.peers, gemma, items, len(items if options.quick else some), several[: len(sites)]
        )
        each, ours = sum(theirs) / len(theirs), (reading + losses) / len(several)
        report(
            [
                Result("evaluate: a dictionary of 30, everything above", ours, "s", where),
                Result(f"evaluate: a dictionary, SAEBench core {version}", each, "s", where),
                Result("evaluate: SAEBench core / gemscope, a dictionary", each / ours, "x", where),
            ],
            options.json,
        )


if __name__ == "__main__":
    main()
