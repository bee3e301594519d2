"""gemscope train: sweeps, going on, finetuning, plans and recipes, from the command line."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from gemscope.artifacts import native

Command = Callable[..., subprocess.CompletedProcess[str]]
QUICK = ("--steps", "6", "--batch-size", "64", "--held-out", "0.2")


def test_a_sweep_and_going_on(gemscope: Command, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    words = (
        "train",
        str(rows),
        "--site",
        "resid_post.1",
        "--latents",
        "16",
        "--l0",
        "2",
        "--l0",
        "4",
        "--out",
        str(out),
    )
    done = gemscope(*words, *QUICK, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "held-out tokens" in done.stdout
    assert {p.name for p in (out / "dictionaries").iterdir()} == {
        "sae.resid_post.1.w16.l0_2",
        "sae.resid_post.1.w16.l0_4",
    }
    loaded = native.load(out / "dictionaries" / "sae.resid_post.1.w16.l0_4")
    assert (loaded.config.model, loaded.config.l0, loaded.config.extra["step"]) == ("toy", 4.0, 6)
    assert "l0" in loaded.config.extra["evaluation"]
    assert len(json.loads((out / "report.json").read_text())["points"]) == 2
    again = gemscope(*words, *QUICK, "--learning-rate", "0.1", timeout=600)
    assert again.returncode == 2
    assert "another configuration" in again.stderr


def test_a_clt_and_finetuning_it(gemscope: Command, rows: Path, tmp_path: Path) -> None:
    out, tuned = tmp_path / "clt", tmp_path / "tuned"
    many = ("--kind", "clt", "--latents", "16", "--l0", "6", "--skip", "--out", str(out))
    assert gemscope("train", str(rows), *many, *QUICK, timeout=600).returncode == 0
    (folder,) = (out / "dictionaries").iterdir()
    loaded = native.load(folder)
    assert (loaded.config.kind, len(loaded.config.reads)) == ("clt", 3)
    done = gemscope(
        "train", str(rows), "--from", str(folder), "--freeze", "W_dec", "--out", str(tuned), *QUICK, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_from_a_store_of_a_model(gemscope: Command, tiny_folder: Path, tmp_path: Path) -> None:
    """The whole way of a user: harvest, train on the store, the loss measured."""
    text, store, out = tmp_path / "text.txt", tmp_path / "store", tmp_path / "out"
    text.write_text("Paris is the capital of France. " * 3 + "\nThe cat sat on the mat.\n" * 40)
    model = ("--model", str(tiny_folder))
    sites = ("--site", "mlp_in.1", "--site", "mlp_out.1")
    done = gemscope("harvest", str(text), "--lines", *model, *sites, "--out", str(store), timeout=600)
    assert done.returncode == 0, done.stderr
    words = ("--kind", "transcoder", "--latents", "16", "--l0", "4", "--loss-text", str(text), "--out", str(out))
    done = gemscope("train", str(store), *words, *QUICK, timeout=600)
    assert done.returncode == 0, done.stderr
    (point,) = json.loads((out / "report.json").read_text())["points"]
    assert point["delta_loss"] is not None
    (folder,) = (out / "dictionaries").iterdir()
    assert native.load(folder).config.model == str(tiny_folder)


def test_plans_recipes_and_mistakes(gemscope: Command, rows: Path) -> None:
    plan = gemscope("train", str(rows), "--kind", "clt", "--latents", "64", "--plan", timeout=600)
    assert plan.returncode == 0
    assert "it fits" in plan.stdout
    shown = gemscope("train", "--recipe", "gemma_scope_2", "--model", "gemma-3-270m-it", "--list", timeout=600)
    assert "574 dictionaries" in shown.stdout
    for words, said in (
        (("train",), "no rows were given"),
        (("train", str(rows), "--kind", "clt", "--layers", "a,b"), "whole numbers"),
        (("train", "--recipe", "nothing", "--model", "m", "--list"), "no recipe"),
    ):
        done = gemscope(*words, timeout=600)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
