"""Neuronpedia's layout and Gemma Scope 2's examples: written with the published fields, and read back as they were."""

import gzip
import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from gemscope.artifacts.config import DictionaryConfig, Loaded
from gemscope.artifacts.examples import Examples
from gemscope.core.errors import FormatError, InputError, OccupiedError
from gemscope.core.sites import Site
from gemscope.features.blocks import LiveRows
from gemscope.features.config import IndexConfig
from gemscope.features.database import Label, add_labels
from gemscope.features.index import FeatureIndex, index
from gemscope.features.neuronpedia import ACTIVATION_FIELDS, FEATURE_FIELDS, export_bundle, import_bundle
from gemscope.features.scope_examples import export_examples, import_examples
from unit.dictionaries.zoo import random_dictionary
from unit.models.tiny_gemma import TEXTS, gemma

LONG = "大阪は日本の都市です。東京は日本の首都です。京都は古い都です。🙂"
"""A run of byte tokens much longer than the window around an example and what is read beside it."""
ALL = (*TEXTS, "🙂🙂 like über", "Paris 🙂 is long", "today we like 🙂", LONG, "we\u2028like\x85Paris\u2029today")
CONFIG = IndexConfig(top=4, groups=3, per_group=2, sample=30, window=3, promoted=4)

# As the bulk export publishes them; what its own exporter leaves out may be missing.
PUBLISHED = {
    "features": """modelId layer index creatorId sourceSetName maxActApprox frac_nonzero freq_hist_data_bar_heights
        freq_hist_data_bar_values logits_hist_data_bar_heights logits_hist_data_bar_values neg_str neg_values pos_str
        pos_values neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices
        correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices correlated_features_pearson
        correlated_features_l1 decoder_weights_dist topkCosSimIndices topkCosSimValues hasVector vector vectorLabel
        hookName vectorDefaultSteerStrength""",
    "activations": """id modelId layer index creatorId dataSource dataIndex tokens values maxValue minValue
        maxValueTokenIndex qualifyingTokenIndex binMin binMax binContains dfaValues dfaMaxValue dfaTargetIndex
        lossValues logitContributions createdAt""",
    "explanations": """id modelId layer index authorId description embedding typeName explanationModelName notes
        umap_x umap_y umap_cluster""",
}
LEFT_OUT = {
    "features": {"correlated_features_indices", "correlated_features_pearson", "correlated_features_l1"},
    "activations": {"createdAt", "dataIndex", "lossValues", "logitContributions"},
    "explanations": {"umap_x", "umap_y", "umap_cluster"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An index of the tiny model over texts with characters of several bytes."""
    model = gemma("gemma3")
    items = [model.tokens(text) for text in ALL]
    sae = random_dictionary("sae", d_in=24, d_sae=20, dtype=torch.float32)
    clt = random_dictionary("clt", d_in=24, d_out=24, d_sae=5, n=4, dtype=torch.float32)
    reads, writes = ([Site(name, layer) for layer in range(4)] for name in ("mlp_in", "mlp_out"))
    loaded = {
        "resid_post.2": Loaded(sae, DictionaryConfig.of(sae, Site("resid_post", 2), model="tiny")),
        "clt.mlp_in.all": Loaded(clt, DictionaryConfig.of(clt, reads, writes, model="tiny")),
    }
    rows = LiveRows(model, items)
    built = index(tmp_path_factory.mktemp("made") / "i", rows, loaded, CONFIG, gemma=model)
    about = {"explanationModelName": "nobody", "notes": "a guess"}
    add_labels(built.database.path, [Label(3, "smiling faces 🙂", "np_max-act", 0.5, about)])
    return model, FeatureIndex.open(built.folder), loaded


def lines(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line]


def batches(folder, kind):
    return [row for path in sorted(folder.rglob(f"{kind}/*.jsonl.gz")) for row in lines(path)]


def test_the_export_has_the_published_fields(made, tmp_path):
    _, built, loaded = made
    written = export_bundle(built, tmp_path, loaded)
    assert all(path.is_file() for path in written)
    sources = sorted(path.name for path in (tmp_path / "v1" / "tiny-gemma3").iterdir())
    assert sources == ["0-gemscope-clt-mlp-in-all", "2-gemscope-resid-post"]
    for kind, text in PUBLISHED.items():
        rows = batches(tmp_path, kind)
        assert rows
        for row in rows:
            assert set(text.split()) - set(row) == LEFT_OUT[kind]
            assert set(row) <= set(text.split())
            assert isinstance(row["index"], str)
    features = batches(tmp_path, "features")
    assert len(features) == len(built)
    feature = next(row for row in features if row["layer"].startswith("2") and row["index"] == "7")
    assert feature["hookName"] == "blocks.2.hook_resid_post"
    torch.testing.assert_close(torch.tensor(feature["vector"]), loaded["resid_post.2"].dictionary.W_dec[7])
    page = built.feature("resid_post.2/7")
    assert sum(feature["freq_hist_data_bar_heights"]) == page.count
    assert feature["frac_nonzero"] == page.count / built.about["tokens"]
    assert list(FEATURE_FIELDS) == list(feature)
    for row in batches(tmp_path, "activations"):
        assert list(ACTIVATION_FIELDS) == list(row)
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
        low, high = row["binMin"], row["binMax"]
        assert low == high == -1 or low <= row["values"][row["qualifyingTokenIndex"]] <= high


def test_the_intervals_of_the_groups_share_all_activations_out(made, tmp_path):
    model, built, loaded = made
    export_bundle(built, tmp_path)
    items = [model.tokens(text) for text in ALL]
    acts = torch.cat([model.capture(one, ["resid_post.2"])["resid_post.2"][0][one.content_mask] for one in items])
    acts = loaded["resid_post.2"].dictionary.encode(acts).detach()
    rows = [row for row in batches(tmp_path, "activations") if row["layer"].startswith("2-") and row["binMin"] != -1]
    checked = 0
    for latent in range(20):
        mine = [row for row in rows if row["index"] == str(latent)]
        groups = sorted({(row["binMin"], row["binMax"], row["binContains"]) for row in mine})
        if not groups:
            continue
        active = acts[:, latent][acts[:, latent] > 0]
        assert groups[0][0] <= active.min() < active.max() <= groups[-1][1]
        assert sum(share for *_, share in groups) == pytest.approx(1)
        for (_, high, _), (low, _, _) in pairwise(groups):
            assert high == low
        for low, high, share in groups:
            true = ((active >= low) & (active <= high)).float().mean()
            assert share == pytest.approx(float(true), abs=0.25)
            checked += abs(share - float(true)) < 0.1
    assert checked > 25


def test_characters_of_several_bytes_are_whole_and_pieces_make_the_text(made, tmp_path):
    _, built, _ = made
    export_bundle(built, tmp_path)
    joined = {"".join(row["tokens"]) for row in batches(tmp_path, "activations")}
    assert any("🙂" in text for text in joined)
    assert not any("<0x" in text or "\ufffd" in text for text in joined)
    assert len(LONG.encode()) > 60
    cut = {text for text in joined if text and text in LONG}
    assert cut
    assert any(LONG.find(text) > 12 for text in cut)


def test_a_page_shows_the_characters_of_a_long_run_of_bytes(made):
    model, built, _ = made
    spans = model.tokens(LONG).offsets
    words = ["<bos>"] + [LONG[a:b] if (a, b) != before else "" for before, (a, b) in pairwise(spans)]
    pages = [built.feature(f"resid_post.2/{latent}", before=5, after=4) for latent in range(20)]
    shown = [example for page in pages for example in page.top if example.doc == len(TEXTS) + 3]
    assert max(example.position for example in shown) > 12
    for example in shown:
        assert list(example.tokens) == words[example.position : example.position + len(example.tokens)]


def test_our_export_is_read_back(made, tmp_path):
    _, built, loaded = made
    export_bundle(built, tmp_path / "out", loaded)
    back = import_bundle(tmp_path / "out", tmp_path / "in")
    names = {"resid_post.2": "2-gemscope-resid-post", "clt.mlp_in.all": "0-gemscope-clt-mlp-in-all"}
    for name, size in built.sizes.items():
        for latent in range(size):
            one = built.feature(f"{name}/{latent}", before=3, after=3)
            two = back.feature(f"{names[name]}/{latent}", before=None, after=None)
            for part in ("count", "density", "peak"):
                assert getattr(one, part) == getattr(two, part)
            assert [n for _, n in one.histogram] == [n for _, n in two.histogram]
            assert [c for c, _ in one.histogram] == pytest.approx([c for c, _ in two.histogram], rel=1e-6)
            assert [v for _, v in one.promoted] == [v for _, v in two.promoted]
            assert [r.value for r in one.nearest] == [r.value for r in two.nearest]
            groups = [group for group in one.groups if group]
            assert len(groups) == len([group for group in two.groups if group])
            for ours, theirs in zip((one.top, *groups), (two.top, *two.groups), strict=False):
                assert [(e.tokens, e.values, e.marked) for e in ours] == [
                    (e.tokens, e.values, e.marked) for e in theirs
                ]
            assert [(x.text, x.source, x.about) for x in one.labels] == [
                (x.text, x.source, x.about) for x in two.labels
            ]


def test_a_bundle_that_was_read_is_written_as_it_was(made, tmp_path):
    _, built, _ = made
    export_bundle(built, tmp_path / "first")
    first = import_bundle(tmp_path / "first", tmp_path / "in")
    export_bundle(first, tmp_path / "second")
    for kind in PUBLISHED:
        assert batches(tmp_path / "first", kind) == batches(tmp_path / "second", kind)


def theirs() -> dict[str, list[dict]]:
    """A feature as Neuronpedia's own exporter writes it: intervals of [0, max], whole passages."""
    key = {"modelId": "gemma-3-4b-it", "layer": "12-gemmascope-2-res-16k", "index": "5"}
    tokens, values = ["<bos>", "The", " cat", " sat", "\n"], [0, 0, 3.25, 0, 0.125]
    feature = {**{name: [] for name in FEATURE_FIELDS}, **key, "maxActApprox": 3.25, "frac_nonzero": 0.00012}
    feature |= {"freq_hist_data_bar_heights": [7, 0, 1], "freq_hist_data_bar_values": [0.5, 1.5, 2.5]}
    feature |= {"pos_str": [" cats", "猫"], "pos_values": [1.5, 1.25], "neg_str": ["é"], "neg_values": [-0.5]}
    act = {"id": "a", **key, "tokens": tokens, "values": values, "maxValue": 3.25, "maxValueTokenIndex": 2}
    acts = [{**act, "binMin": -1, "binMax": 3.25, "binContains": -1}]
    acts += [{**act, "binMin": 0, "binMax": 0.65, "binContains": 0.99, "qualifyingTokenIndex": 4}]
    said = {"id": "e", **key, "description": "cats", "typeName": "oai_token-act-pair", "explanationModelName": "gpt"}
    return {"features": [feature], "activations": acts, "explanations": [said]}


def test_a_bundle_of_their_own_is_read(tmp_path):
    place = tmp_path / "v1" / "gemma-3-4b-it" / "12-gemmascope-2-res-16k"
    for kind, rows in theirs().items():
        (place / kind).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / kind / "batch-0.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    built = import_bundle(tmp_path / "v1", tmp_path / "i")
    page = built.feature("12-gemmascope-2-res-16k/5", before=None, after=None)
    assert page.density == 0.00012
    assert page.peak == 3.25
    assert page.promoted == ((" cats", 1.5), ("猫", 1.25))
    assert page.top[0].tokens == ("<bos>", "The", " cat", " sat", "\n")
    assert page.top[0].values == (0, 0, 3.25, 0, 0.125)
    assert page.groups[0][0].marked == 4
    assert [label.text for label in page.labels] == ["cats"]
    assert len(np.load(built.folder / "starts.npy")) == 1
    assert built.feature("12-gemmascope-2-res-16k/0").count == 0
    damaged = place / "features" / "batch-0.jsonl.gz"
    damaged.write_bytes(damaged.read_bytes()[:30])
    with pytest.raises(FormatError, match="damaged"):
        import_bundle(tmp_path / "v1", tmp_path / "j")
    model = gemma("gemma3")
    sae = random_dictionary("sae", d_in=24, d_sae=6, dtype=torch.float32)
    loaded = {"a": Loaded(sae, DictionaryConfig.of(sae, Site("resid_post", 2), model="tiny"))}
    with pytest.raises(OccupiedError, match="an index that was imported; choose another folder with --out"):
        index(built.folder, LiveRows(model, [model.tokens("hello")]), loaded, CONFIG, gemma=model)
    with pytest.raises(InputError, match="are strings, not a model's"):
        export_examples(built, "12-gemmascope-2-res-16k", tmp_path / "examples")
    with pytest.raises(InputError, match="not empty"):
        export_bundle(built, tmp_path / "again")
        import_bundle(tmp_path / "again", tmp_path / "i")


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("explanations", {"description": None}, "row 1 of .*explanations.* has no description; fetch"),
        ("explanations", {"index": "x"}, "has the index 'x', which is no latent; fetch"),
        ("activations", {"index": None}, "row 1 of .*activations.* has no index; fetch"),
        ("features", {"index": "-1"}, "has the index '-1', which is no latent; fetch"),
    ],
)
def test_a_row_of_a_bundle_without_its_parts_is_named(tmp_path, kind, change, said):
    place = tmp_path / "v1" / "gemma-3-4b-it" / "12-gemmascope-2-res-16k"
    for name, rows in theirs().items():
        (place / name).mkdir(parents=True)
        changed = [{**row, **(change if name == kind else {})} for row in rows]
        kept = [{key: value for key, value in row.items() if value is not None} for row in changed]
        (place / name / "batch-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    with pytest.raises(FormatError, match=said):
        import_bundle(tmp_path / "v1", tmp_path / "i")


def test_examples_of_gemma_scope_2_are_written_and_read_back(made, tmp_path):
    model, built, _ = made
    export_examples(built, "resid_post.2", tmp_path / "out")
    opened = Examples.open(tmp_path / "out")
    assert opened.d_sae == 20
    back = import_examples(tmp_path / "out", tmp_path / "in", model, name="resid_post.2")
    for latent in range(20):
        one = built.feature(f"resid_post.2/{latent}", before=None, after=None)
        two = back.feature(f"resid_post.2/{latent}", before=None, after=None)
        assert (one.density, one.peak, one.promoted) == (two.density, two.peak, two.promoted)
        assert [e.value for e in one.top] == [e.value for e in two.top]
        for ours, others in zip(one.top, two.top, strict=True):
            assert others.tokens[: len(ours.tokens)] == ours.tokens
            assert others.marked == ours.marked
