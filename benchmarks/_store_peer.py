"""SAELens' cached activation store, as its CacheActivationsRunner writes it and its ActivationsStore reads it.

usage: _store_peer.py FOLDER ROWS WIDTH; prints one JSON object. Arrow has no bf16, so rows are float32.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Array2D, Dataset, Features, Sequence, Value, disable_progress_bars
from sae_lens.training.activations_store import ActivationsStore

CONTEXT = 128
BATCH = 4096


def timed(work: Callable[[], int]) -> dict[str, float]:
    """Rows a second of wall time, and a second of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    rows = work()
    return {"wall": rows / (time.perf_counter() - wall), "cpu": rows / (time.process_time() - cpu)}


def main() -> None:
    """Write, forget, read three quarters (its buffer keeps the rest)."""
    folder, rows, width = Path(sys.argv[1]) / "saelens", int(sys.argv[2]), int(sys.argv[3])
    disable_progress_bars()
    torch.set_num_threads(1)
    texts = rows // CONTEXT
    x = torch.randn(texts * CONTEXT, width)
    features = Features(
        {
            "h": Array2D(shape=(CONTEXT, width), dtype="float32"),
            "token_ids": Sequence(Value("int32"), length=CONTEXT),
        }
    )

    def write() -> int:
        ids = torch.zeros(texts, CONTEXT, dtype=torch.int32)
        data = Dataset.from_dict({"h": x.view(texts, CONTEXT, width), "token_ids": ids}, features=features)
        data.save_to_disk(str(folder), num_shards=1)
        os.sync()
        return len(x)

    written = timed(write)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for path in folder.rglob("*.arrow"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)

    def read() -> int:
        store = ActivationsStore(
            model=None,
            dataset=None,
            streaming=False,
            hook_name="h",
            hook_head_index=None,
            context_size=CONTEXT,
            d_in=width,
            n_batches_in_buffer=64,
            total_training_tokens=len(x),
            store_batch_size_prompts=32,
            train_batch_size_tokens=BATCH,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            cached_activations_path=str(folder),
        )
        stream = iter(store)
        return sum(len(next(stream)) for _ in range(3 * len(x) // (4 * BATCH)))

    found = {"version": version("sae-lens"), "bytes": size / len(x), "write": written, "read": timed(read)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
