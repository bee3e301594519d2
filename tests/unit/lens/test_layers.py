"""The logit lens, the direct logit attribution and the activation trace against direct computations."""

import pytest
import torch

from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.sae import SAE
from gemscope.lens.direct import attribute
from gemscope.lens.formation import form
from gemscope.lens.logit_lens import logit_lens
from gemscope.lens.trace import Microscope, trace
from gemscope.models.freeze import FreezeNorms, FreezePatterns
from gemscope.models.interventions import Ablate
from unit.models.tiny_gemma import gemma

TEXT = "the capital of France is Paris and we like Lyon"


@pytest.fixture(scope="module")
def tiny():
    return gemma()


@pytest.mark.parametrize("kind", ["gemma3", "gemma3mm", "gemma2"])
def test_the_lens_is_final_norm_unembedding_cap_and_softmax(kind):
    model = gemma(kind)
    found = logit_lens(model, TEXT, target="Paris", top=3)
    tokens = model.tokens(TEXT)
    norm, head = model.decoder.final, model.unembedding().double()
    cap = model.decoder.softcap
    seen = model.capture(tokens, ["resid_pre.0", *model.every_layer("resid_post")])
    for row, x in enumerate(seen.acts.values()):
        x = x[0].double()
        x = x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * (1 + norm.weight.double())
        logits = x @ head.T
        if cap is not None:
            logits = cap * (logits / cap).tanh()
        probs = logits.softmax(-1)
        assert torch.allclose(found.top_probs[row].double(), probs.topk(3).values, atol=1e-5)
        assert torch.allclose(found.entropy[row].double(), -(probs * probs.log()).sum(-1), atol=1e-4)
        assert torch.allclose(found.target_prob[row].double(), probs[:, int(found.targets[0])], atol=1e-6)
        rank = 1 + (probs > probs[:, int(found.targets[0])][:, None]).sum(-1)
        assert torch.equal(found.target_rank[row], rank)
    assert found.pieces[int(found.targets[0])].strip("▁") == "Paris"
    own = model.logits(tokens)[0].softmax(-1)
    assert torch.allclose(found.top_probs[-1], own.topk(3).values, atol=1e-5)


def test_where_the_answer_emerges(tiny):
    found = logit_lens(tiny, TEXT)
    assert torch.equal(found.targets, tiny.logits(tiny.tokens(TEXT))[0].argmax(-1))
    for p in range(len(found.tokens)):
        firsts = [int(rank) == 1 for rank in found.target_rank[:, p]]
        expected = next(r for r in range(len(firsts) + 1) if all(firsts[r:]))
        assert int(found.emerges[p]) == expected
        assert found.emerges_at(p) == found.rows[expected]
    asked = logit_lens(tiny, TEXT, target="hello")
    assert torch.equal(logit_lens(tiny, TEXT, target=int(asked.targets[0])).target_prob, asked.target_prob)
    assert {asked.emerges_at(p) for p in range(len(asked.tokens)) if asked.target_rank[-1, p] > 1} == {"never"}


def test_a_long_text_is_unembedded_some_positions_at_a_time(tiny, monkeypatch):
    text = " ".join([TEXT, "words today hello world"] * 9)
    tokens = tiny.tokens(text)
    assert len(tokens) > 64
    whole = tiny.unembed(tiny.capture(tokens, ["resid_post.3"])["resid_post.3"][0]).argmax(-1)
    sizes, unembed = [], type(tiny).unembed
    monkeypatch.setattr(type(tiny), "unembed", lambda self, x: sizes.append(x[..., 0].numel()) or unembed(self, x))
    for target in (None, "Paris"):
        found = logit_lens(tiny, tokens, target=target)
        assert max(sizes) <= 64
        if target is None:
            assert torch.equal(found.targets, whole)


@pytest.mark.parametrize("read", [logit_lens, attribute, form])
@pytest.mark.parametrize("target", [10**6, -1])
def test_an_id_that_is_no_token_is_refused(tiny, read, target):
    with pytest.raises(InputError, match=f"no token {target}; .* 0 to {tiny.shape.vocab_size - 1}"):
        read(tiny, TEXT, target=target)


def test_a_target_is_a_word_or_its_id(tiny):
    paris, lyon = (int(tiny.tokens(f" {word}").ids[1]) for word in ("Paris", "Lyon"))
    by_word = attribute(tiny, TEXT, target=" Paris", other=" Lyon")
    assert (by_word.target.token, by_word.target.other) == (paris, lyon)
    assert attribute(tiny, TEXT, target=paris, other=lyon).target == by_word.target
    assert form(tiny, TEXT, target=paris).parts.target.token == paris
    with pytest.raises(InputError, match="the same token"):
        attribute(tiny, TEXT, target=paris, other=paris)


@pytest.mark.parametrize("kind", ["gemma3", "gemma3mm", "gemma2"])
@pytest.mark.parametrize("position", [-1, 4])
def test_the_parts_add_up_to_the_logit_difference(kind, position):
    model = gemma(kind, dtype=torch.float64)
    found = attribute(model, TEXT, target="Paris", other="Lyon", position=position)
    final = model.capture(model.tokens(TEXT), ["final_norm"])["final_norm"][0, position].double()
    rows = model.unembedding().double()
    logit = float(final @ (rows[found.target.token] - rows[found.target.other]))
    total = sum(value for _, value in found.components)
    assert total == pytest.approx(found.logit, abs=1e-12)
    assert found.logit == pytest.approx(logit, abs=1e-6)
    assert abs(found.rounding) < 1e-5
    assert torch.allclose(found.keys.sum(-1), found.attention, atol=1e-12)


def test_a_part_is_what_leaves_the_logit_when_it_is_taken_away_and_all_else_is_frozen():
    model = gemma(dtype=torch.float64)
    tokens = model.tokens(TEXT)
    found = attribute(model, tokens, target="Paris", other="Lyon")
    n = model.shape.n_layers
    sites = [*FreezeNorms.sites(n), *model.every_layer("pattern"), *model.every_layer("mlp_out")]
    reference = model.capture(tokens, sites)
    last = n - 1
    frozen = [FreezeNorms(reference), FreezePatterns(reference)]

    def logit(*changes):
        x = model.capture(tokens, ["final_norm"], interventions=[*frozen, *changes])["final_norm"][0, -1].double()
        rows = model.unembedding().double()
        return float(x @ (rows[found.target.token] - rows[found.target.other]))

    whole = logit()
    for head in range(4):
        # the last layer's MLP reads the head too: it is put back to what it wrote
        keep = Ablate(f"mlp_out.{last}", mean=reference[f"mlp_out.{last}"][0, -1], positions="last")
        gone = logit(Ablate(f"z.{last}", heads=[head], positions="last"), keep)
        assert whole - gone == pytest.approx(float(found.attention[last, head]), abs=1e-5)


def test_without_another_token_the_mean_logit_is_the_yardstick(tiny):
    found = attribute(tiny, TEXT, target="Paris")
    logits = tiny.logits(tiny.tokens(TEXT))[0, -1]
    assert found.logit == pytest.approx(float(logits[found.target.token] - logits.mean()), abs=1e-4)


def test_rounding_is_named_in_bf16():
    found = attribute(gemma(dtype=torch.bfloat16), TEXT, target="Paris", other="Lyon")
    assert found.logit == pytest.approx(sum(value for _, value in found.components), abs=1e-9)
    assert 0 < abs(found.rounding) < 0.5


def test_a_position_outside_is_refused(tiny):
    with pytest.raises(InputError, match="give 0 to 10"):
        attribute(tiny, TEXT, position=11)


def _dictionary(d_in: int, d_sae: int = 40) -> SAE:
    torch.manual_seed(0)
    return SAE(
        torch.randn(d_in, d_sae), torch.zeros(d_sae), torch.randn(d_sae, d_in), torch.zeros(d_in), torch.zeros(d_sae)
    )


def test_the_trace_is_norms_cosines_and_latents(tiny):
    sae = _dictionary(tiny.shape.d_model)
    found = trace(tiny, TEXT, dictionaries={1: Microscope(sae, {3: "three"})}, top=2)
    seen = tiny.capture(
        tiny.tokens(TEXT), [Site(n, i) for i in range(4) for n in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    )
    for layer in range(4):
        pre, attn, mlp, post = (
            seen[Site(n, layer)][0].double() for n in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        last = seen["resid_post.3"][0].double()
        for value, expected in (
            (found.resid_norm, post.norm(dim=-1)),
            (found.attention_norm, attn.norm(dim=-1)),
            (found.mlp_norm, mlp.norm(dim=-1)),
            (found.cosine_before, (pre * post).sum(-1) / pre.norm(dim=-1) / post.norm(dim=-1)),
            (found.cosine_last, (post * last).sum(-1) / last.norm(dim=-1) / post.norm(dim=-1)),
        ):
            assert torch.allclose(value[layer].double(), expected, atol=1e-4, rtol=1e-5)
    acts = sae.encode(seen["resid_post.1"][0])
    for p in range(1, len(found.tokens)):
        assert [a.latent for a in found.latents[1][p]] == acts[p].topk(2).indices.tolist()
        assert all(a.name == ("three" if a.latent == 3 else None) for a in found.latents[1][p])
    assert found.latents[1][0] == ()
    assert found.latents[0][3] == ()


def test_latents_are_ranked_by_their_share_of_the_largest_where_it_is_known(tiny):
    sae = _dictionary(tiny.shape.d_model)
    x = tiny.capture(tiny.tokens(TEXT), ["resid_post.1"])["resid_post.1"][0]
    largest = torch.linspace(0, 40, 40)
    share = sae.encode(x) / largest
    share[:, 0] = (sae.encode(x)[:, 0] > 0).float()
    for row, found in zip(share, Microscope(sae, {}, largest).strongest(x, 3), strict=True):
        assert [a.strength for a in found] == pytest.approx(row.topk(3).values.tolist(), rel=1e-5)
    with pytest.raises(InputError, match="give dictionaries of this model"):
        Microscope(_dictionary(7)).strongest(x, 3)


def test_the_formation_is_the_three_together(tiny):
    sae = _dictionary(tiny.shape.d_model)
    found = form(tiny, TEXT, position=5, target="Paris", dictionaries={2: Microscope(sae)})
    assert found.position == 5
    assert torch.equal(found.lens.top_ids, logit_lens(tiny, TEXT, target="Paris").top_ids)
    assert found.parts.logit == attribute(tiny, TEXT, target="Paris", position=5).logit
    shown = str(found)
    assert max(map(len, shown.splitlines())) <= 80
    assert "2 global" in shown
    assert "never the most likely" in shown or "is the most likely from" in shown


@pytest.mark.parametrize("read", [logit_lens, attribute, trace, form])
def test_every_result_prints_saves_and_draws(tiny, tmp_path, read):
    found = read(tiny, TEXT)
    assert max(map(len, str(found).splitlines())) <= 80
    assert repr(found) == str(found)
    for ending in ("json", "npz", "html"):
        assert found.save(tmp_path / f"x.{ending}").stat().st_size > 500
