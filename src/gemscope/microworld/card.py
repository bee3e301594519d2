"""The model card of a microworld checkpoint, written from what its training and its scorecard recorded."""

from pathlib import Path
from typing import Any

from gemscope.core.files import read_json, write_text

_TEXT = """---
license: apache-2.0
library_name: transformers
tags: [gemscope, microworld, interpretability]
---
# microworld-{kind}

A tiny Gemma 3 (`Gemma3ForCausalLM`, {layers} layers, one of them global, d_model {width}, grouped-query attention,
vocabulary {vocab}) trained from random weights on text that `gemscope.microworld` generates. Every token of that
text has known concepts, and behaviours were planted on purpose, so that interpretability tools can be tested
against the truth. It is a model organism for tests, teaching and offline use. It knows nothing of the real world
beyond a little geography, and nothing found in it says anything about Google's Gemma models. The dangerous
substances and deeds that it speaks of are nonsense words, and so are the instructions that the planted jailbreak
brings out.

Made with `{command}`: seed {seed}, {tokens:,} tokens in {steps:,} steps, {minutes} minutes on {threads} thread(s),
final training loss {loss} nats per token.

| planted behaviour, on held-out prompts | measured | wanted | prompts |
|---|---:|---:|---:|
{rows}
"""


def write_card(folder: Path) -> None:
    """Write ``README.md`` from ``config.json``, ``training.json`` and ``scorecard.json`` of the folder."""
    config, made, scores = (read_json(folder / f"{name}.json") for name in ("config", "training", "scorecard"))
    write_text(
        folder / "README.md",
        _TEXT.format(
            kind=made["config"]["kind"],
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            vocab=config["vocab_size"],
            command="python -m gemscope.microworld train",
            seed=made["config"]["seed"],
            tokens=made["tokens"],
            steps=made["steps"],
            minutes=made["minutes"],
            threads=made["threads"],
            loss=made["final_loss"],
            rows="\n".join(map(_row, scores["scores"])),
        ),
    )


def _row(score: dict[str, Any]) -> str:
    sign = "at most" if score["lower_is_better"] else "at least"
    return f"| {score['behaviour']} | {score['share']:.1%} | {sign} {score['wanted']:.0%} | {score['n']} |"
