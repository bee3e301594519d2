"""``gemscope harvest`` and ``gemscope store`` in one process."""

import json

import pytest
from typer.testing import CliRunner

from gemscope.activations.harvesting import HarvestProgress
from gemscope.activations.store import Store
from gemscope.cli.harvest_view import rates
from gemscope.cli.main import app


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def call(*words, stdin=None):
        return CliRunner().invoke(app, [str(word) for word in words], input=stdin)

    return call


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": "the capital of France is Paris " * (1 + i % 3)}) + "\n" for i in range(60))
    )
    return path


def test_from_text_to_a_store_and_back(run, tiny_folder, tmp_path, text):
    out = tmp_path / "store"
    words = ["harvest", text, "--out", out, "--model", tiny_folder, "--layers", "0,2-3", "--site", "resid_post"]
    words += ["--site", "mlp_out.1", "--unit-rows", 300, "--batch-tokens", 512]
    dry = run(*words, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "tokens in 60 documents" in dry.output
    assert not out.exists()
    for index in (1, 0):
        done = run(*words, "--unit-slice", f"{index}/2")
        assert done.exit_code == 0, (done.output, done.exception)
        assert ("other slices" in done.stdout) == (index == 1)
    assert "\x1b" not in done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    store = Store.open(out)
    assert [str(site) for site in store.sites] == ["resid_post.0", "mlp_out.1", "resid_post.2", "resid_post.3"]
    assert f"{store.rows:,} from 60 documents" in done.stdout
    told = json.loads(run("store", "info", out, "--json").stdout)
    assert told["rows"] == store.rows
    assert "is whole" in " ".join(run("store", "verify", out).stdout.split())
    assert run("store", "merge", out, out, "--out", tmp_path / "both").exit_code == 0
    assert Store.open(tmp_path / "both").rows == 2 * store.rows
    (out / "acts" / "mlp_out.1" / "000000.safetensors").unlink()
    broken = run("store", "verify", out)
    assert broken.exit_code == 2
    assert "missing" in broken.stderr
    assert run("store", "rm", out, stdin="n\n").exit_code != 0
    assert out.exists()
    assert "freed" in run("store", "rm", out, "--yes").stdout
    assert not out.exists()


def test_standard_input_and_the_microworld(run, tiny_folder, tmp_path):
    piped = run(
        "harvest", "-", "--out", tmp_path / "a", "--model", tiny_folder, "--layers", 0, stdin="hello world\nLyon\n"
    )
    assert piped.exit_code == 0, piped.output
    assert Store.open(tmp_path / "a").rows == 3
    made = run("harvest", "--out", tmp_path / "b", "--model", tiny_folder, "--layers", 1, "--tokens", 2000)
    assert made.exit_code == 0, made.output
    assert Store.open(tmp_path / "b").plan.config["source"]["kind"] == "microworld"


def test_mistakes_are_one_sentence(run, tiny_folder, tmp_path, text):
    common = ["--out", tmp_path / "s", "--model", tiny_folder]
    for words, expected in (
        ([text, "--layers", "x"], "cannot read the layers"),
        ([text, "--layers", "9"], "no layer 9"),
        ([text, "--site", "nowhere"], "unknown site"),
        ([text, "--unit-slice", "3/3"], "no slice 3/3"),
        ([tmp_path / "none.txt"], "no file"),
        ([text, "--dataset", "x"], "not both"),
        ([text, tiny_folder / "config.txt"], "several kinds"),
        ([text, "--column", "body"], "name the field"),
        ([text, "--dtype", "int8"], "unknown dtype"),
    ):
        done = run("harvest", *words, *common)
        assert done.exit_code == 2, (words, done.output, done.exception)
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1
    done = run("store", "info", tmp_path / "nothing")
    assert done.exit_code == 2
    assert "cannot read" in done.stderr


def test_ray_may_stand_alone(run, monkeypatch, tiny_folder, tmp_path, text):
    from gemscope.activations import cluster

    seen = []

    def instead(folder, spec, gemma, source, config, where, **_):
        from gemscope.activations.harvesting import harvest_to

        seen.append(where)
        return harvest_to(folder, gemma, source, config)

    monkeypatch.setattr(cluster, "harvest_on_ray", instead)
    for words in (["--ray"], ["--ray", "auto"], ["--ray", "--workers", "3"], ["--ray", "ray://head:10001"]):
        done = run("harvest", "--out", tmp_path / "s", "--model", tiny_folder, "--layers", 0, *words, text)
        assert done.exit_code == 0, done.output
    assert [where.address for where in seen] == [None, "auto", None, "ray://head:10001"]
    assert seen[2].workers == 3


def test_the_rates_are_what_they_say():
    now = HarvestProgress(rows=1000, rows_total=4000, bytes=2_000_000, units=1, units_total=4, seconds=2.0)
    assert rates(now).split() == ["500", "tokens/s", "1.0", "MB/s", "0:06", "left"]
    assert "left" not in rates(HarvestProgress(10, 10, 10, 1, 1, 1.0))
