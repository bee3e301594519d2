"""Known traps of reading Gemma through transformers; each test would fail for whoever falls into the one in
its name."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from gemscope.core.errors import FormatError
from gemscope.core.sites import Site
from gemscope.models.attention import NAME
from gemscope.models.gemma import Gemma
from gemscope.models.hooks import Hooks, Stop
from unit.models.tiny_gemma import KINDS, TEXTS, Kind, build, gemma, tokenizer


def _n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_trap_01_the_last_resid_post_is_before_the_final_norm(kind: Kind) -> None:
    g = gemma(kind)
    tokens = g.tokens(TEXTS[0])
    capture = g.capture(tokens, [*g.every_layer("resid_post"), "embed", "final_norm"])
    with torch.no_grad():
        hidden = g.model(input_ids=tokens.ids[None], output_hidden_states=True, use_cache=False).hidden_states
    assert torch.equal(hidden[0], capture["embed"])
    assert all(torch.equal(hidden[i + 1], capture[f"resid_post.{i}"]) for i in range(3))
    assert torch.equal(hidden[4], capture["final_norm"])
    assert not torch.allclose(hidden[4], capture["resid_post.3"], atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_trap_02_patterns_are_there_although_fused_attention_returns_none(kind: Kind) -> None:
    g = gemma(kind)
    tokens = g.tokens(TEXTS[0])
    patterns = g.capture(tokens, g.every_layer("pattern"))
    eager = build(kind)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        truth = eager(input_ids=tokens.ids[None], output_attentions=True, use_cache=False).attentions
    for i in range(4):
        assert torch.equal(patterns[f"pattern.{i}"], truth[i])


def test_trap_03_the_mask_is_registered_with_the_attention_function() -> None:
    assert NAME in AttentionInterface._global_mapping
    assert NAME in AttentionMaskInterface._global_mapping
    g = gemma()
    tokens = g.tokens(TEXTS[0])
    patterns = g.capture(tokens, g.every_layer("pattern"))
    for layer in range(4):
        pattern, n = patterns[f"pattern.{layer}"], len(tokens)
        age = torch.arange(n)[:, None] - torch.arange(n)
        hidden = (age < 0) | (age >= (g.shape.attention(layer).window or n))
        assert bool((pattern[..., hidden] == 0).all())
        assert bool((pattern[..., ~hidden] > 0).all())
        assert torch.allclose(pattern.sum(-1), torch.ones(pattern.shape[:-1]), atol=1e-6)


def test_trap_04_a_checkpoint_that_lacks_weights_is_refused_not_filled_with_random_numbers(
    tmp_path: Path,
) -> None:
    build("gemma3").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    Gemma.load(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    prefixed = {"language_model." + name: value for name, value in weights.items()}
    save_file(prefixed, file, {"format": "pt"})
    with pytest.raises(FormatError, match="lack"):
        Gemma.load(tmp_path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(FormatError, match=r"lack 1 tensors.*layers\.1\.mlp\.up_proj"):
        Gemma.load(tmp_path)


def test_trap_05_the_head_gets_freshly_packed_rows_in_bf16() -> None:
    g = gemma(dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    handle = g.decoder.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    g.generate([g.tokens(text) for text in TEXTS], max_new_tokens=2)
    g.logits(g.tokens(TEXTS[0]))
    handle.remove()
    assert len(seen) == 3
    assert all(x.ndim == 2 and x.stride() == (24, 1) and x.storage_offset() == 0 for x in seen)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in seen)


def test_trap_06_no_cache_is_kept_unless_generating_and_pattern_columns_are_tokens_in_every_layer() -> None:
    g = gemma()
    seen: list[object] = []
    handle = g.decoder.layer(0).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["past_key_values"]), with_kwargs=True
    )
    g.capture(g.tokens(TEXTS[0]), ["resid_post.1"])
    handle.remove()
    assert seen == [None]

    from gemscope.models.interventions import Edit

    widths: dict[int, list[int]] = {0: [], 2: []}

    def look(layer: int):
        def note(pattern: torch.Tensor) -> torch.Tensor:
            widths[layer].append(pattern.shape[-1])
            return pattern

        return note

    edits = [Edit(f"pattern.{layer}", look(layer)) for layer in widths]
    tokens = g.tokens(TEXTS[0])
    g.generate(tokens, max_new_tokens=3, interventions=edits)
    n = len(tokens)
    assert widths[0] == widths[2]
    assert widths[0][: len(widths[0])] == [n, n + 1, n + 2][: len(widths[0])]


@pytest.mark.parametrize("kind", KINDS)
def test_trap_07_inputs_are_read_where_the_modules_get_them(kind: Kind) -> None:
    """self_attn gets keywords only, layers get theirs by position: both inputs are seen all the same."""
    g = gemma(kind)
    capture = g.capture(g.tokens(TEXTS[0]), ["resid_pre.1", "attn_in.1", "z.1", "attn_out_raw.1", "q.1"])
    attention = g.decoder.layer(1).get_submodule("self_attn")
    assert torch.equal(g.decoder.layer(1).input_layernorm(capture["resid_pre.1"]), capture["attn_in.1"])
    assert torch.equal(attention.q_proj(capture["attn_in.1"]), capture["q.1"])
    assert torch.equal(attention.o_proj(capture["z.1"]), capture["attn_out_raw.1"])


def test_trap_08_a_rendered_chat_gets_one_bos() -> None:
    g = gemma()
    rendered = g.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert rendered.startswith("<bos>")
    for tokens in (
        g.tokens(rendered),
        g.tokens(rendered.removeprefix("<bos>")),
        g.chat("hello", answer=False),
    ):
        assert tokens.ids.tolist().count(2) == 1
        assert int(tokens.ids[0]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_trap_09_embed_is_already_scaled(kind: Kind) -> None:
    g = gemma(kind)
    tokens = g.tokens(TEXTS[0])
    capture = g.capture(tokens, ["embed"], logits=True)
    rows = g.unembedding()[tokens.ids]
    assert torch.allclose(capture["embed"][0], rows * 24**0.5, rtol=1e-6)
    with torch.no_grad():
        again = g.model(inputs_embeds=capture["embed"], use_cache=False).logits
    assert torch.equal(again, capture.logits)


def test_trap_10_threads_that_share_a_model_do_not_see_each_others_hooks() -> None:
    """Two wrappers around one model, as a server would have them."""
    from gemscope.models.interventions import Ablate

    first = gemma()
    second = Gemma.wrap(first.model, tokenizer(), name="again", check=False)
    texts = [first.tokens(text) for text in TEXTS]
    sites = ["resid_post.2", "pattern.1", "mlp_out.0"]
    ablate = [Ablate("mlp_out.0")]
    plain = [first.capture(t, sites, logits=True) for t in texts]
    changed = [second.capture(t, sites, logits=True, interventions=ablate) for t in texts]
    wrong: list[str] = []

    def work(g: Gemma, offset: int) -> None:
        for i in range(24):
            n, cut = (i + offset) % len(texts), (i + offset) % 2 == 1
            truth = (changed if cut else plain)[n]
            got = g.capture(texts[n], sites, logits=True, interventions=ablate if cut else [])
            same = all(torch.equal(got[s], truth[s]) for s in sites) and torch.equal(got.logits, truth.logits)
            if not same:
                wrong.append(f"{offset}.{i}")

    threads = [threading.Thread(target=work, args=(g, i)) for i, g in enumerate((first, second, first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert _n_hooks(first.model) == 0


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_trap_11_the_pass_stops_after_the_last_site_and_no_hook_is_left_behind(kind: Kind) -> None:
    from gemscope.models.interventions import Edit

    g = gemma(kind)
    tokens, ran = g.tokens(TEXTS[0]), list[int]()
    for i in range(4):
        g.decoder.layer(i).get_submodule("mlp").register_forward_hook(lambda *_, i=i: ran.append(i))
    before, implementation = _n_hooks(g.model), g.decoder.config._attn_implementation
    g.capture(tokens, ["resid_post.0", "resid_mid.2", "pattern.1"])
    assert ran == [0, 1]
    assert _n_hooks(g.model) == before
    g.capture(tokens, ["resid_post.3"], logits=True)
    assert ran == [0, 1, 0, 1, 2, 3]

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise _Interrupted

    for site in ("resid_mid.1", "pattern.2", "resid_post.0"):
        with pytest.raises(_Interrupted):
            g.capture(tokens, ["resid_post.3", "pattern.3"], interventions=[Edit(site, fail)])
        assert _n_hooks(g.model) == before
        assert g.decoder.config._attn_implementation == implementation
    assert torch.isfinite(g.logits(tokens)).all()


def test_trap_11_leaving_the_block_normally_by_a_stop_or_by_an_error_removes_every_hook() -> None:
    g = gemma()
    hooks = Hooks(g.decoder, writes={Site("resid_post", 1): [torch.tanh], Site("resid_mid", 1): [torch.tanh]})
    counts: list[int] = []

    def leave(error: Exception | None) -> None:
        with hooks.active():
            counts.append(_n_hooks(g.model))
            if error is not None:
                raise error

    leave(None)
    leave(Stop())
    with pytest.raises(_Interrupted):
        leave(_Interrupted())
    assert counts == [4, 4, 4]
    assert _n_hooks(g.model) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_trap_12_the_lens_normalises_each_layer_by_its_own_rms(kind: Kind) -> None:
    g = gemma(kind)
    capture = g.capture(g.tokens(TEXTS[0]), g.every_layer("resid_post"), logits=True)
    for site in g.every_layer("resid_post"):
        x = capture[site].double()
        unit = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        truth = unit @ (g.unembedding() * g.final_gain()).double().T
        if kind == "gemma2":
            truth = 3.0 * torch.tanh(truth / 3.0)
        assert torch.allclose(g.unembed(capture[site]).double(), truth, atol=1e-5)
        assert torch.allclose(g.unembed(capture[site]), g.unembed(100 * capture[site]), atol=1e-3)
    assert torch.equal(g.unembed(capture["resid_post.3"]), capture.logits)
    assert g.unembedding().data_ptr() == g.decoder.head.weight.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_pass_runs_the_models_own_attention(kind: Kind) -> None:
    g = gemma(kind)
    seen: list[str] = []
    g.decoder.layer(0).register_forward_hook(lambda *_: seen.append(g.decoder.config._attn_implementation))
    g.capture(g.tokens("hello"), ["resid_post.1"])
    g.capture(g.tokens("hello"), ["pattern.1"])
    own = "eager" if kind == "gemma2" else "sdpa"
    assert seen == [own, NAME]
    assert g.decoder.config._attn_implementation == own
