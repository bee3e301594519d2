import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemscope.core.errors import SiteError
from gemscope.core.sites import SITE_KINDS, Site

SITES = st.builds(
    lambda name, layer: Site(name, layer if SITE_KINDS[name].per_layer else None),
    st.sampled_from(sorted(SITE_KINDS)),
    st.integers(0, 200),
)


@given(SITES)
def test_parse_reads_what_str_prints(site: Site):
    assert Site.parse(str(site)) == site


@given(SITES)
def test_parse_reads_the_transformerlens_name(site: Site):
    assert Site.parse(site.tl_name) == site


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("model.layers.3", "resid_post.3"),
        ("model.language_model.layers.2.post_feedforward_layernorm", "mlp_out.2"),
        ("language_model.model.layers.4.self_attn.q_proj", "q.4"),
        ("model.layers.0.self_attn.o_proj", "attn_out_raw.0"),
        ("model.layers.7.pre_feedforward_layernorm", "mlp_in.7"),
        ("model.embed_tokens", "embed"),
        ("model.norm", "final_norm"),
        ("blocks.5.attn.hook_pattern", "pattern.5"),
        ("blocks.5.hook_attn_out", "attn_out.5"),
        (" resid_pre.0 ", "resid_pre.0"),
    ],
)
def test_other_spellings_are_read(text: str, site: str):
    assert str(Site.parse(text)) == site


@pytest.mark.parametrize(
    "text", ["", "resid", "resid_post", "resid_post.x", "resid_post.-1", "embed.3", "blocks.3.hook_embed", "z.1.2"]
)
def test_anything_else_is_refused_in_one_sentence(text: str):
    with pytest.raises(SiteError) as error:
        Site.parse(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) > 20


def test_sites_sort_in_the_order_of_the_forward_pass():
    names = ["final_norm", "resid_post.0", "resid_pre.1", "embed", "z.0", "mlp_in.0", "resid_pre.0"]
    ordered = sorted(map(Site.parse, names), key=lambda s: s.order)
    assert [str(s) for s in ordered] == [
        "embed",
        "resid_pre.0",
        "z.0",
        "mlp_in.0",
        "resid_post.0",
        "resid_pre.1",
        "final_norm",
    ]


@pytest.mark.parametrize(("name", "layer"), [("resid_post", None), ("embed", 1), ("nowhere", 0), ("z", -1)])
def test_a_site_that_cannot_be_is_refused(name: str, layer: int | None):
    with pytest.raises(SiteError):
        Site(name, layer)
