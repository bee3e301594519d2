"""The catalogue against what is published about the release: counts, L0 targets, sizes, names."""

import math
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.artifacts.catalogue import scope1, scope2
from gemscope.artifacts.catalogue.artifact import KINDS
from gemscope.artifacts.catalogue.released import Query, catalogue, find, parse_layers, select
from gemscope.core.errors import ArtifactNotFoundError, InputError

LAYERS = {"270m": 18, "1b": 26, "4b": 34, "12b": 48, "27b": 62}
ALL = catalogue()
TWO = [artifact for artifact in ALL if artifact.suite == "gemma-scope-2"]
ONE = [artifact for artifact in ALL if artifact.suite == "gemma-scope-1"]
REGISTERED = [artifact for artifact in TWO if artifact.standing == "registered"]


def test_the_counts_are_those_of_the_registry():
    counts = Counter(artifact.repo.removeprefix("google/gemma-scope-2-") for artifact in REGISTERED)
    assert counts == {
        "270m-pt": 486,
        "270m-it": 556,
        "1b-pt": 728,
        "1b-it": 728,
        "4b-pt": 876,
        "4b-it": 876,
        "12b-pt": 1156,
        "12b-it": 1156,
        "27b-pt": 791,
        "27b-it": 1431,
    }
    assert len(REGISTERED) == 8784
    assert sum(artifact.neuronpedia is not None for artifact in TWO) == 222


def test_what_the_registry_lacks_is_there_and_marked():
    holes = [artifact for artifact in TWO if artifact.standing == "unregistered"]
    per_repo = Counter(artifact.repo.removeprefix("google/gemma-scope-2-") for artifact in holes)
    assert per_repo == {"270m-pt": 70, "27b-pt": 645, "27b-it": 5}
    assert all(hole.saelens is None and hole.neuronpedia is None and "registry" in hole.note for hole in holes)
    missing = {(a.l0_name, a.layers[0]) for a in holes if a.repo.endswith("27b-it")}
    assert missing == {("small", 4), ("small", 5), ("small", 43), ("big", 4), ("big", 43)}


def test_the_seed_variants_are_the_registered_ones():
    seeds = [artifact for artifact in TWO if artifact.seed]
    assert Counter(artifact.repo for artifact in seeds) == dict.fromkeys({a.repo for a in TWO}, 4)
    assert {re.sub(r"\d+_w", "L_w", a.folder, count=1) for a in seeds} == {
        "resid_post/layer_L_width_262k_l0_medium_seed_1"
    }


def test_every_l0_target_is_the_ramp_computed_from_the_name_alone():
    """floor(lo + (hi - lo) min(1, l / (n / 3))), in floating point and from the folder's name."""
    ends = {"small": (10, 20), "medium": (30, 60), "big": (60, 150)}
    for artifact in REGISTERED:
        category, leaf = artifact.folder.split("/")
        found = re.match(r"layer_(\d+)_width_\w+?_l0_(small|medium|big)", leaf)
        assert found is not None
        low, high = ends[found[2]]
        if category.endswith("_all") and found[2] == "big":
            high = 120
        third = LAYERS[artifact.repo.split("-")[3]] / 3
        expected = math.floor(low + (high - low) * min(1, int(found[1]) / third) + 1e-9)
        assert artifact.l0 == expected, artifact.name


@pytest.mark.parametrize(
    ("name", "l0"),
    [
        ("gemma-scope-2-4b-it/transcoder_all/layer_0_width_262k_l0_small_affine", 10),
        ("gemma-scope-2-1b-pt/resid_post/layer_22_width_65k_l0_medium", 60),
        ("gemma-scope-2-4b-pt/transcoder/layer_9_width_16k_l0_big", 131),
        ("gemma-scope-2-12b-it/transcoder/layer_12_width_65k_l0_medium", 52),
        ("gemma-scope-2-1b-it/resid_post/layer_22_width_16k_l0_big", 150),
        ("gemma-scope-2-1b-it/resid_post_all/layer_22_width_16k_l0_big", 120),
        ("gemma-scope-2-270m-it/clt/width_262k_l0_big", 150),
    ],
)
def test_l0_targets_that_are_published(name, l0):
    assert find(name).l0 == l0


def test_names_are_unique_and_lead_back():
    assert len({artifact.name for artifact in ALL}) == len(ALL)
    for artifact in ALL:
        assert find(artifact.name) is artifact
        assert artifact.name.startswith(artifact.repo.split("/")[1] + "/")
        if artifact.pick is None:
            assert f"google/{artifact.name}" == f"{artifact.repo}/{artifact.folder}"
            assert find(f"{artifact.repo}/{artifact.folder}") is artifact


def test_the_names_of_others_lead_to_the_same_artefact():
    aliases = Counter()
    for artifact in ALL:
        for alias in ("/".join(artifact.saelens or ()), artifact.neuronpedia):
            if alias:
                aliases[alias] += 1
                assert find(alias) is artifact
    assert set(aliases.values()) == {1}
    tutorial = "gemma-scope-2-1b-pt/resid_post/layer_22_width_65k_l0_medium"
    assert find("gemma-3-1b/22-gemmascope-2-res-65k").name == tutorial
    assert find("gemma-scope-2-1b-pt-res/layer_22_width_65k_l0_medium").name == tutorial


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma-scope-2-4b-pt/resid_post/layer_9_width_16k_l0_medium", 335.7e6),
        ("gemma-scope-2-4b-it/resid_post/layer_9_width_1m_l0_big", 21.5e9),
        ("gemma-scope-2-27b-it/resid_post/layer_16_width_1m_l0_big", 45.1e9),
        ("gemma-scope-2-1b-pt/clt/width_262k_l0_medium", 30.37 * 2**30),
        ("gemma-scope-2-1b-pt/clt/width_524k_l0_medium", 60.74 * 2**30),
        ("gemma-scope-2-270m-it/clt/width_262k_l0_big", 11.87 * 2**30),
        ("gemma-scope-2-270m-it/clt/width_524k_l0_big", 23.75 * 2**30),
        ("gemma-scope-2b-pt-res/layer_20/width_16k/canonical", 302e6),
    ],
)
def test_sizes_are_the_published_ones(name, expected):
    assert find(name).size == pytest.approx(expected, rel=1.5e-3)


def test_sizes_by_hand_to_the_byte():
    n, d, f = 26, 1152, 10_080
    assert find("gemma-scope-2-1b-pt/clt/width_262k_l0_big_affine").size == 4 * n * (
        d * f + 2 * f + f * n * d + d + d * d
    )
    plain = find("gemma-scope-2-27b-it/attn_out/layer_16_width_16k_l0_small")
    assert plain.size == 4 * (2 * 4096 * 16384 + 2 * 16384 + 4096)
    skip = find("gemma-scope-2-4b-it/transcoder_all/layer_0_width_262k_l0_small_affine")
    assert skip.size == 4 * (2 * 2560 * 262144 + 2 * 262144 + 2560 + 2560**2)


def test_kinds_and_sites():
    assert {artifact.kind for artifact in ALL} == set(KINDS)
    for artifact in TWO:
        top = artifact.category.removesuffix("_all")
        reads = {"attn_out": "z", "transcoder": "mlp_in", "clt": "mlp_in", "crosscoder": "resid_post"}.get(top, top)
        writes = {"transcoder": "mlp_out", "clt": "mlp_out"}.get(top, reads)
        assert {site.name for site in artifact.reads} == {reads}
        assert {site.name for site in artifact.writes} == {writes}
        assert artifact.affine == artifact.folder.endswith("_affine")
        assert len(artifact.files) == (len(artifact.layers) if top in ("clt", "crosscoder") else 1)
        assert (artifact.l0 is None, artifact.optional_files) == (False, ("config.json",))


def test_several_layers_at_once_and_how_certain_they_are():
    joint = [artifact for artifact in TWO if artifact.kind in ("crosscoder", "clt")]
    assert Counter(artifact.kind for artifact in joint) == {"crosscoder": 80, "clt": 32}
    assert {artifact.name for artifact in joint if artifact.standing == "quoted"} == {
        "gemma-scope-2-1b-pt/crosscoder/layer_7_13_17_22_width_262k_l0_medium",
        "gemma-scope-2-270m-pt/crosscoder/layer_5_9_12_15_width_1m_l0_big",
        "gemma-scope-2-1b-pt/clt/width_262k_l0_medium_affine",
    }
    crosscoder = find("gemma-scope-2-1b-pt/crosscoder/layer_7_13_17_22_width_262k_l0_medium")
    assert (crosscoder.d_sae, crosscoder.layers, len(crosscoder.files)) == (65536, (7, 13, 17, 22), 4)
    widths = {(n, w): scope2.latents_per_layer(w, n) for n in (18, 26) for w in (262144, 524288)}
    assert widths == {(18, 262144): 14560, (18, 524288): 29120, (26, 262144): 10080, (26, 524288): 20160}


def test_gemma_scope_1_has_the_canonical_counts():
    counts = Counter(a.repo.removeprefix("google/gemma-scope-") for a in ONE if a.pick and a.standing == "registered")
    assert counts == {
        "2b-pt-res": 58,
        "2b-pt-mlp": 52,
        "2b-pt-att": 52,
        "2b-pt-transcoders": 26,
        "9b-pt-res": 90,
        "9b-pt-mlp": 84,
        "9b-pt-att": 84,
        "9b-it-res": 6,
        "27b-pt-res": 3,
    }
    embeddings = {a.l0 for a in ONE if a.reads[0].name == "embed" and a.model == "google/gemma-2-2b"}
    assert embeddings == {6, 21, 44, 111}


def test_any_l0_of_gemma_scope_1_is_had_by_its_full_name():
    demo = find("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")
    assert (demo.folder, demo.l0, demo.d_in, demo.files) == (
        "layer_20/width_16k/average_l0_71",
        71,
        2304,
        ("params.npz",),
    )
    assert find("gemma-scope-2b-pt-att/layer_20/width_16k/average_l0_9").d_in == 2048
    for wrong in ("layer_26/width_16k", "layer_20/width_17k", "layer_20/width_1m"):
        with pytest.raises(ArtifactNotFoundError):
            find(f"gemma-scope-2b-pt-res/{wrong}/average_l0_71")


def test_the_canonical_l0_is_the_one_next_to_100():
    entry = find("gemma-scope-2b-pt-res/layer_20/width_16k/canonical")
    assert scope1.canonical_l0(entry, (22, 38, 71, 139, 294)) == 71
    tie = find("gemma-scope-9b-pt-att/layer_27/width_16k/canonical")
    assert scope1.canonical_l0(tie, (18, 33, 64, 136, 306, 613)) == 136


@pytest.mark.parametrize(
    ("query", "count"),
    [
        (Query(model="1b-pt"), 744),
        (Query(model="gemma-3-270m"), 572),
        (Query(model="google/gemma-3-27b-it", category="transcoder_all"), 496),
        (Query(model="1b-it", site="resid_post", width="65536", l0="60"), 3),
        (Query(model="gemma-2-9b", width="1m"), 3),
        (Query(model="4b-it", kind="skip_transcoder", layers=(0,)), 4),
        (Query(model="4b-it", kind="transcoder", affine=True), 0),
        (Query(model="1b-pt", kind="clt", affine=True), 4),
        (Query(model="12b-pt", site="z", layers=(12, 13)), 17),
        (Query(names=("gemma-scope-2-1b-pt/resid_post/layer_*_width_16k_l0_medium",)), 4),
        (Query(names=("gemma-scope-2-1b-pt/resid_post/layer_7_width_16k_l0_*",), l0="big"), 1),
    ],
)
def test_queries_choose_what_they_say(query, count):
    assert len(select(query)) == count


def test_a_name_given_twice_is_chosen_once():
    name = "gemma-scope-2-1b-pt/resid_post/layer_7_width_16k_l0_big"
    assert [artifact.name for artifact in select(Query(names=(name, f"google/{name}")))] == [name]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (Query(model="gpt2"), "no released dictionaries for a model 'gpt2'"),
        (Query(site="attn_out"), "use --site z"),
        (Query(site="resid_mid"), "no released dictionary reads the site"),
        (Query(width="17k"), "no released dictionary has the width"),
        (Query(width="9" * 40), "no released dictionary has the width"),
        (Query(kind="probe"), "no released dictionary has the kind"),
        (Query(l0="huge"), "no released dictionary has the L0"),
        (Query(category="x"), "no released dictionary has the category"),
    ],
)
def test_a_value_that_nothing_has_is_a_sentence(query, says):
    with pytest.raises(InputError, match=says):
        select(query)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ArtifactNotFoundError, match=r"nearest are .*resid_post/layer_22_width_65k_l0_medium"):
        find("gemma-scope-2-1b-pt/resid_post/layer_23_width_65k_l0_medium")
    with pytest.raises(ArtifactNotFoundError, match="fits the pattern"):
        select(Query(names=("*/nothing_*",)))


@settings(deadline=None, max_examples=25)
@given(st.text(max_size=80) | st.sampled_from([one.name for one in ALL[::500]]).map(lambda name: name[:-1]))
def test_any_text_is_a_name_or_a_sentence(text):
    try:
        found = find(text)
    except ArtifactNotFoundError:
        return
    assert found in ALL or "average_l0" in text


def test_layers_are_read_as_numbers_and_ranges():
    assert parse_layers(["3", "7-9,12"]) == (3, 7, 8, 9, 12)
    for wrong in ("x", "3-", "-1", "1--2", "", "9" * 30):
        with pytest.raises(InputError, match="cannot read the layers"):
            parse_layers([wrong])
