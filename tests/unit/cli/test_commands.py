"""The commands in one process: output, JSON, exit codes, what is shown without a terminal."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from gemscope import __version__
from gemscope.cli.inputs import read_text
from gemscope.cli.main import app
from gemscope.core.errors import InputError

TEXT = "the capital of France is Paris"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def call(*words, stdin=None):
        return CliRunner().invoke(app, [str(word) for word in words], input=stdin)

    return call


def test_help_is_fast_and_does_not_import_torch():
    code = "import sys, gemscope.cli.main; sys.exit('torch' in sys.modules or 'rich.progress' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_version_and_every_command_are_there(run):
    assert run("--version").output == f"gemscope {__version__}\n"
    shown = run("--help").output
    for command in ("quickstart", "look", "evaluate", "models", "doctor"):
        assert command in shown
        assert run(command, "--help").exit_code == 0


def test_look_prints_a_reading_within_80_columns(run, tiny_suite):
    done = run("look", TEXT, "--suite", tiny_suite, "--top", 2)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert "resid_post." in lines[0]
    assert [line.split()[0] for line in lines if line.startswith("Paris")] == ["Paris"]
    assert max(map(len, lines[1:])) <= 80
    assert "\x1b" not in done.output


@pytest.mark.parametrize("words", [[], ["-"]])
def test_look_reads_standard_input(run, tiny_suite, words):
    given = run("look", TEXT, "--suite", tiny_suite, "--json")
    piped = run("look", *words, "--suite", tiny_suite, "--json", stdin=TEXT + "\n")
    assert json.loads(piped.stdout) == json.loads(given.stdout)


def test_look_as_json_has_the_layer_that_was_asked_for(run, tiny_suite):
    value = json.loads(run("look", TEXT, "--suite", tiny_suite, "--layer", 1, "--json").stdout)
    assert value["site"] == "resid_post.1"
    assert value["text"] == TEXT


def test_look_at_a_chat_shows_the_turns(run, tiny_suite):
    done = run("look", "--chat", "hello", "--suite", tiny_suite)
    assert done.exit_code == 0, done.output
    assert "answer: " in done.output
    assert "── user " in done.output
    assert "── model " in done.output


def test_evaluate_shows_the_measures_of_a_suite_or_of_one_layer(run, tiny_suite):
    assert run("evaluate", "--suite", tiny_suite).output.count("resid_post.") == 4
    assert run("evaluate", "--suite", tiny_suite, "--layer", 2).output.count("resid_post.") == 1
    measured = json.loads(run("evaluate", "--suite", tiny_suite, "--json").stdout)
    assert [one["site"] for one in measured] == [f"resid_post.{i}" for i in range(4)]
    assert {"fvu", "l0", "dead_fraction"} <= measured[0]["fidelity"].keys()


def test_evaluate_measures_a_dictionary_folder_anew(run, tiny_suite, monkeypatch):
    from gemscope.suites.config import QuickstartConfig

    monkeypatch.setattr(
        "gemscope.suites.measure.QuickstartConfig",
        lambda: QuickstartConfig(heldout_tokens=4000, splice_tokens=500),
    )
    done = run("evaluate", tiny_suite / "dictionaries" / "resid_post.3", "--json", "--no-verify", "--fast")
    stored = json.loads((tiny_suite / "evaluation" / "resid_post.3.json").read_text())
    (anew,) = json.loads(done.stdout)
    assert anew["fidelity"] == stored["fidelity"]
    assert anew["loss"] == stored["loss"]
    assert anew["concepts"] == stored["concepts"]


def test_evaluate_measures_several_kinds_together_and_writes_a_report(run, tiny_suite, tmp_path):
    spans = tmp_path / "spans.jsonl"
    line = {"text": "the capital of France is Paris", "spans": [{"start": 15, "end": 21, "label": "country"}]}
    spans.write_text("".join(json.dumps({**line, "text": line["text"] + f" {i}"}) + "\n" for i in range(30)))
    folders = [tiny_suite / "dictionaries" / "resid_post.1", *sorted((tiny_suite / "others").iterdir())]
    done = run("evaluate", *folders, "--text", spans, "--no-verify", "--no-random-model", "--out", tmp_path / "report")
    assert done.exit_code == 0, done.output
    kinds = {one["kind"] for one in json.loads((tmp_path / "report" / "evaluations.json").read_text())}
    assert kinds == {"sae", "transcoder", "skip_transcoder", "clt", "crosscoder"}
    assert "shuffled*" in done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert (tmp_path / "report" / "index.html").read_text().startswith("<!doctype html>")
    first, other = (tmp_path / "report" / f"{folder.name}.json" for folder in folders[:2])
    judged = run("compare", first, other, "--json")
    assert json.loads(judged.stdout)["documents"] == 30
    both = run("compare", folders[0], folders[1], "--text", spans, "--no-verify")
    assert "documents, drawn in pairs" in both.output


def test_evaluate_refuses_a_dictionary_that_does_not_fit_its_site(run, tiny_suite, tmp_path, monkeypatch):
    from gemscope.artifacts import formats
    from gemscope.suites.config import QuickstartConfig

    monkeypatch.setattr("gemscope.suites.measure.QuickstartConfig", lambda: QuickstartConfig(heldout_tokens=1000))
    loaded = formats.load(tiny_suite / "dictionaries" / "resid_post.3")
    loaded.dictionary.W_dec.neg_()
    formats.save(tmp_path / "wrong", loaded.dictionary, loaded.config, format="saelens")
    done = run("evaluate", tmp_path / "wrong")
    assert done.exit_code == 2
    assert "does not fit resid_post.3" in done.output
    assert "--no-verify" in done.output


def test_inspect_and_convert_answer(run, tiny_suite, tmp_path):
    folder = tiny_suite / "dictionaries" / "resid_post.1"
    assert "sae, jumprelu" in run("inspect", folder).output
    assert json.loads(run("inspect", folder, "--json").stdout)["reads"] == ["resid_post.1"]
    done = run("convert", folder, tmp_path / "out", "--to", "gemma-scope-2")
    assert "lost: the provenance is not written." in done.output
    assert "gemma-scope-2" in run("inspect", tmp_path / "out").output
    assert run("convert", folder, tmp_path / "out", "--to", "saelens").exit_code == 2
    assert run("inspect", tmp_path).exit_code == 2


def test_models_and_doctor_answer(run):
    assert "google/gemma-3-27b-it" in run("models").output
    assert "versions" in run("doctor").output


def test_quickstart_shows_each_stage_and_the_table_without_control_codes(run, tiny_folder, tmp_path):
    words = ["quickstart", "--model", tiny_folder, "--out", tmp_path / "s", "--tokens", 3000, "--latents", 32]
    words += ["--heldout", 1000, "--l0", 4, "--steps", 2]
    done = run(*words)
    assert done.exit_code == 0, done.output
    stages = [line.split()[0] for line in done.stderr.splitlines()]
    assert stages == ["text", "harvest", "train", "evaluate", "harvest", "train", "index"]
    assert sum(line.startswith("resid_post.") for line in done.stdout.splitlines()) == 4
    assert f"gemscope look --suite {tmp_path / 's'}" in done.stdout
    assert "\x1b" not in done.output
    again = run(*words)
    assert again.stderr.count("kept from before") == 4


def test_a_terminal_gets_bars_and_no_color_is_respected(tiny_folder, tmp_path):
    """In a pseudo-terminal, where rich draws and NO_COLOR forbids colours but not movement."""
    import pty

    words = ["quickstart", "--model", str(tiny_folder), "--out", str(tmp_path / "s"), "--tokens", "3000"]
    words += ["--latents", "32", "--heldout", "1000", "--l0", "4", "--steps", "2"]
    main, other = pty.openpty()
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "80"}
    process = subprocess.Popen(
        [sys.executable, "-m", "gemscope.cli.main", *words], stdout=other, stderr=other, env=environment
    )
    os.close(other)
    seen = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:
            break
        if not part:
            break
        seen += part
    assert process.wait(timeout=60) == 0
    text = seen.decode()
    assert "100%" in text
    assert "evaluate" in text
    assert "\x1b[3" not in text


def test_the_text_of_an_argument_loses_one_final_newline_only():
    assert read_text("a\n\n") == "a\n"
    with pytest.raises(InputError, match="empty"):
        read_text("")
