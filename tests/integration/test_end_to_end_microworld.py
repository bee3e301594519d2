"""Finetuning end to end on the built-in pretrained model, against the same steps without the divergence."""

from dataclasses import replace

import torch

from gemscope.activations.contexts import LiveContexts
from gemscope.activations.plan import HarvestConfig
from gemscope.activations.streaming import LiveActivations
from gemscope.artifacts.config import DictionaryConfig
from gemscope.core.sites import Site
from gemscope.evaluation.splice import SpliceLoss, splice_losses
from gemscope.evaluation.subject import Subject
from gemscope.models.gemma import Gemma
from gemscope.suites.corpus import GeneratedText, heldout_text
from gemscope.training.config import TrainConfig
from gemscope.training.finetune import finetune_config
from gemscope.training.outcome import Trained
from gemscope.training.trainer import train

SITE = Site("resid_post", 4)
FEW = {"batch_size": 256, "calibration_rows": 512}


def test_the_divergence_falls_further_than_without_it_at_the_same_l0() -> None:
    """From the same dictionary, on the same batches; a TopK's L0 is its k. The error alone is lower without."""
    gemma = Gemma.load("microworld-pt")
    live = LiveActivations.of(gemma, GeneratedText(False), HarvestConfig((str(SITE),), tokens=5000), pool_rows=2000)
    first = train(
        LiveContexts(live), [TrainConfig(SITE, 128, 12.0, activation="topk", steps=16, learning_rate=5e-3, **FEW)]
    )[0]
    about = DictionaryConfig.of(first.dictionary, SITE, model="microworld-pt", l0=12.0)
    plain = finetune_config(about, steps=8, **FEW)
    both = [plain, replace(plain, end_to_end=1.0)]
    without, with_it = train(LiveContexts(live), both, start={0: first.dictionary, 1: first.dictionary})
    losses = measured(gemma, [first, without, with_it])
    kl = [loss.kl or 0.0 for loss in losses]
    delta = [loss.delta_loss for loss in losses]
    for before, plainly, end_to_end in (kl, delta):
        assert end_to_end < plainly < before
        assert before - end_to_end > 2 * (before - plainly)
    assert without.summary.fvu < with_it.summary.fvu
    assert without.summary.l0 == with_it.summary.l0 == 12.0


def measured(gemma: Gemma, several: list[Trained]) -> list[SpliceLoss]:
    """On held-out documents, each spliced in."""
    subjects = [Subject(one.name, one.dictionary, (SITE,), (SITE,)) for one in several]
    means = {SITE: torch.zeros(gemma.width(SITE))}
    return [one.loss for one in splice_losses(gemma, subjects, means, heldout_text(gemma, 600, 0).items)[0]]
