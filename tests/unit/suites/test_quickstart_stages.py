"""A suite is built stage by stage; what is there is kept, what depends on a change is made again."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from gemscope.activations.sets import ActivationSet
from gemscope.core.errors import FormatError, InputError
from gemscope.suites import quickstart as module
from gemscope.suites.config import QuickstartConfig
from gemscope.suites.indexing import open_index
from gemscope.suites.quickstart import quickstart, weights_hash
from gemscope.suites.suite import Suite, dictionary_folder, evaluation_path
from unit.models import tiny_gemma

CONFIG = QuickstartConfig(
    tokens=2500, heldout_tokens=2500, splice_tokens=300, d_sae=32, target_l0=5.0, steps=3, batch_size=256
)


@pytest.fixture(scope="module")
def model():
    return tiny_gemma.gemma("gemma3", max_position_embeddings=2048)


def run(model, folder, config=CONFIG):
    """Build and say which stages of the headline worked (True) and which were kept (False)."""
    suite, worked = run_all(model, folder, config)
    return suite, {stage: new for stage, new in worked.items() if stage != "index" and not stage.endswith(" more")}


def run_all(model, folder, config=CONFIG):
    """The same, with the stages of the other kinds."""
    worked = {}
    suite = quickstart("tiny", folder, config, report=lambda p: worked.__setitem__(p.stage, not p.reused), gemma=model)
    return suite, worked


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "suite"
    return run(model, folder)


@pytest.fixture
def copy(built, tmp_path):
    shutil.copytree(built[0].folder, tmp_path / "suite")
    return tmp_path / "suite"


def test_a_suite_holds_a_dictionary_and_its_measures_for_every_layer(built, model):
    suite, worked = built
    assert worked == {"text": True, "harvest": True, "train": True, "evaluate": True}
    opened = Suite.open(suite.folder)
    assert opened.sites == tuple(model.every_layer("resid_post")) == suite.sites
    rows = ActivationSet.load(suite.folder / "activations")
    assert rows.rows >= 2500
    assert rows.sites == list(suite.sites)
    for site in suite.sites:
        assert opened.dictionary(site).d_sae == 32
        evaluation = opened.evaluation(site)
        assert evaluation.site == site
        assert evaluation.fidelity.rows >= 2500
        assert evaluation.concepts is not None
    assert opened.about["config"]["tokens"] == 2500
    assert opened.about["weights_sha256"] == weights_hash(model)


def test_a_suite_holds_one_of_every_other_kind_and_remakes_only_those(built, copy, model):
    suite, _ = built
    kinds = [suite.other(name).config.kind for name in suite.others]
    assert kinds == ["sae", "sae", "transcoder", "skip_transcoder", "clt", "crosscoder"]
    for name in suite.others:
        loaded = suite.other(name)
        measured = loaded.config.extra["evaluation"]
        assert measured["l0"] > 0
        assert measured["loss"]["predictions"] > 0
        assert not loaded.warnings
    weights = suite.other(suite.others[-1]).dictionary.W_enc[0]
    shutil.rmtree(copy / "others" / suite.others[0])
    again, worked = run_all(model, copy)
    assert worked == {
        "train": False,
        "evaluate": False,
        "harvest more": True,
        "train more": True,
        "index": False,
    }
    assert torch.equal(again.other(suite.others[-1]).dictionary.W_enc[0], weights)
    with pytest.raises(InputError, match="its others are"):
        again.other("nothing")


def test_a_suite_ends_with_an_index_of_all_its_dictionaries(built, copy, model):
    suite, _ = built
    index = open_index(suite)
    assert index.names == (*map(str, suite.sites), *suite.others)
    assert index.about["tokens"] >= 2500
    for site in suite.sites:
        concepts = suite.evaluation(site).concepts
        for latent, name in enumerate(concepts.latent_concept):
            labels = [x.text for x in index.feature(f"{site}/{latent}").labels if x.source == "concept"]
            assert name is None or name.replace("_", " ") in labels
    shutil.rmtree(copy / "index")
    with pytest.raises(FormatError, match="gemscope quickstart"):
        open_index(Suite.open(copy))
    _, worked = run_all(model, copy)
    assert worked == {"train": False, "evaluate": False, "train more": False, "index": True}
    for path in (suite.folder / "index").rglob("*.npy"):
        assert path.read_bytes() == (copy / path.relative_to(suite.folder)).read_bytes()


def test_a_second_run_keeps_everything(copy, model):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    _, worked = run(model, copy)
    assert worked == {"train": False, "evaluate": False}
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before


def test_only_what_is_missing_or_damaged_is_made_again_and_comes_out_the_same(copy, model):
    suite = Suite.open(copy)
    gone, damaged, *_ = suite.sites
    weights = {site: suite.dictionary(site).W_dec.clone() for site in suite.sites}
    untouched = (dictionary_folder(copy, suite.sites[2]) / "dictionary.json").stat().st_mtime_ns
    shutil.rmtree(dictionary_folder(copy, gone))
    path = dictionary_folder(copy, damaged) / "dictionary.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    evaluation_path(copy, gone).write_text("{")
    _, worked = run(model, copy)
    assert worked == {"harvest": False, "train": True, "evaluate": True}
    for site in suite.sites:
        assert torch.equal(suite.dictionary(site).W_dec, weights[site])
    assert (dictionary_folder(copy, suite.sites[2]) / "dictionary.json").stat().st_mtime_ns == untouched
    assert suite.evaluation(gone).site == gone


@pytest.mark.parametrize(
    ("change", "worked"),
    [
        ({"splice_tokens": 200}, {"train": False, "evaluate": True}),
        ({"steps": 4}, {"harvest": False, "train": True, "evaluate": True}),
        ({"seed": 1}, {"text": True, "harvest": True, "train": True, "evaluate": True}),
    ],
)
def test_a_changed_configuration_remakes_what_depends_on_it(copy, model, change, worked):
    suite, seen = run(model, copy, replace(CONFIG, **change))
    assert seen == worked
    assert suite.about["config"] == CONFIG.as_dict() | change


def test_other_weights_remake_everything(copy):
    other = tiny_gemma.gemma("gemma3", max_position_embeddings=2048, seed=1)
    assert all(run(other, copy)[1].values())


def test_a_run_that_stops_in_training_keeps_the_harvest_and_says_the_suite_is_not_whole(model, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "suite")
    assert ActivationSet.load(tmp_path / "suite" / "activations").rows >= 2500
    assert sorted(path.name for path in (tmp_path / "suite").iterdir()) == ["activations"]
    with pytest.raises(FormatError, match="no finished suite"):
        Suite.open(tmp_path / "suite")
    _, worked = run(model, tmp_path / "suite")
    assert worked == {"harvest": False, "train": True, "evaluate": True}


def test_a_suite_under_change_is_not_called_whole(copy, model, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, copy, replace(CONFIG, steps=5))
    assert not (copy / "suite.json").exists()


def test_leftovers_of_a_killed_run_are_swept_and_nothing_else(copy, model):
    (copy / "dictionaries" / ".resid_post.0.abc.tmp").mkdir()
    (copy / ".activations.abc.tmp").mkdir()
    (copy / "evaluation" / ".resid_post.0.json.abc.tmp").write_text("")
    (copy / ".mine.tmp").write_text("kept")
    run(model, copy)
    assert [path.name for path in copy.rglob(".*")] == [".mine.tmp"]


def test_a_damaged_suite_file_is_made_again(copy, model):
    (copy / "suite.json").write_text("{")
    _, worked = run(model, copy)
    assert worked == {"train": False, "evaluate": False}
    assert Suite.open(copy).model == "tiny"


def test_a_changed_text_generator_remakes_everything(copy, model, monkeypatch):
    monkeypatch.setattr(module, "fingerprint", lambda *_: "other")
    assert all(run(model, copy)[1].values())


def test_the_folder_of_another_model_is_not_touched(copy, model):
    with pytest.raises(InputError, match="holds the suite of tiny, not of other"):
        quickstart("other", copy, CONFIG, gemma=model)
    assert Suite.open(copy).model == "tiny"


@pytest.mark.parametrize(("d_sae", "prefixes"), [(1024, (32, 128, 512)), (33, (1, 4, 16)), (9, (1, 4)), (1, ())])
def test_every_dictionary_holds_smaller_ones(model, d_sae, prefixes):
    (site, *_) = model.every_layer("resid_post")
    assert replace(CONFIG, d_sae=d_sae, target_l0=0.5).train_config(site).prefixes == prefixes


def test_a_config_is_the_same_after_json():
    assert json.loads(json.dumps(CONFIG.as_dict())) == CONFIG.as_dict()


def test_a_dictionary_may_be_plain(model):
    (site, *_) = model.every_layer("resid_post")
    assert replace(CONFIG, nested_parts=()).train_config(site).prefixes == ()
