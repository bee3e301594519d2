"""The whole evaluation on the built-in model: instruments that find what is there, and controls that find nothing."""

from dataclasses import replace

import pytest

from gemscope.activations.harvest import harvest
from gemscope.core.sites import Site
from gemscope.evaluation.evaluate import EvaluateConfig, evaluate
from gemscope.evaluation.result import Evaluation
from gemscope.evaluation.subject import Subject
from gemscope.evaluation.tasks import rule_labels
from gemscope.models.gemma import Gemma
from gemscope.suites.corpus import heldout_text, training_text
from gemscope.training.config import TrainConfig
from gemscope.training.trainer import train

SITE = Site("resid_post", 1)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured() -> tuple[Evaluation, ...]:
    """A plain SAE and a Matryoshka of the same width and L0 target, with the quickstart's rate and prefixes."""
    gemma = Gemma.load("microworld-it")
    rows = harvest(gemma, training_text(gemma, 60_000, 0), [SITE], batch_tokens=2048)
    plain = TrainConfig(SITE, d_sae=512, target_l0=24.0, steps=200, batch_size=1024, learning_rate=6e-3)
    nested = replace(plain, prefixes=(16, 64, 256))
    subjects = [
        Subject(name, one.dictionary, (SITE,), (SITE,))
        for name, one in zip(("plain", "Matryoshka"), train(rows, [plain, nested]), strict=True)
    ]
    text = heldout_text(gemma, 16_000, 0)
    config = EvaluateConfig(splice_tokens=4000, batch_tokens=2048, probe_rows=8000)
    return evaluate(gemma, subjects, text.items, text.labels, config, tasks=rule_labels(text.items))


def test_controls_score_at_chance_and_the_dictionaries_far_above(measured):
    for one in measured:
        report = one.probes
        for k in (1, 2, 5, 16):
            assert report.mean("shuffled labels", k) == pytest.approx(0.5, abs=0.04)
        assert report.mean("best latent", 1) > report.mean("random dictionary", 1) + 0.05
        assert report.mean("dense") > 0.95
        assert report.mean("latents", 16) > report.mean("latents", 1)
        assert report.mean("random model, dense") < report.mean("dense")


def test_the_controls_of_fidelity_are_far_worse(measured):
    for one in measured:
        random, pca = one.controls
        assert random.l0 == pytest.approx(one.fidelity.l0, rel=0.25)
        assert one.fidelity.fvu < random.fvu
        assert one.loss.delta_loss < 0.2 * min(random.delta_loss, pca.delta_loss)  # whatever PCA's FVU
        assert one.loss.recovered_mean > 0.8


def test_every_figure_has_an_interval_that_holds_it(measured):
    for one in measured:
        for name in ("fvu", "l0", "delta_loss", "kl", "top1", "recovered_mean", "recovered_zero", "cosine"):
            low, high = one.intervals[name]
            assert low < high
        for concept in one.probes.concepts:
            best = concept.score("best latent", 1)
            if best.auroc_interval is not None:  # all positives may stand in one document
                assert best.auroc_interval[0] <= best.auroc <= best.auroc_interval[1]


def test_nested_dictionaries_cover_concepts_even_in_small_and_short_training(measured):
    (found_plain, of), (found, _) = (one.concepts.found for one in measured)
    assert of >= 30
    assert found / of >= 0.7
    assert found > 1.2 * found_plain
