"""The quickstart on the built-in models, as a new user runs it: small here, at full size in the slow test."""

import json
import time

import pytest

from gemscope.models.gemma import Gemma
from gemscope.suites.config import QuickstartConfig
from gemscope.suites.quickstart import quickstart
from gemscope.suites.reading import read, read_chat
from gemscope.suites.suite import Suite

SMALL = QuickstartConfig(tokens=8000, heldout_tokens=3000, splice_tokens=500, d_sae=128, steps=60, batch_size=512)


@pytest.mark.parametrize("name", [pytest.param("microworld-pt", marks=pytest.mark.slow), "microworld-it"])
def test_a_small_quickstart_builds_a_suite_that_can_be_looked_through(name, tmp_path):
    suite = quickstart(name, tmp_path / "suite", SMALL)
    gemma = Gemma.load(name)
    assert suite.sites == tuple(gemma.every_layer("resid_post"))
    for site in suite.sites:
        evaluation = suite.evaluation(site)
        assert evaluation.fidelity.l0 == pytest.approx(SMALL.target_l0, rel=0.15)
        assert 0 < evaluation.fidelity.fvu < 0.6
        assert evaluation.loss.original < evaluation.loss.spliced < evaluation.loss.mean
        assert evaluation.concepts is not None
        assert len(evaluation.concepts.scores) >= 10
    reading = read(gemma, suite, "The capital of Japan is Tokyo.")
    assert all(position.latents for position in reading.positions if position.role == "content")
    if gemma.is_chat:
        assert read_chat(gemma, suite, "What is the capital of Japan?").answer


@pytest.mark.slow
def test_the_full_quickstart_takes_minutes_and_finds_concepts(gemscope, tmp_path):
    folder = tmp_path / "suite"
    started = time.perf_counter()
    done = gemscope("quickstart", "--out", str(folder), timeout=900)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    assert seconds < 480
    suite = Suite.open(folder)
    for site in suite.sites:
        evaluation = suite.evaluation(site)
        assert evaluation.fidelity.l0 == pytest.approx(QuickstartConfig().target_l0, rel=0.1)
        assert evaluation.fidelity.dead_fraction < 0.1
        assert evaluation.loss.recovered_mean is not None
        assert evaluation.loss.recovered_mean > 0.9
    best = suite.evaluation(suite.best_site()).concepts
    assert best is not None
    found, measured = best.found
    assert found >= 0.8 * measured
    looked = gemscope("look", "What is the capital of Japan?", "--chat", "--suite", str(folder), "--json")
    assert json.loads(looked.stdout)["answer"]
