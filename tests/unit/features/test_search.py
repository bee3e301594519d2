"""What is searched for is found, in the order that is promised, and nothing else."""

import shutil

import numpy as np
import pytest
import torch

from gemscope.artifacts.config import DictionaryConfig, Loaded
from gemscope.core.errors import FormatError, InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.sae import SAE
from gemscope.features import database, layout, search
from gemscope.features.blocks import LiveRows
from gemscope.features.config import IndexConfig
from gemscope.features.database import Label, add_labels
from gemscope.features.effective import best_to_steer
from gemscope.features.effects import nearest, promoted
from gemscope.features.index import FeatureIndex, index
from gemscope.features.meaning import TextModel, by_meaning, embed_labels
from gemscope.features.scope_examples import export_examples, import_examples
from gemscope.features.spelling import readable
from gemscope.features.steering import Steer, steer
from unit.dictionaries.zoo import random_dictionary
from unit.features import brute
from unit.models.tiny_gemma import TEXTS, gemma

CONFIG = IndexConfig(top=3, groups=2, per_group=2, sample=8, window=2, promoted=6, nearest=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An index of two SAEs, a transcoder and a CLT of the tiny model, with labels."""
    model = gemma("gemma3")
    dictionaries = {
        "resid_post.1": (random_dictionary("sae", d_in=24, d_sae=20, dtype=torch.float32), "resid_post"),
        "z.1": (random_dictionary("sae", d_in=32, d_sae=9, dtype=torch.float32), "z"),
        "transcoder": (random_dictionary("transcoder", d_in=24, d_out=24, d_sae=11, dtype=torch.float32), "mlp"),
        "clt": (random_dictionary("clt", d_in=24, d_out=24, d_sae=5, n=4, dtype=torch.float32), "clt"),
    }
    loaded = {}
    for name, (one, kind) in dictionaries.items():
        if kind == "clt":
            reads, writes = ([Site(s, layer) for layer in range(4)] for s in ("mlp_in", "mlp_out"))
        elif kind == "mlp":
            reads, writes = Site("mlp_in", 1), Site("mlp_out", 1)
        else:
            reads = writes = Site(kind, 1)
        loaded[name] = Loaded(one, DictionaryConfig.of(one, reads, writes, model="tiny"))
    rows = LiveRows(model, [model.tokens(text) for text in TEXTS])
    built = index(tmp_path_factory.mktemp("made") / "i", rows, loaded, CONFIG, gemma=model)
    number = built.number
    labels = [
        Label(number("resid_post.1/4"), "capital cities of countries", "explainer", 0.9),
        Label(number("resid_post.1/5"), "a city", "explainer", 0.4),
        Label(number("z.1/2"), "city and country names, mostly in Europe", "explainer", 0.7),
        Label(number("clt/7"), "capital", "concept", 0.8),
        Label(number("clt/8"), "capital", "concept", 0.95),
        Label(number("transcoder/1"), "people's first names", "explainer", 0.3),
    ]
    add_labels(built.database.path, labels)
    return model, FeatureIndex.open(built.folder), loaded


def test_words_are_stemmed_all_of_them_count_and_operators_mean_nothing(made):
    _, built, _ = made
    assert {hit.id for hit in search.by_words(built, "cities", source="explainer")} == {
        "resid_post.1/4",
        "resid_post.1/5",
        "z.1/2",
    }
    assert search.by_words(built, "city", source="explainer")[0].id == "resid_post.1/5"
    assert [hit.id for hit in search.by_words(built, "city country", source="explainer")] == ["resid_post.1/4", "z.1/2"]
    assert [hit.id for hit in search.by_words(built, "euro*")] == ["z.1/2"]
    assert [hit.id for hit in search.by_words(built, 'NOT "names" OR (people')] == []
    assert [hit.id for hit in search.by_words(built, "people's")] == ["transcoder/1"]
    with pytest.raises(InputError, match="has no word"):
        search.by_words(built, '"* -')


def test_of_many_hits_the_best_come_first_whenever_they_were_added(tmp_path):
    path = tmp_path / "index.sqlite"
    database.create(path, [("a", 1000, {})])
    made = [Label(i, "cat " + "x " * (2 + i % 7), "s", (i % 10) / 10) for i in range(900)]
    add_labels(path, made[:500])
    add_labels(path, made[500:])
    add_labels(path, [Label(901, "a cat", "s"), Label(902, "cats", "s", 0.2), Label(903, "cat", "t", 0.7)])
    add_labels(path, [Label(904, "cat and dog", "s", float("nan"))])
    base = database.Database(path)
    assert [one.feature for one in base.search("cat dog", 4)] == [904]
    assert [one.feature for one in base.search("cat", 4)] == [903, 902, 901, 49]
    best = sorted(range(900), key=lambda i: (i % 7, -(i % 10), i))
    assert [one.feature for one in base.search("cat x", 900)] == best
    assert [one.feature for one in base.search("cat", 5, "t")] == [903]


def test_a_search_goes_on_until_it_has_as_many_features_as_wanted(tmp_path):
    path = tmp_path / "index.sqlite"
    database.create(path, [("a", 10, {})])
    add_labels(path, [Label(1, f"cat {i}", "s") for i in range(50)] + [Label(i, "one cat here", "s") for i in (2, 3)])
    found = database.Database(path).search("cat", 2)
    assert [one.feature for one in found] == [1] * 50 + [2]


def test_of_a_common_word_only_so_many_hits_are_looked_at_for_a_rare_source(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "LOOKED_AT", 50)
    path = tmp_path / "index.sqlite"
    database.create(path, [("a", 100, {})])
    add_labels(path, [Label(i, "cat", "rare" if i in {7, 60} else "s") for i in range(100)])
    assert [one.feature for one in database.Database(path).search("cat", 5, "rare")] == [7]


def test_labels_of_a_source_are_replaced_and_words_follow(tmp_path):
    path = tmp_path / "index.sqlite"
    database.create(path, [("a", 10, {})])
    add_labels(path, [Label(1, "dogs", "s"), Label(2, "birds", "t")])
    add_labels(path, [Label(3, "cats", "s")], replace=["s"])
    base = database.Database(path)
    assert [one.text for one in base.every_label()] == ["birds", "cats"]
    assert base.search("dogs", 5) == []
    assert [one.feature for one in base.search("cat", 5)] == [3]
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(FormatError, match="damaged"):
        database.Database(path).labels(1)


def test_a_concept_gives_its_features_the_best_first(made):
    _, built, _ = made
    assert [hit.id for hit in search.by_concept(built, "capital")] == ["clt/8", "clt/7"]
    with pytest.raises(InputError, match="there are capital"):
        search.by_concept(built, "animal")


def test_a_text_gives_the_features_that_it_activates(made):
    model, built, loaded = made
    text = "we like Paris"
    tokens = model.tokens(text)
    one = loaded["resid_post.1"]
    every = [model.capture(model.tokens(t), ["resid_post.1"])["resid_post.1"][0, 1:] for t in TEXTS]
    known = one.dictionary.encode(torch.cat(every))
    acts = one.dictionary.encode(model.capture(tokens, ["resid_post.1"])["resid_post.1"][0])
    latents = [i for i in range(20) if (acts[2:, i] > 0).any()]

    def share_above(value: float, latent: int) -> float:
        """Of the index's tokens, those with an activation in a higher bin, and half of those in the same."""
        level = brute.bin_number(value) if value > 0 else -1
        levels = [brute.bin_number(float(v)) if v > 0 else -1 for v in known[:, latent]]
        above = sum(other > level for other in levels) + sum(x == level for x in levels) / 2
        return max(above, 0.5) / len(levels)

    def above_here(value: float, latent: int) -> float:
        """The only other token of the text, at 1."""
        other = float(acts[1, latent])
        return (other > value) + (other == value) / 2

    def chance(value: float, latent: int) -> float:
        return 1 - 0.75 * share_above(value, latent) - 0.25 * above_here(value, latent)

    scores = {i: np.mean([chance(float(a), i) for a in acts[2:, i]]) for i in latents}
    every_token = {i: np.mean([1 - share_above(float(a), i) for a in acts[1:, i]]) for i in latents}
    alone = {"resid_post.1": one}
    assert len(tokens) == 4
    found = search.by_text(built, model, alone, text, top=400, at=[2, 3])
    assert {hit.id: pytest.approx(hit.score, abs=1e-6) for hit in found.hits} == {
        f"resid_post.1/{i}": score for i, score in scores.items()
    }
    nothing_else = search.by_text(built, model, alone, text, top=400, at=[1, 2, 3])
    for hit in nothing_else.hits:
        latent = int(hit.id.split("/")[1])
        assert latent not in every_token or hit.score == pytest.approx(every_token[latent], abs=1e-6)
    whole = search.by_text(built, model, alone, text, top=400)
    for hit in whole.hits:
        latent = int(hit.id.split("/")[1])
        values = [float(a) for a in acts[1:, latent]]
        surprise = [-np.log(share_above(v, latent)) if v > 0 else 0.0 for v in values]
        assert hit.score == pytest.approx(np.mean(surprise), abs=1e-6)
        assert hit.values == pytest.approx(acts[:, latent].tolist(), abs=1e-5)
    found = search.by_text(built, model, loaded, text, top=400)
    assert [hit.score for hit in found.hits] == sorted((hit.score for hit in found.hits), reverse=True)
    assert {hit.id.split("/")[0] for hit in found.hits} == set(loaded)
    last = search.by_text(built, model, loaded, text, top=5, at=[-1])
    assert all(hit.values[-1] > 0 for hit in last.hits)
    capped = search.by_text(built, model, loaded, text, top=400, max_density=0.2)
    assert {hit.id for hit in capped.hits} == {h.id for h in found.hits if h.density <= 0.2}
    with pytest.raises(InputError, match="position 99"):
        search.by_text(built, model, loaded, text, at=[99])
    by_token = search.tokens_to_features(built, model, "z.1", loaded["z.1"], text)
    assert [piece for piece, _ in by_token] == list(tokens.pieces[1:])


def test_without_histograms_what_is_rarer_tells_more(made, tmp_path):
    (model, built, loaded), name = made, "resid_post.1"
    export_examples(built, name, tmp_path / name)
    read = import_examples(tmp_path / name, tmp_path / "i", model, name=name)
    alone, text = {name: loaded[name]}, "we like Paris"
    density = built.latents(name).records["density"]
    acts = alone[name].dictionary.encode(model.capture(model.tokens(text), [name])[name][0])[1:]
    found = search.by_text(read, model, alone, text, top=20).hits
    assert len(found) > 3
    floor = density[density > 0].min() / 2
    for hit in found:
        latent = int(hit.id.split("/")[1])
        share = float((acts[:, latent] > 0).double().mean())
        assert hit.score == pytest.approx(share * -np.log(max(density[latent] / 2, floor)), abs=1e-6)
    for hit in search.by_text(read, model, alone, text, top=20, at=range(1, len(acts) + 1)).hits:
        latent = int(hit.id.split("/")[1])
        shares = [(density[latent] if a > 0 else 1 + density[latent]) / 2 for a in acts[:, latent]]
        assert hit.score == pytest.approx(1 - np.mean(shares), abs=1e-6)


def test_what_was_never_active_is_no_rarer_than_half_a_token(tmp_path):
    model = gemma("gemma3")
    loaded = {"a": Loaded(one := random_dictionary("sae", d_in=24, d_sae=20, dtype=torch.float32), config_of(one))}
    few = model.tokens("we")
    built = index(tmp_path / "i", LiveRows(model, [few]), loaded, CONFIG, gemma=model)
    tokens = int(few.content_mask.sum())
    assert built.about["tokens"] == tokens
    text = "the capital of France is Paris"
    hits = search.by_text(built, model, loaded, text, top=20).hits
    never = [hit for hit in hits if hit.density == 0]
    assert never
    acts = one.encode(model.capture(model.tokens(text), ["resid_post.1"])["resid_post.1"][0])[1:]
    for hit in never:
        share = float((acts[:, int(hit.id.split("/")[1])] > 0).double().mean())
        assert hit.score == pytest.approx(share * np.log(2 * tokens), abs=1e-6)


def config_of(sae, site="resid_post.1"):
    return DictionaryConfig.of(sae, Site.parse(site), model="tiny")


def test_a_dictionary_of_another_index_or_model_is_named(made, tmp_path):
    model, built, loaded = made
    one = loaded["resid_post.1"]
    for ask in (
        lambda given: search.by_text(built, model, given, "we like"),
        lambda given: search.by_direction(built, given, torch.ones(24)),
        lambda given: best_to_steer(model, built, given, [5], ["we like"]),
    ):
        with pytest.raises(InputError, match=r"none of the dictionaries \(other\) is in the index"):
            ask({"other": one})
        with pytest.raises(InputError, match=r"z\.1 has 20 latents, in the index 9"):
            ask({"z.1": one})
    with pytest.raises(InputError, match=r"is in resid_post\.1, which is not among the dictionaries given \(z\.1\)"):
        search.like(built, {"z.1": loaded["z.1"]}, "resid_post.1/3")
    wide = random_dictionary("transcoder", d_in=24, d_out=32, d_sae=20, dtype=torch.float32)
    config = DictionaryConfig.of(wide, Site("mlp_in", 1), Site("mlp_out", 1), model="a-wider-one")
    for ask in (
        lambda given: search.by_text(built, model, given, "we like"),
        lambda given: steer(model, given, "we like", [Steer("resid_post.1", 3, "clamp")]),
        lambda given: steer(model, given, "we like", [Steer("resid_post.1", 3)]),
        lambda given: best_to_steer(model, built, given, [5], ["we like"]),
    ):
        with pytest.raises(InputError, match=r"resid_post\.1 is of width 32 at mlp_out\.1, .*a-wider-one"):
            ask({"resid_post.1": Loaded(wide, config)})


def test_directions_and_nearest_are_cosines(made):
    _, built, loaded = made
    W = loaded["resid_post.1"].dictionary.W_dec.double()
    unit = W / W.norm(dim=1, keepdim=True)
    own = unit @ unit.T - 3 * torch.eye(20)
    page = built.feature("resid_post.1/6")
    assert [r.feature for r in page.nearest] == [f"resid_post.1/{int(i)}" for i in own[6].topk(3).indices]
    hits = search.like(built, loaded, "resid_post.1/6", top=4)
    assert "resid_post.1/6" not in {hit.id for hit in hits}
    other = loaded["transcoder"].dictionary.W_dec.double()
    cosines = (other / other.norm(dim=1, keepdim=True)) @ unit[6]
    best = max(r.value for r in page.elsewhere if r.feature.startswith("transcoder"))
    assert best == pytest.approx(float(cosines.max()), abs=1e-6)
    assert not any(r.feature.startswith("z.1") for r in page.elsewhere)
    assert search.by_direction(built, loaded, W[6].float(), 1)[0].id == "resid_post.1/6"
    assert search.by_direction(built, loaded, torch.ones(32), 1)[0].id.startswith("z.1")
    with pytest.raises(InputError, match="length zero"):
        search.by_direction(built, loaded, torch.zeros(24))
    alone, _ = nearest(loaded["z.1"], {0: loaded["resid_post.1"]}, 3, same=False)
    assert bool((alone.ids == -1).all())


def test_promoted_tokens_go_through_the_final_gain(made):
    model, built, loaded = made
    gain, U = model.final_gain().double(), model.unembedding().double()
    for name, site in (("resid_post.1", None), ("clt", None), ("z.1", "z")):
        dictionary = loaded[name].dictionary
        if name == "clt":
            layer, own = divmod(7, 5)
            row = sum(dictionary.W_dec[layer][out - layer, own].double() for out in range(layer, 4))
        else:
            row = dictionary.W_dec[7].double()
        if site == "z":
            block = model.decoder.trunk.layers[1]
            row = (block.self_attn.o_proj.weight.double() @ row) * (1 + block.post_attention_layernorm.weight.double())
        effects = U @ (row * gain)
        best = effects.topk(6)
        record = built.latents(name).records[7]
        assert record["promoted"].tolist() == best.indices.tolist()
        assert record["promoted_by"] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert record["suppressed"].tolist() == effects.topk(6, largest=False).indices.tolist()
    page = built.feature("clt/7")
    assert [len(one) for one in page.by_output] == [0, 6, 6, 6]
    direction = loaded["clt"].dictionary.W_dec[1][2, 2].double()
    effects = U @ (direction * gain)
    token = int(effects.argmax())
    assert page.by_output[3][0][0] == model.tokenizer.convert_ids_to_tokens([token])[0]
    assert [len(one) for one in page.suppressed_by_output] == [0, 6, 6, 6]
    least = effects.topk(6, largest=False)
    assert [word for word, _ in page.suppressed_by_output[3]] == model.tokenizer.convert_ids_to_tokens(least.indices)
    assert [by for _, by in page.suppressed_by_output[3]] == pytest.approx(least.values.tolist(), rel=1e-4)
    for latent in range(20):
        one = built.feature(f"clt/{latent}")
        shifts = [pair for out in (*one.by_output, *one.suppressed_by_output) for pair in out]
        assert shifts
        assert all(word for word, _ in shifts)
    hits = search.by_promoted(built, page.promoted[0][0].replace("▁", ""), top=100)
    assert "clt/7" in {hit.id for hit in hits}
    sae = random_dictionary("sae", d_in=24, d_sae=4, dtype=torch.float32)
    away = Loaded(sae, DictionaryConfig.of(sae, Site("mlp_in", 1), model="tiny"))
    assert promoted(model, away, 3) is None


def test_an_index_without_suppressed_tokens_by_output_is_read(made, tmp_path):
    _, built, _ = made
    shutil.copytree(built.folder, tmp_path / "old")
    path = tmp_path / "old" / "dictionaries" / "clt" / "outputs.npy"
    array = np.load(path)
    layout.save(path, array[["token", "by"]].astype([("token", "<i4"), ("by", "<f4")]))
    page = FeatureIndex.open(tmp_path / "old").feature("clt/7")
    assert page.by_output == built.feature("clt/7").by_output
    assert page.suppressed_by_output == ()


def test_meaning_is_the_cosine_of_embeddings(made, tiny_folder):
    _, built, _ = made
    embedder = TextModel(str(tiny_folder))
    with pytest.raises(InputError, match="have no vectors"):
        by_meaning(built, embedder, "capital")
    embed_labels(built, embedder, source="explainer")
    hits = by_meaning(built, embedder, "a city")
    assert hits[0].id == "resid_post.1/5"
    assert hits[0].score == pytest.approx(1.0, abs=0.02)
    assert len(hits) == 4
    embedder.name = "another"
    with pytest.raises(InputError, match=f"have vectors of {tiny_folder}, not of another"):
        by_meaning(built, embedder, "a city")


def test_names_are_checked(made):
    _, built, _ = made
    with pytest.raises(InputError, match="latents 0 to 19"):
        built.feature("resid_post.1/20")
    with pytest.raises(InputError, match=r"dictionaries: resid_post\.1, z\.1"):
        built.feature("resid_post.9/1")
    for name in built.names:
        assert str(built.id_of(built.number(f"{name}/3"))) == f"{name}/3"


def test_pieces_are_readable():
    assert readable(["▁caf", "<0xC3>", "<0xA9>", "▁"]) == [" caf", "é", "", " "]
    assert readable(["▁", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]) == [" ", "🙂", "", "", ""]
    assert readable(["<0xFF>", "a"]) == ["\ufffd", "a"]
    assert readable(["<0xC3>", "<0xA9>", "▁x"]) == ["é", "", " x"]
    assert readable(["▁a", "b"]) == [" a", "b"]


def test_an_sae_with_a_dead_latent_has_an_empty_page(tmp_path):
    model = gemma("gemma3")
    W = torch.eye(24)[:, :3].contiguous()
    sae = SAE(W, torch.zeros(3), W.T.contiguous(), torch.zeros(24), torch.full((3,), 1e6))
    loaded = {"dead": Loaded(sae, DictionaryConfig.of(sae, Site("resid_post", 0), model="tiny"))}
    built = index(tmp_path / "i", LiveRows(model, [model.tokens("hello world")]), loaded, CONFIG, gemma=model)
    page = built.feature("dead/1")
    assert (page.count, page.peak, page.top, page.histogram, page.partners) == (0, 0.0, (), (), ())
    assert page.groups == ((), ())


def test_an_index_of_an_older_layout_is_named_and_taken_for_another_one(made, monkeypatch):
    _, built, _ = made
    old = layout.VERSION
    monkeypatch.setattr(layout, "VERSION", old + 1)
    with pytest.raises(FormatError, match="make the index again"):
        FeatureIndex.open(built.folder)
    model, _, loaded = made
    rows = LiveRows(model, [model.tokens(text) for text in TEXTS])
    with pytest.raises(InputError, match="another"):
        index(built.folder, rows, loaded, CONFIG, gemma=model)
