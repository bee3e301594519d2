"""A tiny model, a small corpus whose texts say where they come from, and stores of it."""

import multiprocessing
import os
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from gemscope.activations.harvesting import Slice, harvest_to
from gemscope.activations.plan import HarvestConfig
from gemscope.activations.sources import Documents
from gemscope.models.chat import Turn
from unit.models import tiny_gemma

SITES = ("resid_post.0", "resid_post.2", "mlp_act.1")
CONFIG = HarvestConfig(SITES, context=16, bucket_rows=300, unit_rows=500, batch_tokens=256, seed=3)


@lru_cache
def model():
    return tiny_gemma.gemma("gemma3")


@lru_cache
def corpus(n: int = 150) -> Documents:
    """Texts of 1 to 40 words, some chats, some that no model can read."""
    random_ = random.Random(0)
    words = "the capital of France is Paris and we like long words in Lyon today".split()
    items: list[Any] = []
    for number in range(n):
        text = " ".join(random_.choices(words, k=random_.choice([1, 3, 8, 12, 20, 40])))
        items.append((Turn("user", text), Turn("model", "hello world")) if number % 10 == 3 else text)
    items[7] = ""
    items[11] = (Turn("model", "no user"),)
    return Documents(tuple(items))


def store(folder: Path, config: HarvestConfig = CONFIG, source: Documents | None = None, share: Slice | None = None):
    harvest_to(folder, model(), source or corpus(), config, share=share)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a store but the locks and the notes about runs."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith((".locks", "runs"))}


def forked(work: Callable[[], Any]) -> multiprocessing.Process:
    """``work`` in a process of its own that has everything loaded already."""

    def run() -> None:
        torch.set_num_threads(1)
        work()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process
