"""Searching an index of 1 M made-up features by words, and the page of a feature: milliseconds of library time.

Wanted: a search by word under 50 ms at the 95th percentile, a page under 20 ms. Cold: the index is opened anew and its
files are dropped from the page cache before each question; warm: the same questions asked a second time.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from _common import Result, arguments, machine, report

from gemscope.core.files import write_json
from gemscope.features import database, layout
from gemscope.features.config import IndexConfig
from gemscope.features.index import FeatureIndex
from gemscope.features.pieces import save_pieces
from gemscope.features.search import by_words

VOCABULARY = 262_144
POWER = 1.2
"""Of the tokens' ranks: a page of 45 examples then has 1,080 different tokens, English prose some 1,000."""
WORDS = 40_000


def zipf(random: np.random.Generator, count: int, top: int, power: float = 1.0) -> np.ndarray:
    """Ranks with probability proportional to (rank + 2.7) ** -power."""
    weights = np.cumsum((np.arange(top) + 2.7) ** -power)
    return np.searchsorted(weights, random.random(count) * weights[-1])


def spelled(rank: int) -> str:
    """A made-up word: two letters or more, different for every rank."""
    letters = "bcdfghklmnprstvz"
    word = ""
    while True:
        rank, at = divmod(rank, 80)
        word += letters[at % 16] + "aeiou"[at // 16]
        if rank == 0:
            return word + "n"
        rank -= 1


def labels(random: np.random.Generator, features: int) -> Iterator[database.Label]:
    """An explanation of 6 to 17 words for each feature."""
    words = np.array([spelled(i) for i in range(WORDS)])
    for start in range(0, features, 50_000):
        count = min(50_000, features - start)
        lengths = random.integers(6, 18, count)
        drawn = words[zipf(random, int(lengths.sum()), WORDS)]
        for number, some in enumerate(np.split(drawn, np.cumsum(lengths)[:-1])):
            yield database.Label(start + number, " ".join(some.tolist()), "made-up", 0.5)


def build(folder: Path, features: int) -> None:
    """An index like one that a pass makes: 45 examples a latent over 2 M tokens in contexts of 128."""
    random, config, tokens = np.random.default_rng(0), IndexConfig(), 1 << 21
    layout.save(folder / "starts.npy", np.arange(tokens // 128) * 128)
    layout.save(folder / "docs.npy", np.arange(tokens // 128, dtype=np.int32))
    layout.save(folder / "tokens.npy", zipf(random, tokens, VOCABULARY, POWER).astype(np.int32))
    layout.save(folder / "special.npy", np.zeros(tokens // 8, np.uint8))
    into = folder / "dictionaries" / "made_up"
    records = np.zeros(features, layout.latent_dtype(config))
    records["count"], records["density"], records["peak"] = 2000, 1e-3, 10.0
    records["n_bins"], records["bins"] = 30, np.arange(features) * 30
    records["n_top"], records["n_group"], records["examples"] = 20, 5, np.arange(features) * 45
    records["near"] = np.arange(features) * 90
    for name in ("promoted", "suppressed"):
        records[name] = random.integers(0, VOCABULARY, (features, config.promoted))
    for name in ("nearest", "elsewhere", "partner"):
        records[name] = random.integers(0, features, (features, config.nearest))
    layout.save(into / "latents.npy", records)
    bins = np.zeros(features * 30, layout.BIN)
    bins["bin"], bins["count"] = np.tile(np.arange(100, 130), features), 66
    layout.save(into / "bins.npy", bins)
    examples = np.zeros(features * 45, layout.EXAMPLE)
    examples["token"] = random.integers(16, tokens - 16, len(examples)) // 128 * 128 + 64
    examples["value"], examples["near"] = random.random(len(examples)), 2
    layout.save(into / "examples.npy", examples)
    near = np.zeros(features * 90, layout.NEAR)
    near["at"], near["value"] = np.tile([-1, 2], features * 45), 0x3F80
    layout.save(into / "near.npy", near)
    save_pieces(folder, {i: "▁" + spelled(i) for i in range(VOCABULARY)})
    path = folder / "index.sqlite"
    database.create(path, [("made_up", features, {"kind": "sae", "d_sae": features})])
    database.add_labels(path, labels(random, features))
    database.tidy(path)
    about = {"format": layout.FORMAT, "version": layout.VERSION, "model": "made-up", "revision": None}
    write_json(
        folder / "index.json", {**about, "spelling": "pieces", "tokens": tokens, "special_tokens": 0, "steps": []}
    )


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def timed(folder: Path, ask: Callable[[FeatureIndex, int], object], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of each question, cold and warm."""
    cold, warm = np.zeros(count), np.zeros(count)
    for number in range(count):
        forget(folder)
        started = time.perf_counter()
        ask(FeatureIndex.open(folder), number)
        cold[number] = time.perf_counter() - started
    index = FeatureIndex.open(folder)
    for number in range(count):
        ask(index, number)
    for number in range(count):
        started = time.perf_counter()
        ask(index, number)
        warm[number] = time.perf_counter() - started
    return 1e3 * cold, 1e3 * warm


def main() -> None:
    """Run and print; the folder is made in the current one, whose disk is measured."""
    options = arguments(__doc__ or "")
    features, count = (20_000, 20) if options.quick else (1_000_000, 200)
    folder = Path(tempfile.mkdtemp(dir=Path.cwd(), prefix=".search-bench-"))
    try:
        started = time.perf_counter()
        build(folder, features)
        making = time.perf_counter() - started
        os.sync()
        random = np.random.default_rng(1)
        words = [spelled(int(rank)) for rank in zipf(random, count, WORDS)]
        pages = random.integers(0, features, count)
        on = f"{features} features, labels of 6 to 17 words, {count} questions; {machine()}"
        found = [Result("making the made-up index", making, "s", on)]
        for name, ask in (
            ("search by a word as common as words are", lambda index, i: by_words(index, words[i])),
            ("search by one of the 100 commonest words", lambda index, i: by_words(index, spelled(i % 100))),
            ("search by two words", lambda index, i: by_words(index, f"{words[i]} {words[i - 1]}")),
            ("page", lambda index, i: index.feature(f"made_up/{pages[i]}")),
        ):
            for state, times in zip(("cold", "warm"), timed(folder, ask, count), strict=True):
                found.append(Result(f"{name}, {state}, median", float(np.median(times)), "ms", on))
                found.append(Result(f"{name}, {state}, 95th percentile", float(np.percentile(times, 95)), "ms", on))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "tokens.npy")
        found.append(Result("bytes a feature beside the tokens", size / features, "B", on))
        report(found, options.json)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
