"""The microworld's tokenizer: byte-pair encoding with Gemma's special tokens at Gemma's ids and byte fallback.

Spaces become "▁" at the front of the next word, digits and punctuation stand alone, and whatever the corpus never
showed is spelled in bytes, so that any text can be read.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from gemscope.core.files import write_json

SPECIALS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "[multimodal]",
    *(f"<unused{i}>" for i in range(99)),
)
TURNS = ("<start_of_turn>", "<end_of_turn>")
EOS_ID, START_ID, END_ID = 1, 105, 106
"""Ids of the end of text and of the turn markers, as in Gemma 3."""
_BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'] | trim + '\\n\\n' -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for message in rest -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ (first if loop.first else '') + message['content'] | trim }}"
    "{{ '<end_of_turn>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)


def _pieces() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|\p{N}|\p{P}|[+=<>$^`|~]"), "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn the merges on ``texts``; the result has exactly ``vocab_size`` tokens (fewer if the texts give no more)."""
    learner = Tokenizer(BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = _pieces()
    fixed = [*SPECIALS, *TURNS, *_BYTES]
    learner.train_from_iterator(texts, BpeTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    merges = [(left, right) for left, right in learned["merges"]]
    tokenizer = Tokenizer(BPE(learned["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = learner.normalizer
    tokenizer.pre_tokenizer = _pieces()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*SPECIALS, *TURNS)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, chat: bool) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, with the chat template if the model was taught chats."""
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            **({"chat_template": CHAT_TEMPLATE} if chat else {}),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
            "padding_side": "left",
        },
    )
