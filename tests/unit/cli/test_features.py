"""find, feature, steer and index on a whole suite of the tiny model, as a user types them."""

import gzip
import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from gemscope.activations.store import Store
from gemscope.artifacts import native
from gemscope.artifacts.config import DictionaryConfig
from gemscope.artifacts.examples import Examples
from gemscope.cli.main import app
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.features.config import IndexConfig
from gemscope.features.database import Label, add_labels
from gemscope.features.index import FeatureIndex
from gemscope.features.meaning import TextModel, by_meaning
from gemscope.features.steering import Steer, interventions, selection
from gemscope.models.gemma import Gemma
from gemscope.suites.indexing import dictionaries_of, open_index
from gemscope.suites.suite import Suite
from unit.activations import small
from unit.dictionaries.zoo import random_dictionary


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
    assert "all control tokens" in run("find", "--text", "<start_of_turn>", code=2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("x", "--at", "y"), "--at goes with --text only"),
        (("x", "--by-token"), "--by-token goes with --text only"),
        (("x", "--max-density", "0"), "--max-density goes with --text only"),
        (("--promotes", "Paris", "--on", "the"), "--on goes with --raises only"),
        (("x", "--embed", "model"), "--embed goes with --meaning only"),
        (("--promotes", ""), "the token is empty"),
        (("--raises", " ", "--on", "the"), "the token is empty"),
    ],
)
def test_what_would_do_nothing_is_refused(run, words, expected):
    assert expected in run("find", *words, code=2)


def test_labels_are_searched_by_meaning_with_the_command_that_the_error_says(tiny_suite, tiny_folder, tmp_path):
    copy = shutil.copytree(open_index(Suite.open(tiny_suite)).folder, tmp_path / "index")
    made, embedder = FeatureIndex.open(copy), TextModel(str(tiny_folder))
    with pytest.raises(InputError, match="have no vectors") as error:
        by_meaning(made, embedder, "town")
    words = str(error.value).partition("make them with: gemscope ")[2].split()
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [hit["id"] for hit in found] == [hit.id for hit in by_meaning(made, embedder, "WORDS", 10)]
    add_labels(made.database.path, [Label(7, "WORDS", "explainer")])
    with pytest.raises(InputError, match="have changed"):
        by_meaning(made, embedder, "town")
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert found[0]["id"] == str(made.id_of(7))


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


def test_each_feature_can_be_steered_in_its_own_mode(run, tiny_suite):
    peaks = open_index(Suite.open(tiny_suite)).latents("resid_post.1").records["peak"]
    one, two, three, four = (f"resid_post.1/{latent}" for latent in peaks.nonzero()[0][:4])
    how = ["-f", f"{one}=ablate", "-f", f"{two}=clamp:1.5", "-f", f"{three}=-3", "-f", four, "--strength", "2"]
    done = json.loads(run("steer", "the capital of France", *how, "--tokens", "1", "--json"))
    assert [(f"resid_post.1/{s['latent']}", s["mode"], s["strength"]) for s in done["steers"]] == [
        (one, "ablate", 2.0),
        (two, "clamp", 1.5),
        (three, "add", -3.0),
        (four, "add", 2.0),
    ]
    done = json.loads(run("steer", "the", "-f", one, "-f", f"{two}=add", "--mode", "ablate", "--tokens", "1", "--json"))
    assert [s["mode"] for s in done["steers"]] == ["ablate", "add"]
    for bad, expected in (
        ("=ablate:2", "to ablate has none"),
        ("=push", "neither a strength nor a mode"),
        ("=push:2", "cannot steer by 'push'"),
        ("=clamp:", "ends too early"),
        ("=:2", "ends too early"),
        ("=", "ends too early"),
    ):
        assert expected in run("steer", "the", "-f", one + bad, code=2)


def test_a_suites_index_is_written_as_a_bundle_and_read(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("index", "--to", str(tmp_path / "bundle"))
    (source,) = (tmp_path / "bundle" / "v1").glob("*/1-gemscope-resid-post")
    call("index", "--from", source, "--out", tmp_path / "read")
    assert FeatureIndex.open(tmp_path / "read").names == ("1-gemscope-resid-post",)
    said = call("index", "--to", tmp_path / "more", "--out", tmp_path / "none", code=2)
    assert "there is no index in" in said
    assert not (tmp_path / "more").exists()
    call("index", "--to", tmp_path / "more", "--out", tmp_path / "read")
    shutil.copytree(tmp_path / "read", tmp_path / "index")  # made without --out
    call("index", "--to", tmp_path / "again")
    assert list((tmp_path / "more").rglob("*.gz"))
    assert [p.name for p in (tmp_path / "more" / "v1").glob("*/*")] == [
        p.name for p in (tmp_path / "again" / "v1").glob("*/*")
    ]


def call(*words, code=0):
    """A command of its own."""
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})
    assert done.exit_code == code, (done.output, done.exception)
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, tiny_folder):
    """A store, a dictionary ``sae``, and an index made by the command, with sizes of its own."""
    folder = tmp_path_factory.mktemp("indexed")
    small.store(folder / "store", source=small.corpus(20))
    sae = random_dictionary("sae", d_in=24, d_sae=20, dtype=torch.float32)
    native.save(folder / "sae", sae, DictionaryConfig.of(sae, Site("resid_post", 0), model="tiny"))
    sizes = ("--top", 3, "--groups", 2, "--per-group", 1, "--sample", 9, "--window", 4, "--seed", 5)
    words = ("--store", folder / "store", "-d", folder / "sae", "--model", tiny_folder, "--out", folder / "index")
    call("index", *words, *sizes)
    return folder


def test_an_index_has_the_sizes_that_are_asked_for(indexed):
    made = FeatureIndex.open(indexed / "index")
    asked = IndexConfig(top=3, groups=2, per_group=1, sample=9, window=4, seed=5)
    assert made.about["config"] == asked.as_dict()
    pages = [made.feature(f"sae/{latent}") for latent in range(20)]
    assert max(len(page.top) for page in pages) == 3
    assert max(len(group) for page in pages for group in page.groups) == 1
    assert all(len(page.groups) == 2 for page in pages)


def test_a_bundle_has_the_directions_of_dictionaries_that_are_named(indexed, tmp_path):
    call("index", "--out", indexed / "index", "--to", tmp_path / "with", "-d", indexed / "sae")
    (path,) = (tmp_path / "with").rglob("features/*.gz")
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line]
    W = random_dictionary("sae", d_in=24, d_sae=20, dtype=torch.float32).W_dec
    torch.testing.assert_close(torch.tensor([row["vector"] for row in rows]), W.detach())
    assert all(row["hasVector"] for row in rows)
    shutil.copytree(indexed / "sae", tmp_path / "other")
    said = call("index", "--out", indexed / "index", "--to", tmp_path / "no", "-d", tmp_path / "other", code=2)
    assert "the index has no dictionary other; it has sae." in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--to {0}/b --store {0}/store", "--store and --to do not go together"),
        ("--to {0}/b --top 5", "--top does nothing here beside --to"),
        ("--to {0}/b --json", "--json does nothing here beside --to"),
        ("--to {0}/b --examples -d {0}/sae", "--dictionary does nothing here beside --to"),
        ("--from {0}/b --slice 1/9", "--slice does nothing here beside --from"),
        ("--from {0}/b --top 5", "--top does nothing here beside --from"),
        ("--store {0}/store -d {0}/sae --examples", "--examples does nothing here beside --store"),
        ("--store {0}/store -d {0}/sae -d {0}/sae", "have the same name"),
    ],
)
def test_options_that_would_do_nothing_are_refused(indexed, tmp_path, words, said):
    assert said in call("index", *words.format(indexed).split(), "--out", tmp_path / "none", code=2)
    assert not list(tmp_path.iterdir())


def test_directions_of_another_dictionary_of_that_name_are_refused(indexed, tmp_path):
    other = random_dictionary("sae", d_in=24, d_sae=9, dtype=torch.float32)
    native.save(tmp_path / "sae", other, DictionaryConfig.of(other, Site("resid_post", 0), model="tiny"))
    said = call("index", "--out", indexed / "index", "--to", tmp_path / "no", "-d", tmp_path / "sae", code=2)
    assert "sae has 9 latents, in the index 20" in said
    assert not (tmp_path / "no").exists()


def test_examples_of_gemma_scope_2_are_written_and_read(indexed, tiny_folder, tmp_path):
    call("index", "--out", indexed / "index", "--to", tmp_path / "out", "--examples")
    assert Examples.open(tmp_path / "out" / "sae").d_sae == 20
    assert "give its model with --model" in call("index", "--from", tmp_path / "out" / "sae", code=2)
    read = ("index", "--from", tmp_path / "out" / "sae", "--out", tmp_path / "read", "--model", tiny_folder)
    call(*read, "--top", 2)
    one, two = FeatureIndex.open(indexed / "index"), FeatureIndex.open(tmp_path / "read")
    for latent in range(20):
        ours, theirs = (index.feature(f"sae/{latent}", before=None, after=None) for index in (one, two))
        assert [(e.tokens[e.marked], e.value) for e in ours.top[:2]] == [
            (e.tokens[e.marked], e.value) for e in theirs.top
        ]


def test_a_store_is_indexed_with_the_revision_of_its_model(indexed, tmp_path, monkeypatch):
    asked = []
    opened = Store.open(indexed / "store")
    opened.plan.config.update(model="google/gemma-3-1b-pt", revision="abc")
    monkeypatch.setattr(Store, "open", lambda *_, **__: opened)
    monkeypatch.setattr(Gemma, "load", lambda name, revision=None, **_: asked.append((name, revision)) or small.model())
    words = ("index", "--store", indexed / "store", "-d", indexed / "sae")
    call(*words, "--out", tmp_path / "a")
    call(*words, "--out", tmp_path / "b", "--model", "other")
    assert asked == [("google/gemma-3-1b-pt", "abc"), ("other", None)]
