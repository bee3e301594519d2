"""The shipped checkpoints do what their cards say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemscope.core.provenance import collect
from gemscope.microworld.card import write_card
from gemscope.microworld.scorecard import scorecard
from gemscope.models.gemma import Gemma
from gemscope.models.loading import locate

MODELS = ("microworld-pt", "microworld-it")


def folder(name: str) -> Path:
    return locate(name, None).folder


def test_both_models_together_stay_under_12_megabytes():
    size = sum(path.stat().st_size for name in MODELS for path in folder(name).rglob("*"))
    assert size < 12e6


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_a_gemma_3_with_one_global_layer_and_grouped_queries(name: str):
    gemma = Gemma.load(name)
    assert type(gemma.model).__name__ == "Gemma3ForCausalLM"
    assert gemma.shape.layer_kinds.count("global") == 1
    assert gemma.shape.n_layers == 6
    assert gemma.shape.n_kv_heads < gemma.shape.n_heads
    assert gemma.shape.d_z != gemma.shape.d_model
    assert 1e6 < sum(p.numel() for p in gemma.model.parameters()) < 4e6
    assert gemma.is_chat == name.endswith("it")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_scorecard_can_be_measured_again(name: str):
    told = json.loads((folder(name) / "scorecard.json").read_text("utf-8"))["scores"]
    found = scorecard(Gemma.load(name), collect()).scores
    assert [s.behaviour for s in found] == [s["behaviour"] for s in told]
    for now, then in zip(found, told, strict=True):
        assert now.n == then["n"]
        assert now.share == pytest.approx(then["share"], abs=0.03), now.behaviour


@pytest.mark.parametrize("name", MODELS)
def test_the_card_is_written_from_what_was_recorded(name: str, tmp_path: Path):
    for file in ("config", "training", "scorecard"):
        (tmp_path / f"{file}.json").write_bytes((folder(name) / f"{file}.json").read_bytes())
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == (folder(name) / "README.md").read_text("utf-8")


def test_a_typed_question_is_answered():
    gemma = Gemma.load("microworld-it")
    (answer,) = gemma.generate(gemma.chat("What is the capital of France?"), max_new_tokens=20)
    assert answer.text == "The capital of France is Paris."
    assert answer.finish == "stop"


def test_any_text_can_be_read():
    gemma = Gemma.load("microworld-pt")
    logits = gemma.logits(gemma.tokens("Zürich 🙂 — ¿qué?\n\tx"))
    assert bool(torch.isfinite(logits).all())


def test_the_command_shows_documents_and_refuses_a_model_that_is_not_there(tmp_path: Path):
    run = [sys.executable, "-m", "gemscope.microworld"]
    shown = subprocess.run([*run, "show", "it", "--n", "3"], capture_output=True, text=True, check=True)
    assert "<start_of_turn>" in shown.stdout
    refused = subprocess.run([*run, "score", str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_the_command_trains_both_models_and_goes_on_after_a_stop(tmp_path: Path):
    run = [sys.executable, "-m", "gemscope.microworld", "train", "--out", str(tmp_path), "--tokens", "120000"]
    subprocess.run(run, check=True, capture_output=True)
    assert Gemma.load(tmp_path / "microworld-it").is_chat
    again = subprocess.run(run, check=True, capture_output=True, text=True)
    assert again.stdout.count("is complete") == 2
