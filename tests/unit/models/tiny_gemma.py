"""Random tiny models of the three classes, and a tiny tokenizer laid out like Gemma's.

Everything that can hide a mistake at its default is set otherwise: key/value heads are shared, n_heads *
head_dim is not d_model, the window is shorter than the texts, and the norms' weights are not zero.
"""

from functools import lru_cache
from typing import Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaTokenizer,
    PreTrainedModel,
    SiglipVisionConfig,
)

from gemscope.models.gemma import Gemma

Kind = Literal["gemma3", "gemma3mm", "gemma2"]
KINDS: tuple[Kind, ...] = ("gemma3", "gemma3mm", "gemma2")

# As published with google/gemma-3-*-it.
CHAT_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}"""

_SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
_WORDS = [
    "the",
    "capital",
    "of",
    "France",
    "is",
    "Paris",
    "user",
    "model",
    "hello",
    "world",
    "and",
    "we",
    "like",
    "long",
    "words",
    "in",
    "Lyon",
    "today",
]


@lru_cache
def tokenizer() -> GemmaTokenizer:
    """Gemma's layout in small: specials at Gemma's ids, user-defined newlines, 256 bytes, merged words."""
    names = [*_SPECIALS, "[multimodal]", *(f"<unused{i}>" for i in range(99))]
    names += ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {name: i for i, name in enumerate(names)}
    merges: list[tuple[str, str]] = []

    def add(piece: str) -> None:
        vocab.setdefault(piece, len(vocab))

    for char in [chr(c) for c in range(33, 127)] + ["▁", "é", "ü"]:
        add(char)
    for word in [*("▁" + word for word in _WORDS), *_WORDS]:
        piece = word[0]
        for char in word[1:]:
            if (piece, char) not in merges:
                merges.append((piece, char))
            piece += char
            add(piece)
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*_SPECIALS, "<start_of_turn>", "<end_of_turn>"]
    inner.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    inner.add_tokens([AddedToken(name, normalized=False, special=False) for name in ("\n", "\n\n")])
    made = GemmaTokenizer(tokenizer_object=inner, chat_template=CHAT_TEMPLATE)
    assert made.convert_tokens_to_ids("<end_of_turn>") == 106
    return made


def config(kind: Kind, **changes: object) -> Gemma2Config | Gemma3TextConfig | Gemma3Config:
    sizes: dict[str, object] = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "max_position_embeddings": 128,
        "query_pre_attn_scalar": 7,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    layers = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]}
    if kind == "gemma2":
        # caps tight enough to matter at this size
        return Gemma2Config(**(sizes | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0} | changes))
    text = Gemma3TextConfig(**(sizes | layers | changes))
    if kind == "gemma3":
        return text
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        mm_tokens_per_image=4,
        image_token_index=400,
        boi_token_index=401,
        eoi_token_index=402,
    )


def build(kind: Kind, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A random model; weights are large enough for attention and logits to be far from uniform."""
    classes = {
        "gemma3": Gemma3ForCausalLM,
        "gemma3mm": Gemma3ForConditionalGeneration,
        "gemma2": Gemma2ForCausalLM,
    }
    torch.manual_seed(seed)
    model = classes[kind](config(kind, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(0.0, 0.3)
            elif "embed_tokens" in name:
                parameter.normal_(0.0, 0.1)
            elif parameter.ndim == 2:
                parameter.normal_(0.0, 0.25)
    return model.to(dtype).eval().requires_grad_(False)


def gemma(kind: Kind = "gemma3", *, check: bool = False, **changes: object) -> Gemma:
    """``build`` with the tokenizer around it."""
    return Gemma.wrap(build(kind, **changes), tokenizer(), name=f"tiny-{kind}", check=check)


TEXTS = (
    "the capital of France is Paris and we like Lyon",
    "hello world",
    "words in Lyon today 🙂 über",
)
