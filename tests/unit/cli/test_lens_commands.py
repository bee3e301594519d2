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


@pytest.mark.parametrize("words", [[TEXT], ["--repeated"]])
def test_as_many_heads_are_named_as_asked_for(run, words):
    for more, expected in (([], 4), (["-k", 6], 6), (["-k", 1], 1)):
        shown = run("attend", *words, *more).stdout.split("previous")[1].split("induction")[0].split()[1:]
        assert len(shown) == 2 * expected


@pytest.mark.parametrize("unit", ["written", "effect"])
def test_as_many_readings_are_shown_as_asked_for(run, unit):
    for more, expected in (([], 10), (["-k", 3], 3)):
        lines = run("attend", TEXT, "--unit", unit, *more).stdout.split("query")[1].splitlines()[1:]
        assert len(lines) == expected


def test_the_grid_keeps_as_many_next_tokens_as_asked_for(run):
    for more, expected in (([], 5), (["-k", 2], 2)):
        value = json.loads(run("lens", TEXT, "--grid", *more, "--json").stdout)
        assert len(value["positions"][0]["rows"][0]["top"]) == expected


@pytest.mark.parametrize(
    ("words", "kind"),
    [([], "attention"), (["--by", "first"], "head_scores"), (["--from", "city", "--to", "country"], "head_scores")],
)
def test_what_is_saved_does_not_depend_on_what_is_printed(run, tmp_path, words, kind):
    saved = []
    for more in ([], ["--json"]):
        path = tmp_path / f"{len(more)}.json"
        assert run("attend", TEXT, *words, *more, "--out", path).exit_code == 0
        value = json.loads(path.read_text())
        value.pop("provenance")
        saved.append(value)
    assert saved[0] == saved[1]
    assert saved[0]["kind"] == kind
    assert json.loads(run("attend", TEXT, *words, "--json").stdout)["kind"] == "head_scores"


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
        (["attend", "--repeated", "--unit", "written"], "leave out --unit"),
        (["attend", "--repeated", "--target", "Paris"], "leave out --target"),
        (["attend", "--repeated", "--other", "Paris"], "leave out --other"),
        (["attend", "--repeated", "--chat"], "leave out --chat"),
        (["attend", "--repeated", "--edit", "France=Lyon"], "leave out --edit"),
        (["attend", TEXT, "--null", "16"], "add --edit, or leave out --null"),
        (["attend", TEXT, "--edit", "France=Lyon", "--null", "0", "--seed", "0"], "leave out --seed"),
        (["attend", TEXT, "--by", "first", "--target", "Paris"], "leave out --target"),
        (["attend", TEXT, "--seed", "0"], "add --edit, or leave out --seed"),
        (["attend", "--repeated", "--seed", "0"], "leave out --seed"),
        (["attend", ""], "the text is empty"),
        (["attend", TEXT, "--out", "x.bmp"], "end the name in"),
        (["lens", TEXT, "-p", "99"], "outside a text"),
        (["lens", TEXT, "--grid", "--trace"], "not both"),
        (["lens", TEXT, "--grid", "--other", "Paris"], "leave out --other"),
        (["lens", TEXT, "--grid", "--position", "99"], "leave out --position"),
        (["lens", TEXT, "--grid", "-p", "-1"], "leave out --position"),
        (["lens", TEXT, "--grid", "-p", "0"], "leave out --position"),
        (["lens", TEXT, "--grid", "--suite", "/nowhere"], "leave out --suite"),
        (["lens", TEXT, "--trace", "--target", "Paris"], "leave out --target"),
        (["lens", TEXT, "--trace", "--other", "Paris"], "leave out --other"),
        (["attribute", TEXT, "--target", "xylophone"], "give a word that is one token"),
        (["headlines", "/nowhere/file.txt"], "No such file"),
        (["headlines", "/nowhere/file.txt", "-n", "5"], "leave out --number"),
    ],
)
def test_a_mistake_is_one_sentence(run, words, reason):
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
