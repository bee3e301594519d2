"""Everything a user can get wrong is one sentence and exit code 2; a run that is stopped leaves whole files
only.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import SMALL
from gemscope.cli.main import app

TEXT = "the capital of France is Paris"


def run(*words: object, stdin: bytes | str | None = None):
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


def refused(done, *expected: str) -> None:
    """Exit code 2, one line on standard error that says what was expected, nothing on standard output."""
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stdout == ""
    assert done.stderr.startswith("gemscope: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    for word in expected:
        assert word in done.stderr


def whole(folder: Path) -> None:
    """No file under a temporary name is left, and every JSON and safetensors file can be read."""
    from safetensors import safe_open

    for path in folder.rglob("*"):
        assert not path.name.startswith("."), path
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def suite(tiny_suite, tmp_path):
    """A copy of the suite that a test may damage."""
    return Path(shutil.copytree(tiny_suite, tmp_path / "suite"))


def test_bytes_that_are_not_utf8(tiny_suite):
    refused(run("look", "--suite", tiny_suite, stdin=b"caf\xe9 noir"), "not valid UTF-8", "0xe9 at position 3")


def test_an_argument_that_is_not_utf8(gemscope, tiny_suite):
    done = gemscope("look", b"caf\xe9", "--suite", str(tiny_suite))
    assert (done.returncode, done.stdout) == (2, "")
    assert "not valid Unicode" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("words", "stdin"), [([""], None), ([], b""), (["-"], b"\n")])
def test_an_empty_text(tiny_suite, words, stdin):
    refused(run("look", *words, "--suite", tiny_suite, stdin=stdin), "the text is empty")
    refused(run("look", "--chat", "  ", "--suite", tiny_suite), "empty")


def test_a_text_longer_than_the_context(tiny_suite):
    refused(run("look", "the " * 3000, "--suite", tiny_suite), "at most 2048", "shorten")
    refused(run("look", "--chat", "the " * 3000, "--suite", tiny_suite), "at most 2048")


def test_a_layer_that_has_no_dictionary(tiny_suite):
    refused(run("look", TEXT, "--suite", tiny_suite, "--layer", 9), "layer 9", "0, 1, 2, 3")
    refused(run("evaluate", "--suite", tiny_suite, "--layer", 4), "layer 4")


@pytest.mark.parametrize("words", [["look"], ["evaluate", "--layer", "-1"], ["look", "x", "--top", "0"], ["see"]])
def test_a_command_line_that_makes_no_sense(tiny_suite, words):
    done = run(*words, *(["--suite", tiny_suite] if words != ["look"] else ["--layer", "first"]))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_no_suite_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run("look", TEXT), "suites/microworld-it", "gemscope quickstart\n")
    refused(run("look", TEXT, "--model", "microworld-pt"), "gemscope quickstart --model microworld-pt\n")
    refused(run("evaluate", "--suite", "here"), "gemscope quickstart --out here\n")


def test_a_folder_that_is_no_model(tmp_path):
    refused(run("quickstart", "--model", tmp_path, "--out", tmp_path / "s"), "no model folder")
    refused(run("quickstart", "--model", tmp_path / "gone", "--out", tmp_path / "s"), "gone")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(run("quickstart", "--model", tmp_path, "--out", tmp_path / "s"), "llama", "Gemma")
    assert not (tmp_path / "s").exists()


def test_truncated_weights_of_the_model(model, tmp_path):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(run("quickstart", "--model", model, "--out", tmp_path / "s"), "truncated or damaged")
    assert not (tmp_path / "s").exists()


def test_a_truncated_or_missing_dictionary(suite):
    folder = suite / "dictionaries" / "resid_post.1"
    path = folder / "dictionary.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    refused(run("look", TEXT, "--suite", suite, "--layer", 1), "truncated or damaged")
    refused(run("evaluate", folder), "truncated or damaged")
    shutil.rmtree(folder)
    refused(run("look", TEXT, "--suite", suite, "--layer", 1), "dictionary.json")
    refused(run("evaluate", suite), "dictionary.json")


def test_damaged_suite_files(suite):
    (suite / "evaluation" / "resid_post.2.json").write_text('{"format": "something else"}')
    refused(run("evaluate", "--suite", suite), "resid_post.2.json")
    (suite / "suite.json").write_text("{")
    refused(run("look", TEXT, "--suite", suite), "not valid JSON")
    (suite / "suite.json").write_text('{"format": "gemscope.suite", "version": 1}')
    refused(run("look", TEXT, "--suite", suite), "lacks a part")


def test_a_suite_of_another_model(suite, tiny_folder, tmp_path):
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    refused(run("quickstart", "--model", other, "--out", suite), "holds the suite of", "--out")


def test_a_place_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run("quickstart", "--model", model, "--out", tmp_path / "file" / "s", *SMALL), "file/s")


def test_a_harvest_that_will_not_fit_is_refused_before_it_begins(model, tmp_path):
    words = ["quickstart", "--model", model, "--out", tmp_path / "s", "--tokens", 10**15]
    refused(run(*words), "takes 192000000.0 GB", "GB free", "--out")


def test_a_full_disk_leaves_nothing_half_written_and_the_next_run_goes_on(gemscope, model, tmp_path):
    """Files may not grow beyond 40 KiB: the harvest cannot be written."""
    words = ["quickstart", "--model", str(model), "--out", str(tmp_path / "s"), *SMALL]
    done = gemscope(*words, shell="ulimit -f 40")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("gemscope: ")
    assert "s/" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "s").rglob("*")) == []
    assert run(*words).exit_code == 0
    whole(tmp_path / "s")


def test_no_space_left_is_called_a_full_disk(suite, tiny_folder, monkeypatch):
    import errno

    from gemscope.core import files

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shutil.rmtree(suite / "dictionaries")
    monkeypatch.setattr(files, "save_file", full)
    words = ["--tokens", 3000, "--latents", 64, "--l0", 6, "--steps", 4]
    done = run("quickstart", "--model", tiny_folder, "--out", suite, *words)
    assert done.exit_code == 2
    assert "the disk is full" in done.stderr.splitlines()[-1]


def waiting_run(model: Path, out: Path) -> subprocess.Popen[bytes]:
    """A quickstart in its own process that has reached its (endless) training."""
    words = ["quickstart", "--model", str(model), "--out", str(out), *SMALL[:-1], "1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gemscope.cli.main", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # tests that were started in the background ignore Ctrl-C, and their children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 100
    while not (out / "activations").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(1.0)
    return process


def test_ctrl_c_in_training_keeps_what_is_finished(model, tmp_path):
    process = waiting_run(model, tmp_path / "s")
    process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert b"stopped; what was finished is kept, run the same command again to go on." in stderr
    assert b"Traceback" not in stderr
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["activations"]
    whole(tmp_path / "s")
    done = run("quickstart", "--model", model, "--out", tmp_path / "s", *SMALL)
    assert done.exit_code == 0, done.output
    assert any(line.startswith("harvest") and "kept from before" in line for line in done.stderr.splitlines())
    whole(tmp_path / "s")


def test_a_killed_run_leaves_whole_stages_and_the_next_one_goes_on(model, tmp_path):
    process = waiting_run(model, tmp_path / "s")
    process.kill()
    process.communicate(timeout=60)
    whole(tmp_path / "s")
    assert run("look", TEXT, "--suite", tmp_path / "s").exit_code == 2
    assert run("quickstart", "--model", model, "--out", tmp_path / "s", *SMALL).exit_code == 0
    assert run("look", TEXT, "--suite", tmp_path / "s").exit_code == 0


def test_a_reader_that_goes_away_is_no_error_message(tiny_suite):
    command = f"{sys.executable} -m gemscope.cli.main look '{TEXT}' --suite {tiny_suite} --top 20 | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=100)
    assert done.stderr == b""
