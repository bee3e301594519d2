"""A small run of the real training code: it learns, it stops and goes on, it teaches what it should."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from gemscope.microworld import training
from gemscope.microworld.corpus import documents
from gemscope.microworld.training import MicroworldConfig, Run, batches, learn_tokenizer, schedule, taught, train
from gemscope.models.gemma import Gemma

SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "sliding_window": 16,
    "max_position_embeddings": 256,
}
SMALL = MicroworldConfig(
    "pt", tokens=60_000, learning_rate=5e-3, block=256, vocab_size=800, tokenizer_documents=300, shape=SHAPE
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return learn_tokenizer(SMALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("microworld")
    train(replace(SMALL, tokens=120_000), out)
    return out


def test_a_small_run_learns(trained: Path, tokenizer: Tokenizer):
    gemma = Gemma.load(trained / "microworld-pt")
    found = list(batches(replace(SMALL, seed=9), tokenizer, 0))
    untrained = training.loss_of(training.build_model(SMALL), *found[0])
    assert abs(untrained.item() - math.log(800)) < 0.7
    losses = [(training.loss_of(gemma.model, ids, mask).item(), int(mask.sum())) for ids, mask in found]  # pyright: ignore
    learned = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    frequencies = torch.cat([ids[mask] for ids, mask in found]).bincount(minlength=800).double()
    unigram = torch.distributions.Categorical(frequencies).entropy()  # the best guess that ignores the context
    assert learned < unigram.item() - 0.5
    assert not list(trained.glob(".*"))


def test_the_checkpoint_can_be_finetuned_into_a_chat_model(trained: Path):
    config = replace(SMALL, kind="it", tokens=2_000)
    train(config, trained, start=trained / "microworld-pt")
    gemma = Gemma.load(trained / "microworld-it")
    assert gemma.is_chat
    assert not Gemma.load(trained / "microworld-pt").is_chat
    assert gemma.model.config.eos_token_id == [1, 106]


class Stop(Exception):
    pass


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path):
    config = replace(SMALL, tokens=75_000, block=64)
    whole = load_file(train(config, tmp_path / "whole") / "model.safetensors")

    def stop(at: training.Progress) -> None:
        if at.tokens > 30_000:
            raise Stop

    with pytest.raises(Stop):
        train(config, tmp_path / "parts", progress=stop)
    assert not (tmp_path / "parts" / "microworld-pt").exists()
    state = training.read_json(tmp_path / "parts" / ".training-pt" / "state.json")
    assert 0 < state["tokens"] < 45_000
    parts = load_file(train(config, tmp_path / "parts") / "model.safetensors")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_state_of_another_config_is_not_taken_up(tmp_path: Path, tokenizer: Tokenizer):
    run = Run(SMALL, tokenizer, None)
    run.save(tmp_path / "state")
    assert Run(SMALL, tokenizer, None).resume(tmp_path / "state")
    assert not Run(replace(SMALL, seed=1), tokenizer, None).resume(tmp_path / "state")
    assert not Run(SMALL, tokenizer, None).resume(tmp_path / "nothing")


def test_batches_hold_every_document_once_with_little_padding(tokenizer: Tokenizer):
    found = list(batches(SMALL, tokenizer, 3))
    assert sum(len(ids) for ids, _ in found) == SMALL.block
    assert all(ids.numel() <= SMALL.batch_tokens or len(ids) == 1 for ids, _ in found)
    assert sum(int((ids == 0).sum()) for ids, _ in found) < 0.15 * sum(ids.numel() for ids, _ in found)
    texts = {d.text for d in documents("pt", "train", 4, SMALL.block)}
    shown = {tokenizer.decode(row[row > 2].tolist()) for ids, _ in found for row in ids}
    assert shown == texts


def test_running_text_is_taught_whole_and_chats_in_the_models_turns_only(tokenizer: Tokenizer):
    text = next(d for d in documents("pt", "train", 0))
    ids = tokenizer.encode(text.text).ids
    assert taught(text, ids) == [False] + [True] * (len(ids) - 1)
    chat = next(d for d in documents("it", "train", 0) if d.family.startswith("chat."))
    ids = tokenizer.encode(chat.text).ids
    flags = taught(chat, ids)
    shown = tokenizer.decode([i for i, on in zip(ids, flags, strict=True) if on], skip_special_tokens=False)
    answer = chat.text.removeprefix(chat.facts["prompt"])
    assert shown == answer.removesuffix("\n")


def test_the_schedule_warms_up_and_decays():
    assert schedule(0.0) == 0
    assert schedule(0.015) == pytest.approx(0.5)
    assert schedule(0.03) == pytest.approx(1.0)
    assert schedule(1.0) == pytest.approx(0.02)
    middle = 0.03 + 0.97 / 2
    assert schedule(middle) == pytest.approx(0.51)
