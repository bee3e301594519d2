"""What looking costs: capturing every layer against a plain forward, and one layer without the unembedding.

A random model of the shape of Gemma 3 270M; speed does not depend on the weights. Wanted: the capture of
resid_post in all layers, logits included, takes at most 1.05 times the plain forward.
"""

import torch
from _common import Result, arguments, interleaved, machine, report
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from gemscope.models.gemma import Gemma

SHAPE_270M = {
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
}
SHAPE_QUICK = SHAPE_270M | {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}


def build(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Gemma:
    """A random model, and a vocabulary of as many made-up words."""
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**shape)).to(device, dtype).requires_grad_(False)
    vocab = {"<bos>": 0} | {f"w{i}": i for i in range(1, shape["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocab))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>")
    return Gemma.wrap(model, tokenizer, name="random", check=False)


def measure(gemma: Gemma, batch: int, pos: int, rounds: int, label: str) -> list[Result]:
    """Times of four ways to run ``batch`` x ``pos`` tokens, and what follows from them."""
    ids = torch.randint(2, gemma.shape.vocab_size, (batch, pos), generator=torch.Generator().manual_seed(0))
    tokens = gemma.batch([gemma.tokens_of(row) for row in ids])
    on_device = ids.to(gemma.device)
    middle = gemma.shape.n_layers // 2
    every = gemma.every_layer("resid_post")

    def plain() -> object:
        with torch.no_grad():
            return gemma.model(input_ids=on_device, use_cache=False).logits

    times = interleaved(
        {
            "plain": plain,
            "every": lambda: gemma.capture(tokens, every, logits=True),
            "harvest_all": lambda: gemma.capture(tokens, every),
            "harvest": lambda: gemma.capture(tokens, [f"resid_post.{middle}"]),
        },
        rounds,
    )
    size = f"{batch}x{pos}"
    on = f"{label}, {size} tokens, {gemma.dtype}, best of {rounds}; {machine()}".replace("torch.", "", 1)
    return [
        Result(f"plain forward {size}", 1e3 * times["plain"], "ms", on),
        Result(f"capture resid_post, all layers, logits {size}", 1e3 * times["every"], "ms", on),
        Result(f"capture / plain {size}", times["every"] / times["plain"], "ratio", on),
        Result(f"harvest all layers, no unembedding {size}", 1e3 * times["harvest_all"], "ms", on),
        Result(f"harvest layer {middle}, no unembedding {size}", 1e3 * times["harvest"], "ms", on),
        Result(f"plain / harvest layer {middle} {size}", times["plain"] / times["harvest"], "ratio", on),
    ]


def main() -> None:
    """Run and print."""
    options = arguments(__doc__ or "")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    label = "tiny random Gemma 3" if options.quick else "random Gemma 3 270M"
    for dtype in dtypes[:1] if options.quick else dtypes:
        gemma = build(SHAPE_QUICK if options.quick else SHAPE_270M, dtype, device)
        for batch, pos in [(1, 128), (8, 256)]:
            rounds = 3 if options.quick else (20 if batch == 1 else 5)
            report(measure(gemma, batch, pos, rounds, label), options.json)


if __name__ == "__main__":
    main()
