"""What it costs to evaluate 30 dictionaries of one model: one pass of the model serves all of them.

Printed: seconds of one pass that only captures, of the 30 encodings (and decodings) of its rows alone, of the reading
pass of ``evaluate`` with everything that it sums, and their ratio. Then the passes for the losses, which cannot be
shared: one for each dictionary, and their time against as many plain passes.
"""

import time
from collections.abc import Callable

import torch
from _common import Result, arguments, machine, report

from gemscope.activations.positions import bucketed, content_mask
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.sae import SAE
from gemscope.evaluation.evaluate import EvaluateConfig, read
from gemscope.evaluation.splice import splice_losses
from gemscope.evaluation.subject import Subject
from gemscope.models.gemma import Gemma
from gemscope.suites.corpus import heldout_text

DICTIONARIES, L0 = 30, 32.0


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


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    options = arguments(__doc__ or "")
    tokens, d_sae, rounds = (2000, 256, 1) if options.quick else (20_000, 1024, 3)
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


if __name__ == "__main__":
    main()
