"""Absorption along the microworld's concepts: plain and Matryoshka SAEs of equal L0, three seeds of each.

Same site, rows, width and target L0; the Matryoshka has prefixes of an eighth, a quarter and a half. Printed for each:
L0, FVU, mean full absorption with its floor (a random dictionary), the mean AUROC of the best latents and of 16-sparse
probes, and the share of concepts found. Absorption of a dictionary that found little is low for a bad reason: read the
rest too.
"""

from statistics import mean

import torch
from _common import Result, arguments, machine, report

from gemscope.activations.harvest import harvest
from gemscope.core.sites import Site
from gemscope.evaluation.evaluate import EvaluateConfig, evaluate
from gemscope.evaluation.result import Evaluation
from gemscope.evaluation.subject import Subject
from gemscope.models.gemma import Gemma
from gemscope.suites.corpus import heldout_text, training_text
from gemscope.training.config import TrainConfig
from gemscope.training.trainer import train

SITE, SEEDS = Site("resid_post", 3), (0, 1, 2)


def figures(one: Evaluation) -> dict[str, float]:
    """What is printed of one dictionary."""
    probes, concepts = one.probes, one.concepts
    assert probes is not None
    assert concepts is not None
    floors = [c.absorption_random for c in probes.concepts if c.absorption_random is not None]
    found, of = concepts.found
    return {
        "L0": one.fidelity.l0,
        "FVU": one.fidelity.fvu,
        "delta loss": one.loss.delta_loss,
        "absorption": probes.absorption or 0.0,
        "absorption, random dictionary": mean(floors),
        "best latent AUROC": probes.mean("best latent", 1, "!rule") or 0.0,
        "16-sparse AUROC": probes.mean("latents", 16, "!rule") or 0.0,
        "concepts found": found / of,
    }


def main() -> None:
    """Train, measure and print."""
    options = arguments(__doc__ or "")
    tokens, steps, d_sae = (3000, 4, 64) if options.quick else (100_000, 300, 512)
    torch.set_num_threads(1)
    gemma = Gemma.load("microworld-it")
    rows = harvest(gemma, training_text(gemma, tokens, 0), [SITE], batch_tokens=2048)
    kinds = {"plain": (), "Matryoshka": (d_sae // 8, d_sae // 4, d_sae // 2)}
    configs = [
        TrainConfig(SITE, d_sae=d_sae, target_l0=d_sae / 20, steps=steps, batch_size=1024, seed=seed, prefixes=prefixes)
        for prefixes in kinds.values()
        for seed in SEEDS
    ]
    names = [f"{kind} {seed}" for kind in kinds for seed in SEEDS]
    subjects = [
        Subject(name, one.dictionary, (SITE,), (SITE,)) for name, one in zip(names, train(rows, configs), strict=True)
    ]
    text = heldout_text(gemma, tokens // 5, 0)
    config = EvaluateConfig(splice_tokens=4000, batch_tokens=2048, probe_rows=10_000, random_model=False)
    found = [figures(one) for one in evaluate(gemma, subjects, text.items, text.labels, config)]
    where = f"microworld-it, {SITE}, {d_sae} latents, {tokens} tokens, {steps} steps; {machine()}"
    lines: list[Result] = []
    for i, kind in enumerate(kinds):
        own = found[i * len(SEEDS) : (i + 1) * len(SEEDS)]
        for name in own[0]:
            values = [one[name] for one in own]
            spread = f"seeds {', '.join(f'{v:.4g}' for v in values)}"
            lines.append(Result(f"{kind}: {name}", mean(values), "", f"{spread}; {where}"))
    report(lines, options.json)


if __name__ == "__main__":
    main()
