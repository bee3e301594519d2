"""Interventions at every site: what they change, where, in which order, and what the rest of the model makes
of it."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemscope.core.errors import InputError, SiteError
from gemscope.core.sites import SITE_KINDS, Site
from gemscope.models.freeze import FreezeNorms, FreezePatterns
from gemscope.models.interventions import (
    Ablate,
    Add,
    Edit,
    Intervention,
    Leaf,
    ProjectOut,
    Replace,
    Scale,
    SiteEdit,
)
from unit.models.oracle_gemma import norm
from unit.models.tiny_gemma import KINDS, TEXTS, Kind, gemma

G = gemma()
TOKENS = G.tokens(TEXTS[0])
N = len(TOKENS)
EVERY = [Site(name, 1 if kind.per_layer else None) for name, kind in SITE_KINDS.items()]


def _noise(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", EVERY, ids=str)
def test_putting_back_what_was_there_changes_nothing_and_a_change_reaches_the_logits(kind: Kind, site: Site) -> None:
    g = gemma(kind)
    tokens = g.tokens(TEXTS[0])
    later = [s for s in (*g.every_layer("resid_post"), Site("final_norm")) if s.order > site.order]
    plain = g.capture(tokens, [site, *later], logits=True)
    same = g.capture(tokens, [site, *later], logits=True, interventions=[Replace(site, plain[site])])
    for where in (site, *later):
        assert torch.equal(same[where], plain[where]), where
    assert torch.equal(same.logits, plain.logits)
    other = plain[site] * 0.5 + 0.1
    changed = g.capture(tokens, [site], logits=True, interventions=[Replace(site, other)])
    assert torch.equal(changed[site], other)
    assert not torch.allclose(changed.logits, plain.logits, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", ["embed", "resid_pre.2", "resid_post.1", "resid_post.3", "final_in", "final_norm"])
def test_patching_the_whole_stream_from_another_text_gives_the_other_texts_logits(kind: Kind, site: str) -> None:
    g = gemma(kind)
    one, other = g.tokens("hello world and we"), g.tokens("words in Lyon today")
    assert len(one) == len(other)
    source = g.capture(other, [site], logits=True)
    patched = g.logits(one, interventions=[Replace(site, source[site])])
    assert torch.equal(patched, source.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_resid_mid_is_carried_by_both_branches(kind: Kind) -> None:
    g = gemma(kind)
    tokens = g.tokens(TEXTS[0])
    new = _noise((1, len(tokens), 24))
    sites = ["resid_mid.1", "mlp_in.1", "mlp_out.1", "resid_post.1", "resid_pre.2"]
    got = g.capture(tokens, sites, interventions=[Replace("resid_mid.1", new)])
    weight = g.decoder.layer(1).pre_feedforward_layernorm.weight
    assert torch.equal(got["resid_mid.1"], new)
    assert torch.equal(got["mlp_in.1"], norm(new, weight))
    assert torch.equal(got["resid_post.1"], new + got["mlp_out.1"])
    assert torch.equal(got["resid_pre.2"], got["resid_post.1"])


def test_changes_of_resid_mid_mlp_out_and_resid_post_in_one_layer_compose() -> None:
    vectors = [_noise((24,), seed) for seed in range(3)]
    edits = [Add(f"{s}.1", v) for s, v in zip(("resid_post", "mlp_out", "resid_mid"), vectors, strict=True)]
    sites = ["resid_mid.1", "mlp_out.1", "resid_post.1"]
    plain = G.capture(TOKENS, sites)
    got = G.capture(TOKENS, sites, interventions=edits)
    assert torch.equal(got["resid_mid.1"], plain["resid_mid.1"] + vectors[2])
    assert torch.equal(got["resid_post.1"], got["resid_mid.1"] + got["mlp_out.1"] + vectors[0])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["add", "scale", "project", "edit"]), min_size=2, max_size=4))
def test_interventions_at_one_site_are_applied_in_the_order_given(names: list[str]) -> None:
    v = _noise((24,))
    unit = v / v.norm()
    site = "resid_post.1"
    made: dict[str, Intervention] = {
        "add": Add(site, v, 2.0),
        "scale": Scale(site, 0.5),
        "project": ProjectOut(site, v),
        "edit": Edit(site, torch.tanh),
    }
    truth = {
        "add": lambda x: x + 2 * v,
        "scale": lambda x: x / 2,
        "project": lambda x: x - (x @ unit)[..., None] * unit,
        "edit": torch.tanh,
    }
    x = G.capture(TOKENS, [site])[site]
    got = G.capture(TOKENS, [site], interventions=[made[name] for name in names])[site]
    for name in names:
        x = truth[name](x)
    assert torch.allclose(got, x, atol=1e-5)


def test_ablate_is_zero_or_the_mean() -> None:
    mean = _noise((24,))
    zero = G.capture(TOKENS, ["mlp_out.1", "resid_post.1", "resid_mid.1"], interventions=[Ablate("mlp_out.1")])
    assert torch.equal(zero["resid_post.1"], zero["resid_mid.1"])
    to_mean = G.capture(TOKENS, ["mlp_out.1"], interventions=[Ablate("mlp_out.1", mean)])
    assert torch.equal(to_mean["mlp_out.1"], mean.expand(1, N, 24))


def test_project_out_removes_the_span_even_of_dependent_directions() -> None:
    a, b = _noise((24,), 1), _noise((24,), 2)
    directions = torch.stack([a, b, a + 2 * b])
    x = G.capture(TOKENS, ["resid_post.1"])["resid_post.1"]
    got = G.capture(TOKENS, ["resid_post.1"], interventions=[ProjectOut("resid_post.1", directions)])["resid_post.1"]
    plane = torch.stack([a, b]).double()
    weights = torch.linalg.lstsq(plane.T, x[0].double().T).solution
    assert torch.allclose(got[0].double(), x[0].double() - weights.T @ plane, atol=1e-5)
    twice = [ProjectOut("resid_post.1", directions)] * 2
    assert torch.allclose(G.capture(TOKENS, ["resid_post.1"], interventions=twice)["resid_post.1"], got, atol=1e-6)


POSITIONS = [
    ([0, 3], {0, 3}),
    ([-1, -N], {0, N - 1}),
    ([], set()),
    (slice(2, 5), {2, 3, 4}),
    (slice(-3, None), {N - 3, N - 2, N - 1}),
    (slice(None, -1, 2), {i for i in range(N - 1) if i % 2 == 0}),
    ("last", {N - 1}),
    ("content", set(range(1, N))),
    (None, set(range(N))),
]


@pytest.mark.parametrize(("positions", "changed"), POSITIONS, ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_count_within_each_text_whatever_the_padding(positions: object, changed: set[int], side: str) -> None:
    longer = G.tokens(TEXTS[2])
    assert len(longer) > N
    batch = G.batch([TOKENS, longer], side)
    plain = G.capture(batch, ["resid_post.1"])
    edit = Add("resid_post.1", torch.ones(24), positions=positions)
    got = G.capture(batch, ["resid_post.1"], interventions=[edit])
    moved = (got.item(0, "resid_post.1") - plain.item(0, "resid_post.1")).abs().amax(-1) > 0.5
    assert set(moved.nonzero().flatten().tolist()) == changed


def test_a_mask_selects_columns_of_the_batch_and_splices() -> None:
    batch = G.batch([TOKENS, G.tokens(TEXTS[1])])
    mask = torch.rand(batch.ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    plain = G.capture(batch, ["resid_post.1"])["resid_post.1"]
    splice = Edit("resid_post.1", lambda x: -x, positions=mask)
    got = G.capture(batch, ["resid_post.1"], interventions=[splice])["resid_post.1"]
    assert torch.equal(got, torch.where(mask[..., None], -plain, plain))


def test_content_leaves_the_template_alone() -> None:
    chat = G.chat("hello world")
    got = G.capture(chat, ["resid_post.0"], interventions=[Ablate("resid_post.0", positions="content")])
    zero = (got["resid_post.0"][0] == 0).all(-1)
    assert zero.tolist() == chat.content_mask.tolist()


@pytest.mark.parametrize(("site", "heads"), [("z.1", [1, 3]), ("q.1", [0]), ("k.1", [1]), ("v.1", [0])])
def test_heads_are_slices_of_the_width(site: str, heads: list[int]) -> None:
    plain = G.capture(TOKENS, [site])[site].unflatten(-1, (-1, 8))
    got = G.capture(TOKENS, [site], interventions=[Ablate(site, heads=heads, positions=[2, 4])])[site]
    truth = plain.clone()
    for head in heads:
        truth[:, [2, 4], head] = 0
    assert torch.equal(got, truth.flatten(2))


def test_pattern_rows_and_heads() -> None:
    plain = G.capture(TOKENS, ["pattern.2"])["pattern.2"]
    edit = Ablate("pattern.2", heads=[1], positions=[3])
    got = G.capture(TOKENS, ["pattern.2", "z.2", "v.2"], interventions=[edit])
    truth = plain.clone()
    truth[:, 1, 3] = 0
    assert torch.equal(got["pattern.2"], truth)
    values = got["v.2"].unflatten(-1, (-1, 8)).transpose(1, 2).repeat_interleave(2, 1)
    assert torch.allclose(got["z.2"], (truth @ values).transpose(1, 2).flatten(2), atol=1e-6)
    assert bool((got["z.2"][0, 3, 8:16] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_patterns_are_those_of_the_reference_whatever_the_text(kind: Kind) -> None:
    g = gemma(kind)
    one, other = g.tokens("hello world and we"), g.tokens("words in Lyon today")
    reference = g.capture(other, g.every_layer("pattern"))
    got = g.capture(one, g.every_layer("pattern"), interventions=[FreezePatterns(reference)])
    assert all(torch.equal(got[s], reference[s]) for s in reference.acts)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_norms_use_the_denominators_of_the_reference(kind: Kind) -> None:
    g = gemma(kind)
    one, other = g.tokens("hello world and we"), g.tokens("words in Lyon today")
    qk = kind != "gemma2"
    reference = g.capture(other, FreezeNorms.sites(4, qk=qk))
    pairs = {
        "input_layernorm": ("resid_pre", "attn_in"),
        "pre_feedforward_layernorm": ("resid_mid", "mlp_in"),
    }
    pairs |= {"post_attention_layernorm": ("attn_out_raw", "attn_out")}
    pairs |= {"post_feedforward_layernorm": ("mlp_out_raw", "mlp_out")}
    sites = [f"{s}.{i}" for i in range(4) for pair in pairs.values() for s in pair] + [
        "final_in",
        "final_norm",
    ]
    got = g.capture(one, sites, interventions=[FreezeNorms(reference, qk=qk)])

    def truth(x: Tensor, ref: Tensor, weight: Tensor) -> Tensor:
        return x / (ref.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight.double())

    for i in range(4):
        for path, (before, after) in pairs.items():
            weight = g.decoder.layer(i).get_submodule(path).weight
            want = truth(got[f"{before}.{i}"], reference[f"{before}.{i}"], weight)
            assert torch.allclose(got[f"{after}.{i}"].double(), want, atol=1e-5), (i, path)
    want = truth(got["final_in"], reference["final_in"], g.decoder.final.weight)
    assert torch.allclose(got["final_norm"].double(), want, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_query_and_key_norms_and_freezing_by_the_run_itself_change_no_value(kind: Kind) -> None:
    g = gemma(kind)
    tokens = g.tokens(TEXTS[0])
    qk = kind != "gemma2"
    reference = g.capture(tokens, FreezeNorms.sites(4, qk=qk), logits=True)
    for freeze in (FreezeNorms(reference, qk=qk), FreezeNorms(qk=qk), FreezeNorms()):
        assert torch.equal(g.logits(tokens, interventions=[freeze]), reference.logits)
    if not qk:
        with pytest.raises(InputError, match="Gemma 2"):
            g.logits(tokens, interventions=[FreezeNorms(qk=True)])


def test_frozen_query_and_key_norms_use_the_references_factors() -> None:
    """With doubled queries and keys, frozen norms quadruple the scores; free ones undo the doubling."""
    sites = FreezeNorms.sites(4, qk=True)
    reference = G.capture(TOKENS, [*sites, "pattern.0"])
    double = [Scale("q.0", 2.0), Scale("k.0", 2.0)]
    free = G.capture(TOKENS, ["pattern.0"], interventions=double)["pattern.0"]
    assert torch.allclose(free, reference["pattern.0"], atol=1e-5)
    frozen = G.capture(TOKENS, ["pattern.0"], interventions=[*double, FreezeNorms(reference, qk=True)])["pattern.0"]
    row, ref = frozen[0, :, 3, :4].double().log(), reference["pattern.0"][0, :, 3, :4].double().log()
    assert torch.allclose(row - row[:, :1], 4 * (ref - ref[:, :1]), atol=1e-3)


def test_interventions_that_do_not_fit_say_so() -> None:
    def run(intervention: Intervention) -> None:
        G.capture(TOKENS, ["resid_post.3"], interventions=[intervention])

    with pytest.raises(InputError, match=r"'resid_post.1' has shape \(23,\) where \(1, 11, 24\)"):
        run(Add("resid_post.1", torch.ones(23)))
    with pytest.raises(InputError, match="has 3 positions where the batch has 11"):
        run(Replace("resid_post.1", torch.ones(1, 3, 24)))
    with pytest.raises(InputError, match="width 8"):
        run(ProjectOut("resid_post.1", torch.ones(8)))
    with pytest.raises(InputError, match=r"gave shape \(1, 11, 2\)"):
        run(Edit("resid_post.1", lambda x: x[..., :2]))
    with pytest.raises(InputError, match="position 11 is outside a text of 11 tokens"):
        run(Scale("resid_post.1", 2.0, positions=[11]))
    with pytest.raises(InputError, match="backwards"):
        run(Scale("resid_post.1", 2.0, positions=slice(4, 1, -1)))
    with pytest.raises(InputError, match="same batch"):
        run(Scale("resid_post.1", 2.0, positions=torch.ones(2, 11, dtype=torch.bool)))
    with pytest.raises(InputError, match="no heads"):
        run(Scale("resid_post.1", 2.0, heads=[0]))
    with pytest.raises(InputError, match="heads 0 to 1"):
        run(Scale("k.1", 2.0, heads=[2]))
    with pytest.raises(SiteError, match="layers 0 to 3"):
        run(Scale("resid_post.7", 2.0))
    short = G.capture(G.tokens("hello"), [*FreezeNorms.sites(4), "pattern.0"])
    with pytest.raises(InputError, match="same shape"):
        run(FreezeNorms(short))
    with pytest.raises(InputError, match="2 positions"):
        run(FreezePatterns(short))


def test_every_intervention_is_frozen() -> None:
    values = [Add("z.0", torch.ones(32)), Ablate("z.0"), Scale("z.0", 1.0), Leaf("z.0"), FreezeNorms()]
    for value in values:
        with pytest.raises(AttributeError):
            value.site = "z.1"
    assert SiteEdit in get_args(Intervention)
