"""The same in SAELens, run by ``load.py`` as a process of its own in the environment that ``make interop`` made.

SAELens reads a dictionary whole or not at all, so each task begins with all of it.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens import SAE


def memory(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def main() -> None:
    """``TASK FOLDER ROWS``, TASK one of load, rows, encode; prints seconds and bytes."""
    task, folder, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    with (folder / "sae_weights.safetensors").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, start = memory("VmRSS"), time.perf_counter()
    with torch.no_grad():
        sae = SAE.load_from_disk(folder)
        if task == "load":
            sum(float(tensor.sum()) for tensor in sae.state_dict().values())
        elif task == "rows":
            sae.W_dec[torch.randint(0, len(sae.W_dec), (rows,))].sum()
        else:
            sae.encode(4 * torch.randn(rows, sae.cfg.d_in, generator=torch.Generator().manual_seed(2)))
    found = {"seconds": time.perf_counter() - start, "before": before, "peak": memory("VmHWM")}
    print(json.dumps(found | {"version": version("sae-lens")}))


if __name__ == "__main__":
    main()
