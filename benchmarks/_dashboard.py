"""What SAEDashboard takes for the work of ``index.py``: run by itself, in an environment with sae-dashboard.

Its pages are made from activations that are on disk already (its ``cache_dir``), 256 latents at a time as it comes;
every such group reads all activations again, so that one group of 16,384 latents tells the others' time. Only what it
gathers is timed: no page is written.
"""

import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from _activations import rows as mixtures
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, HookedSAETransformer, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformerConfig

WIDTH, CONTEXT, VOCABULARY, L0, HOOK = 640, 128, 6000, 64, "blocks.0.hook_resid_post"
LATENTS, GROUP, MINIBATCH = 16_384, 256, 64


def dictionary() -> SAE:
    """The one of ``index.py``: JumpReLU, random unit directions, 64 active in the mean."""
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(WIDTH, LATENTS, generator=generator)
    W /= W.norm(dim=0)
    few = mixtures(2048, WIDTH) @ W
    threshold = few.view(-1).kthvalue(int(few.numel() * (1 - L0 / LATENTS))).values
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=WIDTH, d_sae=LATENTS, metadata=SAEMetadata(hook_name=HOOK)))
    with torch.no_grad():
        sae.W_enc.copy_(W)
        sae.W_dec.copy_(W.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
        sae.threshold.fill_(float(threshold))
    return sae


def main() -> None:
    """``TOKENS``, in whole minibatches of 8,192; prints one JSON line."""
    tokens = int(sys.argv[1])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = HookedTransformerConfig(
        n_layers=1, d_model=WIDTH, n_ctx=CONTEXT, d_head=64, n_heads=10, d_vocab=VOCABULARY, act_fn="gelu"
    )
    model, sae = HookedSAETransformer(config), dictionary()
    ids = torch.randint(0, VOCABULARY, (tokens // CONTEXT, CONTEXT), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".dashboard-bench-") as name:
        x = mixtures(MINIBATCH * CONTEXT, WIDTH)
        for number in range(tokens // len(x)):
            part = x.roll(number * 7919, 0).view(MINIBATCH, CONTEXT, WIDTH).clone()
            torch.save({HOOK: part}, Path(name) / f"model_activations_{number}.pt")
        vis = SaeVisConfig(
            hook_point=HOOK, features=list(range(GROUP)), minibatch_size_tokens=MINIBATCH, cache_dir=Path(name)
        )
        started = time.process_time()
        SaeVisRunner(vis).run(encoder=sae, model=model, tokens=ids)
        seconds = time.process_time() - started
    with open("/proc/cpuinfo") as file:
        processor = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    on = f"sae-dashboard {version('sae-dashboard')}, L0 {L0}, width {WIDTH}, fp32 from its cache, CPU seconds"
    on += f"; {processor or platform.processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    on += f", torch {torch.__version__}"
    found = [
        (f"SAEDashboard, {GROUP} latents, {tokens} tokens", seconds, "s"),
        ("SAEDashboard, a latent and million tokens", seconds / GROUP / tokens * 1e6, "s"),
    ]
    for what, value, unit in found:
        print(json.dumps({"name": what, "value": value, "unit": unit, "measured_on": on}), flush=True)


if __name__ == "__main__":
    main()
