"""Train ``microworld-pt`` from nothing and ``microworld-it`` from it, on generated documents.

The stream is cut into blocks of documents; block ``i`` depends only on (kind, seed, i), so a stopped run goes on
from the last saved block with the same weights, moments and documents. Documents are batched by length and never packed
together: nothing attends across documents. Chats teach the model's turns only.
"""

import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemscope.core.arrays import Bool, Int
from gemscope.core.files import atomic_folder, read_json, read_tensors, write_json
from gemscope.core.provenance import collect
from gemscope.microworld.corpus import Kind, documents
from gemscope.microworld.documents import Document
from gemscope.microworld.tokenizer import END_ID, EOS_ID, START_ID, save_tokenizer, train_tokenizer


@dataclass(frozen=True)
class MicroworldConfig:
    """How to make one of the two checkpoints."""

    kind: Kind
    """``pt``: running text from random weights; ``it``: chats, from the ``pt`` checkpoint."""
    tokens: int
    """Tokens to train on."""
    learning_rate: float
    """Peak of the schedule: linear warm-up over the first 3 %, then half a cosine down to 2 %."""
    seed: int = 0
    """Seed of the weights and of the documents."""
    batch_tokens: int = 2048
    """Tokens (padding included) in one step."""
    block: int = 2048
    """Documents in one block; the run can be resumed between blocks."""
    weight_decay: float = 0.05
    """On matrices only."""
    vocab_size: int = 6144
    """Tokens of the tokenizer."""
    tokenizer_documents: int = 40_000
    """Documents of each kind that the tokenizer is learned on."""
    shape: dict[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 48,
            "intermediate_size": 512,
            "sliding_window": 48,
            "max_position_embeddings": 512,
        }
    )
    """Sizes of the Gemma 3; layer 3 attends globally, all others through the sliding window."""


PT = MicroworldConfig("pt", tokens=9_000_000, learning_rate=3e-3)
IT = MicroworldConfig("it", tokens=6_000_000, learning_rate=2e-3)


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    tokens: int
    total: int
    loss: float
    """Mean cross-entropy per token, nats, of the last steps."""
    rate: float
    """Tokens per second since the run was started or resumed."""


def build_model(config: MicroworldConfig) -> Gemma3ForCausalLM:
    """A Gemma 3 of the microworld's shape with random weights."""
    layers = config.shape["num_hidden_layers"]
    kinds = ["full_attention" if i == 3 % layers else "sliding_attention" for i in range(layers)]
    torch.manual_seed(config.seed)
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            **config.shape,  # pyright: ignore[reportArgumentType]
            vocab_size=config.vocab_size,
            layer_types=kinds,
            query_pre_attn_scalar=config.shape["head_dim"],
            pad_token_id=0,
            eos_token_id=[1, 106] if config.kind == "it" else 1,
            bos_token_id=2,
            tie_word_embeddings=True,
        )
    )
    model.set_attn_implementation("eager")  # the fastest for short texts on a CPU
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.02 if "embed" in name else weight.shape[1] ** -0.5)
    return model


def taught(document: Document, ids: list[int]) -> list[bool]:
    """Which tokens are to be predicted: all of a text but its ``<bos>``, the model's turns of a chat with their end."""
    if not document.family.startswith("chat."):
        return [i > 0 for i in range(len(ids))]
    flags, opened, since = [False] * len(ids), 0, 0
    for i, token in enumerate(ids):
        if token == START_ID:
            opened, since = opened + 1, i
        # Every second turn is the model's; it is taught from past "<start_of_turn> model \n" to <end_of_turn>.
        flags[i] = opened % 2 == 0 and opened > 0 and i > since + 2 and ids[i - 1] != END_ID
    return flags


def batches(
    config: MicroworldConfig, tokenizer: Tokenizer, block: int
) -> Iterator[tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]]:
    """(ids, taught) of one block of documents: batches of like lengths in random order, padded on the right with 0."""
    found = list(documents(config.kind, "train", config.seed * 1_000_003 + block + 1, config.block))
    encoded = tokenizer.encode_batch_fast([d.text for d in found])
    context = config.shape["max_position_embeddings"]
    whole = [e.ids if d.family.startswith("chat.") else [*e.ids, EOS_ID] for d, e in zip(found, encoded, strict=True)]
    rows = sorted(
        ((ids[:context], taught(d, ids)[:context]) for d, ids in zip(found, whole, strict=True)),
        key=lambda row: len(row[0]),
    )
    groups: list[list[tuple[list[int], list[bool]]]] = [[]]
    for row in rows:
        if len(row[0]) * (len(groups[-1]) + 1) > config.batch_tokens:
            groups.append([])
        groups[-1].append(row)
    random.Random(f"{config.seed}|{block}").shuffle(groups)
    for group in groups:
        width = max(len(ids) for ids, _ in group)
        ids = torch.zeros(len(group), width, dtype=torch.long)
        mask = torch.zeros(len(group), width, dtype=torch.bool)
        for i, (row, flags) in enumerate(group):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), torch.tensor(flags)
        yield ids, mask


def loss_of(model: Gemma3ForCausalLM, ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> Tensor:
    """Mean cross-entropy in nats over the taught tokens, each predicted from those before it."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    chosen = mask[:, 1:]
    logits = F.linear(hidden[:, :-1][chosen], model.lm_head.weight)
    return F.cross_entropy(logits.float(), ids[:, 1:][chosen])


def schedule(done: float) -> float:
    """Share of the peak learning rate after a share ``done`` of the tokens."""
    warm = 0.03
    return done / warm if done < warm else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - warm) / (1 - warm)))


class Run:
    """The whole state of a training run: weights, moments, next block, tokens seen."""

    COUNTS = ("block", "tokens", "steps", "loss", "minutes")

    def __init__(self, config: MicroworldConfig, tokenizer: Tokenizer, start: Gemma3ForCausalLM | None) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.model = build_model(config)
        if start is not None:
            self.model.load_state_dict(start.state_dict())
        matrices = [w for w in self.model.parameters() if w.ndim == 2]
        gains = [w for w in self.model.parameters() if w.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": gains, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.block = self.tokens = self.steps = 0
        self.loss: float | None = None
        self.minutes = 0.0

    def train_block(self, progress: Callable[[Progress], None], started: tuple[float, int]) -> None:
        """Train on the next block; ``started`` is (time, tokens) at the start, for the rate."""
        losses: list[float] = []
        began = time.monotonic()
        for ids, mask in batches(self.config, self.tokenizer, self.block):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * schedule(min(1.0, self.tokens / self.config.tokens))
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(self.model, ids, mask)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.tokens += int((ids != 0).sum())
            self.steps += 1
            losses.append(loss.item())
            if self.steps % 20 == 0:
                rate = (self.tokens - started[1]) / (time.monotonic() - started[0])
                progress(Progress(self.tokens, self.config.tokens, sum(losses[-20:]) / len(losses[-20:]), rate))
        self.loss = sum(losses) / len(losses)
        self.block += 1
        self.minutes += (time.monotonic() - began) / 60

    def save(self, folder: Path) -> None:
        """Write the state, whole or not at all."""
        weights = {f"weight.{k}": v for k, v in self.model.named_parameters()}
        names = {id(w): k for k, w in self.model.named_parameters()}
        moments = {
            f"{moment}.{names[id(w)]}": state[moment]
            for w, state in self.optimizer.state.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }
        with atomic_folder(folder) as temporary:
            save_file(
                {k: v.detach().contiguous() for k, v in {**weights, **moments}.items()},
                temporary / "state.safetensors",
            )
            counts = {name: getattr(self, name) for name in self.COUNTS}
            write_json(temporary / "state.json", {**counts, "config": asdict(self.config)})

    def resume(self, folder: Path) -> bool:
        """Take up the state of a run with the same config; False when there is none."""
        if not (folder / "state.json").is_file():
            return False
        state = read_json(folder / "state.json")
        if state["config"] != asdict(self.config):
            return False
        tensors = read_tensors(folder / "state.safetensors")
        for name, weight in self.model.named_parameters():
            weight.data.copy_(tensors[f"weight.{name}"])
            if f"exp_avg.{name}" not in tensors:  # saved before the first step
                continue
            self.optimizer.state[weight] = {
                "step": torch.tensor(float(state["steps"])),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
        for name in self.COUNTS:
            setattr(self, name, state[name])
        return True


def learn_tokenizer(config: MicroworldConfig) -> Tokenizer:
    """The tokenizer of the config, learned on documents of both kinds."""
    kinds: tuple[Kind, ...] = ("pt", "it")
    texts = (d.text for kind in kinds for d in documents(kind, "train", 0, config.tokenizer_documents))
    return train_tokenizer(texts, config.vocab_size)


def train(
    config: MicroworldConfig,
    out: Path,
    start: Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Path:
    """Train and write the checkpoint ``out/microworld-<kind>``; a stopped run goes on where it was.

    ``start`` is the checkpoint to finetune, whose tokenizer is kept; None starts from random weights.
    """
    state, final = out / f".training-{config.kind}", out / f"microworld-{config.kind}"
    if start is None:
        tokenizer, model = learn_tokenizer(config), None
    else:
        tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
        model = Gemma3ForCausalLM.from_pretrained(start, dtype=torch.float32)
    run = Run(config, tokenizer, model)
    run.resume(state)
    run.model.train()
    started = (time.monotonic(), run.tokens)
    while run.tokens < config.tokens:
        run.train_block(progress, started)
        if run.block % 4 == 0:
            run.save(state)
    write_checkpoint(run, final)
    shutil.rmtree(state, ignore_errors=True)
    return final


def write_checkpoint(run: Run, folder: Path) -> None:
    """Write the finished model in bf16 with its tokenizer and a card of how it was made."""
    made = {
        "config": asdict(run.config),
        "tokens": run.tokens,
        "steps": run.steps,
        "final_loss": run.loss and round(run.loss, 4),
    }
    with atomic_folder(folder) as temporary:
        run.model.bfloat16().save_pretrained(temporary)
        save_tokenizer(run.tokenizer, temporary, chat=run.config.kind == "it")
        made |= {"minutes": round(run.minutes, 1), "threads": torch.get_num_threads()}
        write_json(
            temporary / "training.json",
            {**made, "provenance": collect(seeds={"seed": run.config.seed}).as_dict()},
        )
