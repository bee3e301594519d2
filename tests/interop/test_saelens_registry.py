"""The catalogue against SAELens' own registry file, entry by entry; needs SAELens to be installed."""

import importlib.util
import re
from pathlib import Path

import pytest

from gemscope.artifacts.catalogue.released import catalogue, find
from gemscope.artifacts.catalogue.scope1 import canonical_l0

yaml = pytest.importorskip("yaml", reason="comes with SAELens, which make interop installs")


@pytest.fixture(scope="module")
def registry():
    found = importlib.util.find_spec("sae_lens")  # looks for the package, does not import it
    if found is None or not found.submodule_search_locations:
        pytest.skip("SAELens is not installed")
    text = (Path(found.submodule_search_locations[0]) / "pretrained_saes.yaml").read_text("utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return {name: value for name, value in yaml.load(text, loader).items() if name.startswith("gemma-scope-")}


def test_gemma_scope_2_is_the_same_to_the_last_entry(registry):
    theirs = {
        (release, entry["id"]): (about["repo_id"], entry["path"], about["model"], entry["l0"], entry.get("neuronpedia"))
        for release, about in registry.items()
        if release.startswith("gemma-scope-2-")
        for entry in about["saes"]
    }
    ours = {
        one.saelens: (one.repo, one.folder, one.model, one.l0, one.neuronpedia)
        for one in catalogue()
        if one.suite == "gemma-scope-2" and one.saelens
    }
    assert len(ours) == 8784
    assert ours == theirs


def test_the_canonical_ones_of_gemma_scope_1_are_the_same(registry):
    seen = set()
    for release, about in registry.items():
        if not release.endswith("-canonical"):
            continue
        measured: dict[str, list[int]] = {}
        for entry in registry[release.removesuffix("-canonical")]["saes"]:
            folder, l0 = re.fullmatch(r"(.*)/average_l0_(\d+)", entry["path"]).groups()
            measured.setdefault(folder, []).append(int(l0))
        for entry in about["saes"]:
            ours = find(f"{release}/{entry['id']}")
            seen.add(ours.name)
            assert ours.repo == about["repo_id"]
            assert ours.neuronpedia == entry["neuronpedia"]
            assert f"{ours.folder}/average_l0_{canonical_l0(ours, measured[ours.folder])}" == entry["path"]
    assert seen == {one.name for one in catalogue() if one.pick == "canonical" and one.standing == "registered"}


def test_every_dictionary_of_gemma_scope_1_can_be_named(registry):
    for release, about in registry.items():
        if release.startswith("gemma-scope-2-") or release.endswith("-canonical"):
            continue
        for entry in about["saes"]:
            ours = find(f"{about['repo_id']}/{entry['path']}")
            assert (ours.repo, ours.folder) == (about["repo_id"], entry["path"])
            assert ours.l0 == entry.get("l0", ours.l0)
