"""Training on the built-in models: a CLT that can stand in for all MLPs, and dictionaries carried over to the chats."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gemscope.activations.harvest import harvest
from gemscope.activations.replies import ReplyConfig, write_replies
from gemscope.activations.sets import ActivationSet
from gemscope.activations.sources import JsonLines
from gemscope.artifacts.config import DictionaryConfig
from gemscope.core.sites import Site
from gemscope.dictionaries.base import Dictionary
from gemscope.evaluation.splice import splice_losses
from gemscope.evaluation.subject import Subject
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Tokens
from gemscope.suites.corpus import GeneratedText, heldout_text, training_text
from gemscope.training.config import TrainConfig
from gemscope.training.finetune import finetune_config
from gemscope.training.heldout import measured
from gemscope.training.layer_export import calibrated
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.trainer import train


def recovered(tokens: int, **change: object) -> float | None:
    """Share of the loss gap to mean ablation that a CLT in the place of all MLPs keeps, on held-out documents."""
    gemma = Gemma.load("microworld-pt")
    sites = [*gemma.every_layer("mlp_in"), *gemma.every_layer("mlp_out")]
    rows = harvest(gemma, training_text(gemma, tokens, 0), sites)
    text = heldout_text(gemma, 6000, 0).items
    config = MultiLayerConfig(
        sites[0],
        target_site=sites[6],
        kind="clt",
        layers=tuple(range(6)),
        target_l0=96.0,
        calibration_rows=4096,
        **change,  # pyright: ignore[reportArgumentType]
    )
    dictionary = train(rows, [config])[0].dictionary
    held = harvest(gemma, text, sites)
    means = {site: held[site].float().mean(0) for site in sites}
    subject = Subject("clt", dictionary, tuple(config.reads), tuple(config.writes))
    return splice_losses(gemma, [subject], means, text[:40])[0][0].loss.recovered_mean


def test_a_small_clt_already_stands_in_for_most_of_the_mlps() -> None:
    share = recovered(15_000, d_sae=192, steps=60, batch_size=512)
    assert share is not None
    assert share > 0.7


@pytest.mark.slow
def test_a_clt_stands_in_for_all_mlps() -> None:
    share = recovered(120_000, d_sae=512, steps=300, batch_size=1024)
    assert share is not None
    assert share >= 0.9


def chats(gemma: Gemma, documents: int, split: Any, folder: Path) -> Sequence[Tokens]:
    """Chats with the model's own replies."""
    file = folder / f"{split}.jsonl"
    config = ReplyConfig(documents, max_new_tokens=48)
    count = write_replies(gemma, GeneratedText(True, split, running=False), file, config)
    return [gemma.chat(turns, answer=False) for turns in JsonLines((file,)).read(0, count)]


@pytest.mark.slow
def test_a_dictionary_of_the_pretrained_model_finetuned_on_chats(tmp_path: Path) -> None:
    """Better on the replies than it was, and than one made anew from as many tokens, all at equal L0."""
    site = Site("resid_post", 3)
    base, tuned = Gemma.load("microworld-pt"), Gemma.load("microworld-it")
    config = TrainConfig(site, d_sae=512, target_l0=32.0, steps=400, batch_size=1024, calibration_rows=8192)
    first = train(harvest(base, training_text(base, 120_000, 0), [site]), [config])[0].dictionary
    rows = harvest(tuned, chats(tuned, 800, "train", tmp_path), [site])
    held = harvest(tuned, chats(tuned, 200, "heldout", tmp_path), [site])
    few = {"steps": 100, "batch_size": 1024, "calibration_rows": 8192}
    about = DictionaryConfig.of(first, site, model="microworld-pt", l0=32.0)
    carried = train(rows, [finetune_config(about, **few)], start={0: first})[0].dictionary
    anew = train(rows, [replace(config, **few)])[0].dictionary
    assert fvu(carried, rows, held, site) < fvu(first, rows, held, site)
    assert fvu(carried, rows, held, site) < fvu(anew, rows, held, site)


def fvu(dictionary: Dictionary, rows: ActivationSet, held: ActivationSet, site: Site) -> float:
    """With the thresholds set to the same L0 on the same chats."""
    at = torch.randperm(rows.rows, generator=torch.Generator().manual_seed(0))[:8192]
    same, _, _ = calibrated(dictionary, rows[site][at, None].float(), 32.0)
    found = measured(same, [held[site]], [held[site]])
    assert found["l0"] == pytest.approx(32.0, rel=0.1)
    return found["fvu"]
