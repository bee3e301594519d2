"""gemscope train --recipe: pass by pass, each entry from its own start, and what a recipe gets wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gemscope.artifacts import native
from gemscope.cli import train_view
from gemscope.core.errors import InputError
from gemscope.training.origins import find
from gemscope.training.recipe import Entry, Finished, load, passes

from .conftest import Train

HEAD = """
from gemscope.core.sites import Site
from gemscope.training.config import TrainConfig
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.recipe import Entry

FROZEN = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")

def sae(layer, seed=0, frozen=(), steps=3, **start):
    config = TrainConfig(Site("resid_post", layer), 16, 4.0, steps=steps, batch_size=64, seed=seed, frozen=frozen)
    return Entry(f"resid_post/layer_{layer}_seed_{seed}", config, 64 * steps, width=12, width_out=12, **start)

def transcoder(layer):
    site, target = Site("mlp_in", layer), Site("mlp_out", layer)
    config = TrainConfig(site, 16, 4.0, kind="transcoder", target_site=target, steps=3, batch_size=64)
    return Entry(f"transcoder/layer_{layer}", config, 192)
"""


def recipe(folder: Path, body: str) -> Path:
    path = folder / "recipe.py"
    path.write_text(f"{HEAD}\ndef entries(model):\n    {body}\n")
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t.detach() for name, t in native.load(folder).dictionary.named_parameters()}


def changed(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("dictionary.json")}


def test_entries_of_different_lengths_take_a_pass_each_and_a_finished_one_is_not_done_again(
    train: Train, tmp_path: Path
) -> None:
    path, out = recipe(tmp_path, "return [sae(0, steps=2), sae(1, steps=4), sae(2, steps=2)]"), tmp_path / "out"
    words = ("--recipe", path, "--model", "m", "--held-out", "0.2", "--out", out)
    done = train(*words)
    assert done.exit_code == 0, done.stderr
    found = {p.parent.relative_to(out).as_posix() for p in out.rglob("dictionary.json")}
    first = {f"pass_1/dictionaries/sae.resid_post.{layer}.w16.l0_4" for layer in (0, 2)}
    assert found == first | {"pass_2/dictionaries/sae.resid_post.1.w16.l0_4"}
    steps = {p.parent.name: native.load(p.parent).config.extra["step"] for p in out.rglob("dictionary.json")}
    assert steps == {f"sae.resid_post.{layer}.w16.l0_4": 4 if layer == 1 else 2 for layer in range(3)}
    before = changed(out)
    again = train(*words)
    assert again.exit_code == 0
    assert again.stdout.count("finished before") == 2
    assert changed(out) == before
    (out / "entries.json").unlink()
    assert train(*words).exit_code == 0
    assert changed(out) != before


def test_what_is_said_beside_a_recipe_changes_every_entry(train: Train, tmp_path: Path) -> None:
    path, out = recipe(tmp_path, "return [sae(0, steps=2), sae(1, steps=4)]"), tmp_path / "out"
    words = ("--steps", 3, "--batch-size", 32, "--learning-rate", 0.5, "--freeze", "b_dec", "--set", "warmup=0.5")
    done = train("--recipe", path, "--model", "m", *words, "--held-out", "0.2", "--out", out)
    assert done.exit_code == 0, done.stderr
    configs = [native.load(p.parent).config.extra["training"]["config"] for p in out.rglob("dictionary.json")]
    assert len(configs) == 2
    for config in configs:
        found = [config[name] for name in ("steps", "batch_size", "learning_rate", "frozen", "warmup")]
        assert found == [3, 32, 0.5, ["b_dec"], 0.5]


def test_every_entry_of_a_tuned_model_begins_from_its_own(train: Train, tmp_path: Path) -> None:
    """All weights frozen, so what comes out is what was begun from."""
    body = (
        'return [sae(l, s, FROZEN, start=f"resid_post/layer_{l}_seed_{s}:toy-pt") for l, s in ((1, 1), (0, 0))]'
        ' if model == "toy-it" else [sae(0), sae(1, steps=2), sae(1, 1)]'
    )
    path, first, second = recipe(tmp_path, body), tmp_path / "pt", tmp_path / "it"
    shared = ("--recipe", path, "--held-out", "0.2")
    assert train(*shared, "--model", "toy-pt", "--out", first).exit_code == 0
    missing = train(*shared, "--model", "toy-it", "--out", second)
    assert (missing.exit_code, missing.stderr.count("\n")) == (2, 1)
    assert "begins from resid_post/layer_1_seed_1 of toy-pt" in missing.stderr
    assert "--from" in missing.stderr
    assert not second.exists()
    done = train(*shared, "--model", "toy-it", "--from", tmp_path, "--from", first, "--out", second)
    assert done.exit_code == 0, done.stderr
    for name in ("resid_post/layer_1_seed_1", "resid_post/layer_0_seed_0"):
        before, after = (Finished(folder).dictionary(name) for folder in (first, second))
        assert before is not None
        assert after is not None
        assert before != after
        for part, tensor in weights(after).items():
            torch.testing.assert_close(tensor, weights(before)[part], rtol=0, atol=0)


def test_a_clt_of_a_recipe_begins_from_its_transcoders(train: Train, tmp_path: Path) -> None:
    body = (
        'return [Entry("clt", MultiLayerConfig(Site("mlp_in", 0), 16, 12.0, kind="clt", layers=(0, 1, 2), steps=3,'
        ' target_site=Site("mlp_out", 0), batch_size=64, learning_rate=1e-9), 192,'
        ' start=("transcoder/layer_0", "transcoder/layer_1", "transcoder/layer_2")),'
        " *(transcoder(layer) for layer in range(3))]"
    )
    out = tmp_path / "out"
    done = train("--recipe", recipe(tmp_path, body), "--model", "m", "--held-out", "0.2", "--out", out)
    assert done.exit_code == 0, done.stderr
    clt = weights(out / "pass_2" / "dictionaries" / "clt.mlp_in.all.w16.l0_12")
    for layer in range(3):
        one = weights(out / "pass_1" / "dictionaries" / f"transcoder.mlp_in.{layer}.w16.l0_4")
        alike = torch.nn.functional.cosine_similarity(clt[f"W_enc.{layer}"], one["W_enc"], dim=0)
        torch.testing.assert_close(alike, torch.ones(16), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def entries(model):\n    return 1 / 0\n", "line 2 of {path} raised ZeroDivisionError (division by zero)"),
        ("\nimport nothing_of_this_name\n", "line 2 of {path} raised ModuleNotFoundError"),
        ("x = 1\ndef (\n", "line 2 of {path} raised SyntaxError"),
        ("def entries(model):\n    return []\n", "gave no list of Entry; it has to give one or more"),
        ("entries = 3\n", "has no function entries(model)"),
    ],
)
@pytest.mark.parametrize("more", [("--list",), ("--only", "x")])
def test_what_a_recipe_gets_wrong_is_one_sentence(
    train: Train, tmp_path: Path, text: str, said: str, more: tuple[str, ...]
) -> None:
    path = tmp_path / "recipe.py"
    path.write_text(text)
    done = train("--recipe", path, "--model", "m", *more)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said.format(path=path) in done.stderr


def test_passes_follow_what_entries_begin_from(tmp_path: Path) -> None:
    def named(*given: tuple[str, Any]) -> list[Entry]:
        (one,) = load(str(recipe(tmp_path, "return [sae(0)]")), "m")
        return [Entry(name, one.config, 1, start) for name, start in given]

    found = passes(named(("c", ("a", "b")), ("b", "a"), ("a", None), ("d", "c:other")))
    assert [[entry.name for entry in group] for group in found] == [["a", "d"], ["b"], ["c"]]
    with pytest.raises(InputError, match="begins from itself"):
        passes(named(("a", "b"), ("b", "a")))


def test_the_list_counts_dictionaries_and_checkpoints(train: Train) -> None:
    """One SAE of 16,384 latents of a width of 2,560, in fp32."""
    only = ("--only", "resid_post/layer_9_width_16k_l0_big")
    done = train("--recipe", "gemma_scope_2", "--model", "gemma-3-4b-pt", *only, "--list", on=None)
    weights = 4 * (2 * 16_384 * 2560 + 2 * 16_384 + 2560)
    assert f"dictionaries {weights / 1e6:.0f} MB, checkpoints to go on from" in done.stdout


def test_what_the_tuned_models_of_gemma_scope_2_begin_from_is_found_as_it_is_fetched(tmp_path: Path) -> None:
    entry = next(e for e in load("gemma_scope_2", "gemma-3-4b-it") if e.name == "resid_post/layer_9_width_16k_l0_big")
    (start,) = entry.starts
    with pytest.raises(InputError, match=r"gemscope fetch gemma-scope-2-4b-pt/resid_post/layer_9_width_16k_l0_big"):
        find(start, [tmp_path])
    folder = tmp_path / "google" / "gemma-scope-2-4b-pt" / entry.name
    folder.mkdir(parents=True)
    for given in (tmp_path, tmp_path / "google" / "gemma-scope-2-4b-pt"):
        assert find(start, [tmp_path / "elsewhere", given]) == folder


def test_a_recipe_is_planned_without_rows_pass_by_pass(train: Train, tmp_path: Path) -> None:
    path = recipe(tmp_path, "return [sae(0, steps=2), sae(1, steps=4), sae(2, steps=2)]")
    done = train("--recipe", path, "--model", "m", "--plan", "--out", tmp_path / "out", on=None)
    assert done.exit_code == 0, done.stderr
    plans = done.stdout.split("checkpoint")
    assert len(plans) == 3
    assert [plan.count("sae.resid_post") for plan in plans] == [2, 1, 0]
    assert "128 tokens, 6.14 kB" in plans[1]  # 2 steps of 64 rows of 2 sites, 12 wide, in bf16


def test_what_will_not_fit_is_said_before_it_begins(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, "return [sae(0)]")
    words = ("--recipe", path, "--model", "m", "--held-out", "0.2", "--out")
    assert "will take" not in train(*words, tmp_path / "one").stderr
    monkeypatch.setattr(train_view, "_memory", lambda: ("here", 1000))
    assert "will take" in train(*words, tmp_path / "two").stderr.splitlines()[0]


def test_what_is_finished_on_other_rows_is_not_finished_on_these(train: Train, rows: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, "return [sae(0)]")
    words = ("--recipe", path, "--model", "m", "--out", tmp_path / "out", "--held-out")
    assert train(*words, "0.2").exit_code == 0
    assert "finished before" in train(*words, "0.2").stdout
    other = train(*words, "0.3")
    assert other.exit_code == 2
    assert "rows" in other.stderr
