"""gemscope train --live MODEL --end-to-end BETA: a trained dictionary finetuned in the place of what it reads."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemscope.activations.sets import ActivationSet
from gemscope.artifacts import native
from gemscope.artifacts.config import DictionaryConfig
from gemscope.cli.end_to_end import for_end_to_end
from gemscope.cli.rows import Rows
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.sae import SAE
from gemscope.training.config import TrainConfig

SITE = Site("resid_post", 1)


def test_a_dictionary_is_finetuned(
    gemscope: Callable[..., subprocess.CompletedProcess[str]], tiny_folder: Path, tmp_path: Path
) -> None:
    """The run says with which weight; without contexts it would have been refused."""
    torch.manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(16, 24), dim=1)
    first = SAE(W_dec.T.clone(), torch.zeros(16), W_dec, torch.zeros(24), activation=Activation("topk", 4))
    about = DictionaryConfig.of(first, SITE, model=str(tiny_folder), l0=4.0)
    native.save(tmp_path / "first", first, about)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join([json.dumps({"text": "Paris is the capital of France and we like Lyon"})] * 60))
    words = ("--live", str(tiny_folder), "--text", str(text), "--from", str(tmp_path / "first"), "--end-to-end", "2.0")
    few = ("--steps", "3", "--batch-size", "32", "--held-out", "0.2")
    done = gemscope("train", *words, *few, "--out", str(tmp_path / "out"), timeout=600)
    assert done.returncode == 0, done.stderr
    loaded = native.load(tmp_path / "out" / "dictionaries" / "sae.resid_post.1.w16.l0_4")
    assert loaded.config.extra["training"]["config"]["end_to_end"] == 2.0
    assert isinstance(loaded.dictionary, SAE)
    assert not torch.equal(loaded.dictionary.W_dec, W_dec)


def test_harvested_rows_cannot_be_spliced() -> None:
    data = ActivationSet({SITE: torch.randn(9, 4)}, *(torch.zeros(9, dtype=torch.long),) * 3, {})
    rows = Rows(data, "toy", None)
    plain = TrainConfig(SITE, d_sae=8, target_l0=2.0)
    assert for_end_to_end(rows, [plain]) is rows
    with pytest.raises(InputError, match="give --live MODEL"):
        for_end_to_end(rows, [plain, TrainConfig(SITE, d_sae=8, target_l0=2.0, end_to_end=1.0)])
