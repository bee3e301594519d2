"""gemscope benchmark worlds, from the command line."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_worlds_are_listed_run_and_kept(gemscope: Command, tmp_path: Path) -> None:
    listed = gemscope("benchmark", "worlds", "--list")
    assert all(name in listed.stdout for name in ("easy", "skip_transcoder", "crosscoder", "16k"))

    words = ("benchmark", "worlds", "-t", "nano", "--method", "batchtopk", "--seeds", "1", "--rows", "8192")
    words = (*words, "--out", str(tmp_path / "runs.jsonl"))
    done = gemscope(*words, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "nano batchtopk 0  8 steps" in done.stderr
    assert "batchtopk 1" in done.stdout
    assert "by chance MCC 0.36" in done.stdout
    again = gemscope(*words, "--json", timeout=300)
    assert "nano batchtopk 0  kept from before" in again.stderr
    (line,) = json.loads(again.stdout)
    assert (line["tier"], line["seeds"], line["met"]) == ("nano", [0], None)
