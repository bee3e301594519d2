"""Every site of every class against the decoder written out by hand: equal to the last bit in float32."""

import pytest
import torch

from gemscope.core.errors import InputError, SiteError
from gemscope.core.sites import SITE_KINDS, Site
from unit.models.oracle_gemma import decode
from unit.models.tiny_gemma import KINDS, TEXTS, Kind, gemma


def _all_sites(n_layers: int) -> list[Site]:
    layers = [(name, kind.per_layer) for name, kind in SITE_KINDS.items()]
    return [Site(name, i) for name, per in layers if per for i in range(n_layers)] + [
        Site(name) for name, per in layers if not per
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("watch", [True, False])
def test_every_site_equals_the_block_written_by_hand(kind: Kind, watch: bool) -> None:
    g = gemma(kind)
    tokens = g.tokens(TEXTS[0])
    assert len(tokens) > g.shape.sliding_window
    sites = [s for s in _all_sites(g.shape.n_layers) if watch or s.name != "pattern"]
    truth = decode(g, tokens.ids[None], frozenset(range(g.shape.n_layers)) if watch else frozenset())
    capture = g.capture(tokens, sites, logits=True)
    assert set(capture.acts) == set(sites)
    for site in sites:
        assert torch.equal(capture[site], truth[str(site)]), site
    assert torch.equal(capture.logits, truth["logits"])
    with torch.no_grad():
        assert torch.equal(g.model(input_ids=tokens.ids[None], use_cache=False).logits, capture.logits) != watch or (
            kind == "gemma2"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_watching_one_layer_leaves_the_others_on_their_own_path(kind: Kind) -> None:
    g = gemma(kind)
    tokens = g.tokens(TEXTS[0])
    truth = decode(g, tokens.ids[None], frozenset({1}))
    capture = g.capture(tokens, ["pattern.1", *g.every_layer("z")])
    assert all(torch.equal(capture[s], truth[str(s)]) for s in capture.acts)


@pytest.mark.parametrize("kind", KINDS)
def test_widths_are_those_of_the_tensors(kind: Kind) -> None:
    g = gemma(kind)
    assert g.shape.d_z != g.shape.d_model
    sites = [s for s in _all_sites(1) if s.name != "pattern"]
    capture = g.capture(g.tokens("hello world"), sites)
    assert {s: g.width(s) for s in sites} == {s: capture[s].shape[-1] for s in sites}
    assert (g.shape.n_heads, g.shape.n_kv_heads, g.shape.head_dim, g.shape.d_mlp) == (4, 2, 8, 40)
    with pytest.raises(SiteError, match="head, query, key"):
        g.width("pattern.0")


def test_shape_describes_each_layers_attention() -> None:
    shape = gemma("gemma3").shape
    local, every = shape.attention(0), shape.attention(2)
    assert (local.kind, local.window, local.kv_group) == ("local", 5, (0, 0, 1, 1))
    assert (every.kind, every.window) == ("global", None)
    assert gemma("gemma2").shape.layer_kinds == ("local", "global", "local", "global")
    with pytest.raises(SiteError, match="layers 0 to 3"):
        shape.attention(4)


def test_aliases_name_the_same_tensor() -> None:
    g = gemma()
    names = ["resid_post.2", "blocks.2.hook_resid_post", "model.layers.2"]
    captures = [g.capture(g.tokens("hello world"), [name]) for name in names]
    assert all(torch.equal(captures[0]["resid_post.2"], c["blocks.2.hook_resid_post"]) for c in captures)
    assert len(g.capture(g.tokens("hello"), names).acts) == 1


def test_unknown_sites_and_layers_say_what_exists() -> None:
    g = gemma()
    tokens = g.tokens("hello")
    with pytest.raises(SiteError, match="layers 0 to 3"):
        g.capture(tokens, ["resid_post.4"])
    with pytest.raises(SiteError, match="resid_pre"):
        g.capture(tokens, ["residual.1"])
    with pytest.raises(SiteError, match="not captured"):
        g.capture(tokens, ["z.1"])["z.2"]
    with pytest.raises(InputError, match="at least one site"):
        g.capture(tokens, [])
    with pytest.raises(SiteError):
        g.every_layer("nonsense")


def test_capture_gives_the_models_own_tensors_without_copies_and_nothing_writes_into_them() -> None:
    g = gemma()
    sites = [*g.every_layer("resid_post"), *g.every_layer("resid_pre")]
    capture = g.capture(g.tokens(TEXTS[0]), sites, logits=True)
    assert capture["resid_pre.1"].data_ptr() == capture["resid_post.0"].data_ptr()
    assert not capture["resid_post.0"].requires_grad
    before = {site: value.clone() for site, value in capture.acts.items()}
    g.generate(g.tokens(TEXTS[1]), max_new_tokens=3)
    assert all(torch.equal(capture[site], before[site]) for site in sites)
