"""Makes the folder ``tests`` importable (``unit.models.tiny_gemma``); a tiny model folder and a suite of it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, database=None)
settings.load_profile("fixed")  # the same examples in every run; others: --hypothesis-profile=default

SMALL = ("--tokens", "3000", "--heldout", "1000", "--latents", "64", "--l0", "6", "--steps", "4")
"""Options of a quickstart that takes seconds."""


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 with its tokenizer, saved as a model folder."""
    from unit.models import tiny_gemma

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_gemma.build("gemma3", max_position_embeddings=2048).save_pretrained(folder)
    tiny_gemma.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_suite(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole suite of the tiny model; to be read only."""
    from gemscope.suites.config import QuickstartConfig
    from gemscope.suites.quickstart import quickstart

    folder = tmp_path_factory.mktemp("suites") / "tiny"
    config = QuickstartConfig(
        tokens=3000, heldout_tokens=4000, splice_tokens=500, d_sae=64, target_l0=6.0, steps=4, batch_size=512
    )
    quickstart(str(tiny_folder), folder, config)
    return folder


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def gemscope() -> Command:
    """Run the program in its own process: ``gemscope("look", "text", stdin=b"...")``."""

    def run(
        *words: str | bytes, stdin: bytes = b"", shell: str = "", timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
        command: list[str | bytes] = [sys.executable, "-m", "gemscope.cli.main", *words]
        if shell:
            command = ["bash", "-c", f'{shell}; exec "$@"', "bash", *command]
        done = subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=timeout)
        return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())

    return run
