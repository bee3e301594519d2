"""find, feature, steer and index on a whole suite of the tiny model, as a user types them."""

import json

import pytest
import torch
from typer.testing import CliRunner

from gemscope.cli.main import app
from gemscope.features.index import FeatureIndex
from gemscope.features.steering import Steer, interventions, selection
from gemscope.models.gemma import Gemma
from gemscope.suites.indexing import dictionaries_of, open_index
from gemscope.suites.suite import Suite


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


def test_features_that_raise_a_token_are_found_by_trying_them(run, tiny_suite, tiny_folder):
    prompts = ["the capital of France is", "we like long"]
    words = ["find", "--raises", "Paris", "--on", prompts[0], "--on", prompts[1], "-k", "3"]
    found = json.loads(run(*words, "--json"))
    suite, gemma = Suite.open(tiny_suite), Gemma.load(tiny_folder, check=False)
    index, dictionaries = open_index(suite), dictionaries_of(suite.folder, suite.sites, suite.others)
    ids = torch.tensor(index.pieces.ids_of(["Paris", "▁Paris", " Paris"]))
    for one in found:
        shares = []
        for strength in (0.0, one["strength"]):
            steer, each = Steer.of(index, one["id"], strength=strength), []
            for text in prompts:
                tokens = gemma.tokens(text)
                changes = interventions(dictionaries, [steer], selection(tokens, "prompt")[0], "prefill")
                each.append(gemma.logits(tokens, interventions=changes)[0, -1].float().softmax(-1)[ids].sum())
            shares.append(float(torch.stack(each).mean()))
        assert one["score"] == pytest.approx(shares[1] / shares[0], rel=1e-3)
    assert len(found) == 3
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
    shown = run(*words)
    assert all(one["id"] in shown for one in found)
    assert "strength" in shown
    assert "at least one prompt" in run("find", "--raises", "Paris", code=2)
    assert "no single token" in run("find", "--raises", "zyzzyva", "--on", "the", code=2)


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
