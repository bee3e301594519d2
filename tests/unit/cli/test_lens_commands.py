"""``attend``, ``lens``, ``attribute`` and ``headlines``: output, JSON, files, refusals."""

import json

import pytest
from typer.testing import CliRunner

from gemscope.cli.main import app
from gemscope.core.sites import Site
from gemscope.models.gemma import Gemma
from gemscope.suites import headlines
from gemscope.suites.headlines import Detector

TEXT = "the capital of France is Paris and the capital of Lyon is Paris"


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return Gemma.load(tiny_folder)


@pytest.fixture
def run(monkeypatch, tiny_folder, loaded):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("gemscope.cli.lens._load", lambda _: loaded)

    def call(command, *words, stdin=None):
        return CliRunner().invoke(app, [command, *map(str, words), "--model", str(tiny_folder)], input=stdin)

    return call


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["attend", TEXT], "heads by key/value head"),
        (["attend", TEXT, "--by", "induction", "-k", "3"], "induction"),
        (["attend", TEXT, "--head", "2.1"], "head 2.1 · global · key/value head 0"),
        (["attend", TEXT, "--unit", "written"], "attention (written)"),
        (["attend", TEXT, "--unit", "effect", "--target", "Paris", "--other", "Lyon"], "effect on Paris − Lyon"),
        (["attend", "--repeated"], "random words read twice"),
        (["attend", TEXT, "--from", "capital", "--to", "country"], "capital→count"),
        (["attend", TEXT, "--edit", "France=Lyon", "--null", "3"], "z against 3 random replacements"),
        (["attend", TEXT, "--edit", "France=the long words", "--null", "0"], "length changed by +2"),
        (["attend", TEXT, "--edit", "France=Lyon", "--head", "2.1", "--null", "0"], "head 2.1"),
        (["attend", "--chat", "hello world"], "heads by key/value head"),
        (["lens", TEXT], "after layer"),
        (["lens", TEXT, "--grid", "--target", "Paris"], "emerges"),
        (["lens", TEXT, "--trace", "-p", "3"], "cos before"),
        (["attribute", TEXT, "--target", "Paris", "--other", "Lyon"], "logit of Paris − Lyon"),
    ],
)
def test_what_is_shown_fits_80_columns(run, words, expected):
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert expected in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_lens_shows_the_latents_of_a_suite(run, tiny_suite):
    value = json.loads(run("lens", TEXT, "--suite", tiny_suite, "--top", 2, "--json").stdout)
    assert max(len(one["latents"]) for one in value["trace"]["latents"]) == 2


def test_headlines_of_a_file_of_standard_input_and_of_the_microworld(run, tiny_suite, tmp_path, monkeypatch):
    asked = tuple(Detector(Site("resid_post", 1), j, f"topic {j}") for j in range(9))
    monkeypatch.setattr(headlines, "concept_detectors", lambda suite, layer: asked)
    lines = tmp_path / "lines.txt"
    lines.write_text("the capital of France\n\nhello world\n")
    for words, stdin in (([lines], None), (["-"], lines.read_text())):
        done = run("headlines", *words, "--suite", tiny_suite, "--json", stdin=stdin)
        assert [one["text"] for one in json.loads(done.stdout)["texts"]] == ["the capital of France", "hello world"]
    done = run("headlines", "-n", 5, "--suite", tiny_suite)
    assert done.exit_code == 0, done.output
    assert "5 texts" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("words", [[], ["--head", "2.1"], ["--edit", "France=Lyon", "--null", "0"]])
def test_pictures_and_pages_are_written(run, tmp_path, words):
    path = tmp_path / "out.html"
    done = run("attend", TEXT, *words, "--out", path)
    assert done.exit_code == 0, done.output
    assert f"wrote {path}" in done.stderr
    page = path.read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["attend", TEXT, "--edit", "Spain=Italy"], "is not in the text"),
        (["attend", TEXT, "--edit", "capital=x"], "write capital#1=x"),
        (["attend", TEXT, "--head", "two"], "write layer.head"),
        (["attend", TEXT, "--head", "9.1"], "layer 9 was not read"),
        (["attend", TEXT, "--by", "size"], "unknown metric 'size'"),
        (["attend", TEXT, "--from", "capital"], "--from and --to go together"),
        (["attend", TEXT, "--from", "capital", "--to", "cheese"], "unknown concept 'cheese'"),
        (["attend", TEXT, "--target", "Paris"], "ask for the unit effect"),
        (["attend", TEXT, "--repeated"], "leave out TEXT"),
        (["attend", TEXT, "--by", "first", "--unit", "written"], "by their weights"),
        (["attend", ""], "the text is empty"),
        (["attend", TEXT, "--out", "x.bmp"], "end the name in"),
        (["lens", TEXT, "-p", "99"], "outside a text"),
        (["lens", TEXT, "--grid", "--trace"], "not both"),
        (["attribute", TEXT, "--target", "xylophone"], "give a word that is one token"),
        (["headlines", "/nowhere/file.txt"], "No such file"),
    ],
)
def test_a_mistake_is_one_sentence(run, words, reason):
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
