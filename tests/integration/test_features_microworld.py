"""Features of the microworld, whose concepts are known: a text finds them, and adding them raises their concept."""

import importlib
from pathlib import Path

import pytest

from gemscope.models.gemma import Gemma
from gemscope.suites.config import QuickstartConfig
from gemscope.suites.corpus import heldout_text
from gemscope.suites.indexing import dictionaries_of
from gemscope.suites.quickstart import quickstart
from gemscope.suites.suite import Suite

ROOT = Path(__file__).parents[2]


def suite_of(gemma: Gemma, folder: Path) -> Suite:
    """The one that quickstart made in this checkout, if it is whole and has the default configuration, or a new one."""
    there, config = ROOT / "suites" / "microworld-it", QuickstartConfig()
    if (there / "index" / "index.json").is_file():
        suite = Suite.open(there)
        if suite.about["config"] == config.as_dict():
            return suite
    return quickstart("microworld-it", folder, config, gemma=gemma)


@pytest.mark.slow
def test_concepts_are_found_and_raised_and_random_latents_raise_few(tmp_path, monkeypatch):
    """As benchmarks/features.py measures it: chosen on other prompts, random latents with as long a push."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    measure = importlib.import_module("features")
    gemma, seed = Gemma.load("microworld-it", check=False), QuickstartConfig().seed
    suite = suite_of(gemma, tmp_path / "suite")
    dictionaries = dictionaries_of(suite.folder, suite.sites, suite.others)
    held = heldout_text(gemma, QuickstartConfig().heldout_tokens, seed)
    names, scores = measure.aurocs(gemma, dictionaries, held)
    other = heldout_text(gemma, QuickstartConfig().heldout_tokens, seed + 77)
    found = {one.name: one.value for one in measure.searching(gemma, suite, dictionaries, other, names, scores)}
    assert found["share of the concepts found"] >= 0.8
    texts = tuple(heldout_text(gemma, measure.POOL, seed + shift) for shift in (78, 77, 79))
    steered = measure.steering(gemma, suite, dictionaries, texts, names, measure.BASELINES[0])
    told = {one.name: one.value for one in steered}
    assert told["concepts steered"] >= 60
    assert told["share raised fivefold by latents"] >= 0.8
    assert told["share raised fivefold by random latents of equal length"] <= 0.1
