"""find, feature, steer and index on a whole suite of the tiny model, as a user types them."""

import json

import pytest
from typer.testing import CliRunner

from gemscope.cli.main import app
from gemscope.features.index import FeatureIndex


@pytest.fixture
def run(tiny_suite):
    def run_(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, [*words, "--suite", str(tiny_suite)], env={"COLUMNS": "80"})
        assert done.exit_code == code, done.output
        assert all(len(line) <= 80 for line in done.output.splitlines() if not code and "--json" not in words)
        return done.output

    return run_


def test_a_feature_has_a_page(run):
    shown = run("feature", "resid_post.1/3", "-n", "2")
    for part in ("resid_post.1/3", "active on", "promotes", "like it", "active with"):
        assert part in shown
    page = json.loads(run("feature", "resid_post.1/3", "--json"))
    assert page["id"] == "resid_post.1/3"
    assert "there is no dictionary 'nothing'" in run("feature", "nothing/3", code=2)


def test_features_are_found(run):
    found = json.loads(run("find", "--text", "the capital of France", "--at", "capital", "--json"))
    assert found["hits"]
    assert "feature" in run("find", "--text", "the capital of France", "--by-token", "-k", "2")
    assert run("find", "--like", "resid_post.1/3", "-k", "3").count("/") == 3
    assert "nothing was found" in run("find", "zyzzyva")
    assert "say one thing" in run("find", "one", "--concept", "two", code=2)
    assert "needs an embedding model" in run("find", "--meaning", "towns", code=2)


def test_text_is_steered(run):
    page = json.loads(run("feature", "resid_post.1/3", "--json"))
    name = "resid_post.1/3" if page["peak"] else next(r["feature"] for r in page["nearest"])
    done = json.loads(run("steer", "the capital of France is", "-f", f"{name}=0", "--tokens", "4", "--json"))
    assert done["default"] == done["steered"]
    shown = run("steer", "the capital of France is", "-f", f"{name}=3", "--tokens", "4", "--where", "generated")
    assert "as it is" in shown
    assert "nothing to steer" in run("steer", "text", code=2)


def test_a_suites_index_is_written_as_a_bundle_and_read(run, tmp_path):
    run("index", "--to", str(tmp_path / "bundle"), "--out", str(tmp_path / "none"))
    (source,) = (tmp_path / "bundle" / "v1").glob("*/1-gemscope-resid-post")
    done = CliRunner().invoke(app, ["index", "--from", str(source), "--out", str(tmp_path / "read")])
    assert done.exit_code == 0, done.output
    assert FeatureIndex.open(tmp_path / "read").names == ("1-gemscope-resid-post",)
