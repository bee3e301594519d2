"""The recipes against what was released: every count, every target, every width."""

import runpy
from collections import Counter
from pathlib import Path

import pytest

from gemscope.core.errors import InputError
from gemscope.training.recipe import Entry, load, passes, select

ROOT = Path(__file__).parents[3]
SINGLE = {"270m": 556, "1b": 728, "4b": 876, "12b": 1156, "27b": 1436}
"""Single-layer dictionaries per model; the registries list fewer where uploads had holes."""


@pytest.mark.parametrize("size", SINGLE)
@pytest.mark.parametrize("kind", ["pt", "it"])
def test_the_released_matrix(size: str, kind: str) -> None:
    entries = load("gemma_scope_2", f"google/gemma-3-{size}-{kind}")
    folders = Counter(entry.name.split("/")[0] for entry in entries)
    several = folders.pop("clt", 0), folders.pop("crosscoder")
    assert sum(folders.values()) == SINGLE[size]
    assert several == (9 if size in ("270m", "1b") else 0, 9)
    assert len({entry.name for entry in entries}) == len(entries)
    assert all((entry.start is not None) == (kind == "it") for entry in entries)
    assert len(passes(entries)) == 3


def by_name(model: str) -> dict[str, Entry]:
    return {entry.name: entry for entry in load("gemma_scope_2", model)}


def test_targets_widths_and_names_of_known_artefacts() -> None:
    small = by_name("gemma-3-270m-pt")
    assert small["clt/width_262k_l0_big_affine"].config.d_sae == 14_560
    assert small["clt/width_524k_l0_medium"].config.d_sae == 29_120
    assert small["clt/width_262k_l0_big"].config.target_l0 == 150
    assert small["crosscoder/layer_5_9_12_15_width_1m_l0_big"].config.d_sae * 4 == 1 << 20
    four = by_name("gemma-3-4b-it")
    first = four["transcoder_all/layer_0_width_262k_l0_small_affine"].config
    assert (first.kind, first.target_l0, str(first.site), str(first.target_site)) == (
        "skip_transcoder",
        10,
        "mlp_in.0",
        "mlp_out.0",
    )
    assert four["resid_post_all/layer_33_width_16k_l0_big"].config.target_l0 == 120
    assert four["resid_post/layer_9_width_65k_l0_big"].config.target_l0 == 131  # 60 + 90 * 9 / (34 / 3)
    assert four["attn_out/layer_17_width_16k_l0_medium"].config.site.name == "z"
    assert four["resid_post/layer_17_width_262k_l0_medium_seed_1"].config.seed == 1
    assert by_name("gemma-3-1b-pt")["clt/width_524k_l0_big"].config.d_sae == 20_160


def test_selection_by_pattern() -> None:
    entries = load("gemma_scope_2", "gemma-3-1b-pt")
    assert len(select(entries, ["resid_post/*_16k_*"])) == 12
    with pytest.raises(InputError, match="no entry matches"):
        select(entries, ["nothing*"])
    with pytest.raises(InputError, match="no Gemma Scope 2"):
        load("gemma_scope_2", "gemma-2-2b")
    with pytest.raises(InputError, match="microworld"):
        load("nothing", "m")


def test_the_microworld_recipe_is_what_quickstart_runs() -> None:
    from gemscope.models.gemma import Gemma
    from gemscope.suites.config import QuickstartConfig
    from gemscope.suites.others import others

    recipe = runpy.run_path(str(ROOT / "recipes" / "microworld.py"))
    config = QuickstartConfig()
    gemma, entries = Gemma.load("microworld-it"), recipe["entries"]("microworld-it")
    assert [e.config for e in entries[:6]] == [config.train_config(s) for s in gemma.every_layer("resid_post")]
    assert [e.config for e in entries[6:]] == list(others(gemma.shape.n_layers, config).configs)
    assert all(gemma.width(e.config.site) == e.width for e in entries)
