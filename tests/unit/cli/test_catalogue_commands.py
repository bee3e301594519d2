"""``gemscope list`` and ``gemscope fetch``: what is printed, exit codes, and nothing half-done."""

import hashlib
import json
import os
import subprocess
import sys
from functools import partial

import pytest
from typer.testing import CliRunner

from gemscope.artifacts.catalogue.released import catalogue
from gemscope.artifacts.hub import retry
from gemscope.cli.main import app
from unit.artifacts import fake_hub
from unit.artifacts.fake_hub import Fault, single_layer

REPO = "google/gemma-scope-2-1b-pt"
FOLDER = "resid_post/layer_22_width_65k_l0_medium"
NAME = f"gemma-scope-2-1b-pt/{FOLDER}"


@pytest.fixture(scope="module")
def server():
    with fake_hub.running() as hub:
        yield hub


@pytest.fixture
def hub(server):
    server.repos.clear()
    server.gated.clear()
    server.trouble.clear()
    server.asked.clear()
    return server


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def call(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    return call


def named(folder):
    """Files under ``folder`` that have a final name."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def test_the_whole_catalogue_is_one_line_per_repository(run):
    done = run("list")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["repository", "model", "number", "size"]
    assert sum(line.startswith("gemma-scope-") for line in lines) == 19
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("model", ["1b-pt", "27b-it", "gemma-scope-9b-pt-res"])
def test_a_repository_is_one_line_per_folder(run, model):
    lines = run("list", "--model", model, "--site", "resid_post").stdout.splitlines()
    assert any("0-" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_a_short_list_has_names_sites_targets_and_sizes(run):
    lines = run("list", "-m", "1b-pt", "-l", "22", "-w", "65k", "--l0", "medium").stdout.splitlines()
    [row] = [line for line in lines if line.startswith(FOLDER)]
    assert row.split() == [FOLDER, "resid_post.22", "60", "605", "MB", "n"]
    assert "gemma-scope-2-1b-pt/...  (google/gemma-3-1b-pt)" in lines
    holes = run("list", "-m", "27b-it", "-l", "43", "--kind", "transcoder", "--category", "transcoder_all")
    assert holes.stdout.count(" ?\n") == 2
    assert "not in SAELens' registry" in holes.stdout


def test_everything_fits_80_columns(run):
    lines = run("list", "--all").stdout.splitlines()
    assert len(lines) > len(catalogue())
    assert max(map(len, lines)) <= 80


def test_a_list_as_json_has_every_field(run):
    [one] = json.loads(run("list", NAME, "--json").stdout)
    assert one["name"] == NAME
    assert one["reads"] == ["resid_post.22"]
    assert one["neuronpedia"] == "gemma-3-1b/22-gemmascope-2-res-65k"
    assert one["size"] == 4 * (2 * 1152 * 65536 + 2 * 65536 + 1152)
    assert len(json.loads(run("list", "--json").stdout)) == len(catalogue())


def test_listing_does_not_import_torch():
    code = (
        "import sys; from gemscope.artifacts.catalogue.released import catalogue; catalogue();"
        "sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("list", "--site", "attn_out"), "use --site z"),
        (("list", "gemma-scope-2-1b-pt/resid_post/layer_23_width_65k_l0_medium"), "the nearest are"),
        (("list", "--layer", "x"), "cannot read the layers 'x'"),
        (("fetch",), "nothing was chosen"),
        (("fetch", "-m", "1b-pt", "--kind", "sae", "--affine"), "fits all these options"),
        (("fetch", NAME, "--hub", "nowhere"), "neither a hub's address"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(run, words, says):
    done = run(*words)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert says in done.stderr
    assert done.stderr.startswith("gemscope: ")
    assert done.stderr.count("\n") == 1


def test_a_dry_run_says_sizes_and_writes_nothing(run, hub, tmp_path):
    tree = single_layer(FOLDER)
    commit = hub.add(REPO, tree)
    done = run("fetch", NAME, "--hub", hub.url, "--out", tmp_path / "out", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert f"{REPO} at {commit}" in done.stdout
    assert "params.safetensors         20.0 kB  to come" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()[:-1]) <= 80
    assert not (tmp_path / "out").exists()
    assert hub.gets() == []


def test_a_fetch_shows_the_hash_of_every_file(run, hub, tmp_path):
    tree = single_layer(FOLDER)
    hub.add(REPO, tree)
    done = run("fetch", NAME, "--hub", hub.url, "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "2 files" in done.stderr  # said before
    for name in ("config.json", "params.safetensors"):
        assert f"    sha256 {hashlib.sha256(tree[f'{FOLDER}/{name}']).hexdigest()}\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert named(tmp_path) == ["config.json", "gemscope.json", "params.safetensors"]
    again = run("fetch", NAME, "--hub", hub.url, "--out", tmp_path, "--json")
    value = json.loads(again.stdout)
    assert value["left"] == 0
    assert {one["state"] for one in value["files"]} == {"here"}


def test_a_suite_is_fetched_by_its_options(run, hub, tmp_path):
    folders = [f"resid_post_all/layer_{layer}_width_16k_l0_small" for layer in range(3)]
    hub.add(REPO, {path: data for folder in folders for path, data in single_layer(folder, size=500).items()})
    options = ("-m", "1b-pt", "--category", "resid_post_all", "-l", "0-2", "-w", "16k", "--l0", "small")
    done = run("fetch", *options, "--hub", hub.url, "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / REPO / "resid_post_all").iterdir()) == [
        folder.split("/")[1] for folder in folders
    ]


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ([Fault("API", status=401, headers={"X-Error-Code": "GatedRepo"})], "accept its licence"),
        ([Fault("API", status=404, headers={"X-Error-Code": "RepoNotFound"})], "there is no repository"),
        ([Fault("HEAD", "params", status=404, headers={"X-Error-Code": "EntryNotFound"})], "choose another dictionary"),
        ([Fault("HEAD", "params", status=429, headers={"Retry-After": "1000"})], "asks to wait 1000 s"),
        ([Fault("GET", "params", status=429, headers={"Retry-After": "1000"})], "asks to wait 1000 s"),
        ([Fault("GET", "params", status=401)], "the hub refuses"),
        ([Fault("GET", "params", status=404, headers={"X-Error-Code": "EntryNotFound"})], "has no file"),
        ([Fault("GET", "params", swap=b"no")] * 9, "could not be fetched in 6 tries"),
        ([Fault("GET", "params", swap=b"x" * 20_000)] * 2, "nothing was kept"),
    ],
)
def test_trouble_is_one_sentence_and_leaves_nothing_half_written(run, hub, tmp_path, monkeypatch, trouble, says):
    monkeypatch.setattr(retry, "Patience", partial(retry.Patience, sleep=lambda seconds: None))
    hub.add(REPO, single_layer(FOLDER))
    hub.trouble += trouble
    done = run("fetch", NAME, "--hub", hub.url, "--out", tmp_path)
    assert done.exit_code == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("gemscope: ")
    assert says in last
    assert "Traceback" not in done.stderr
    assert "params.safetensors" not in named(tmp_path)


def test_a_connection_that_is_cut_is_resumed_and_said(run, hub, tmp_path):
    tree = single_layer(FOLDER)
    hub.add(REPO, tree)
    hub.trouble += [Fault("GET", "params", cut=5000)]
    done = run("fetch", NAME, "--hub", hub.url, "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "the connection breaks" in done.stderr
    assert "waiting 1 s" in done.stderr
    assert (tmp_path / REPO / FOLDER / "params.safetensors").read_bytes() == tree[f"{FOLDER}/params.safetensors"]


def test_the_program_uses_the_hub_of_the_environment(hub, tmp_path):
    tree = single_layer(FOLDER)
    hub.add(REPO, tree)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gemscope.cli.main", "fetch", NAME]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    fetched = tmp_path / "artifacts" / REPO / FOLDER
    assert (fetched / "params.safetensors").read_bytes() == tree[f"{FOLDER}/params.safetensors"]
    hub.gated.add(REPO)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "accept its licence" in done.stderr
