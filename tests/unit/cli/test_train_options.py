"""gemscope train: every option does something or is refused, and any format is begun from rightly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gemscope.activations.sets import ActivationSet
from gemscope.artifacts import formats, native
from gemscope.artifacts.config import DictionaryConfig
from gemscope.core.sites import Site
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.single import SingleLayer
from gemscope.dictionaries.transcoder import SkipTranscoder, Transcoder
from gemscope.models.gemma import Gemma

from .conftest import QUICK, Train

ALL = tuple(word for part in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold") for word in ("--freeze", part))
READ, WRITTEN = Site("mlp_in", 0), Site("mlp_out", 0)


def weights(d_in: int, d_sae: int, d_out: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    return {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()} | {
        "threshold": torch.rand(d_sae, generator=g)
    }


def only(out: Path) -> Any:
    """What is in the one folder of a run."""
    (folder,) = (out / "dictionaries").iterdir()
    return native.load(folder)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--kind transcoder --skip --layers 0,1", "--layers and --skip do nothing for --kind transcoder"),
        ("--kind transcoder --bf16-moments", "--bf16-moments does nothing for --kind transcoder"),
        ("--offload", "--offload does nothing for --kind sae"),
        ("--target mlp_out", "--target does nothing for --kind sae"),
        ("--kind crosscoder --skip", "--skip does nothing for --kind crosscoder"),
        ("--kind crosscoder --site resid_post.0 --site mlp_in.0", "one --site in several --layers"),
        ("--latent-shards 2", "--latent-shards does nothing in a single process"),
        ("--kind crosscoder --site embed --plan", "embed is not here in any layer"),
        ("--activation topk --sparsity linear", "--sparsity does nothing for topk"),
        ("--activation relu", "use 'tanh' or 'l1'"),
        ("--tokens 5", "--tokens does nothing without --live"),
        ("--only x", "--only does nothing without --recipe"),
        ("--live microworld-pt", "ROWS does nothing beside --live"),
        ("--recipe microworld --model microworld-it --l0 5 --plan", "--l0 does nothing beside --recipe"),
        ("--set bandwidth", "FIELD=VALUE"),
        ("--set from_data=true", "FIELD=VALUE"),
        ("--set seed=3", "FIELD=VALUE"),
        ("--set bandwidth=wide", "give a number"),
        ("--set aux_k=2.5", "give a whole number or none"),
        ("--set ste_to_input=maybe", "give true or false"),
        ("--set decay_shape=wavy", "give linear or cosine or constant"),
    ],
)
def test_what_would_do_nothing_is_refused(train: Train, words: str, said: str) -> None:
    done = train(*words.split())
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr


def test_every_field_of_the_config_can_be_set(train: Train, tmp_path: Path) -> None:
    words = "--activation relu --sparsity tanh --frequency-weight 0.2 --latents 16 --l0 4 --steps 2 --site resid_post.1"
    more = "--set bandwidth=0.25 --set decay=none --set aux_k=3 --set decay_shape=cosine --set ste_to_input=true"
    done = train(*words.split(), *more.split(), *QUICK, "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    config = only(tmp_path).config.extra["training"]["config"]
    found = {name: config[name] for name in ("sparsity", "frequency_weight", "bandwidth", "decay", "aux_k")}
    assert found == {"sparsity": "tanh", "frequency_weight": 0.2, "bandwidth": 0.25, "decay": None, "aux_k": 3}
    assert (config["decay_shape"], config["ste_to_input"]) == ("cosine", True)


@pytest.mark.parametrize("format", ["gemscope", "gemma-scope-2", "saelens"])
def test_any_format_is_gone_on_from(train: Train, tmp_path: Path, format: str) -> None:
    dictionary = SAE(**weights(12, 16, 12))
    about = DictionaryConfig.of(dictionary, Site("resid_post", 1), model="google/gemma-3-270m", l0=4)
    formats.save(tmp_path / "from", dictionary, about, format=format)
    given = ("--from", tmp_path / "from", "--l0", 4, "--steps", 2, *QUICK, *ALL)
    done = train(*given, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    made = only(tmp_path / "out")
    assert str(made.config.site) == "resid_post.1"
    assert {name: t.tolist() for name, t in made.dictionary.named_parameters()} == {
        name: t.tolist() for name, t in dictionary.named_parameters()
    }


def test_several_are_finetuned_at_several_l0s_and_what_their_files_say_is_no_option(
    train: Train, tmp_path: Path
) -> None:
    for layer in (0, 2):
        dictionary = SAE(**weights(12, 16, 12, layer))
        about = DictionaryConfig.of(dictionary, Site("resid_post", layer), model="m", l0=4)
        native.save(tmp_path / "all" / str(layer), dictionary, about)
    words = ("--from", tmp_path / "all", "--steps", 2, *QUICK, "--out", tmp_path / "out")
    done = train(*words, "--l0", 2, "--l0", 5, "--seed", 3)
    assert done.exit_code == 0, done.stderr
    found = {p.name: native.load(p).config for p in (tmp_path / "out" / "dictionaries").iterdir()}
    assert set(found) == {f"sae.resid_post.{layer}.w16.l0_{l0}" for layer in (0, 2) for l0 in (2, 5)}
    assert {one.extra["training"]["config"]["seed"] for one in found.values()} == {3}
    for more in ("--latents 99", "--activation topk", "--bf16-moments", "--site resid_post.1", "--kind transcoder"):
        done = train(*words, *more.split())
        assert done.exit_code == 2
        assert f"{more.split()[0]} does nothing beside --from" in done.stderr
    assert "give it once" in train(*words, "--seed", 1, "--seed", 2).stderr


def test_a_transcoder_for_a_norm_without_its_gain_reads_it_with_the_gain(
    train: Train, tiny_folder: Path, tmp_path: Path
) -> None:
    """As those of Gemma Scope 1: begun from, it is the same function of the same stream."""
    gemma = Gemma.load(str(tiny_folder))
    norm = gemma.decoder.layer(1).pre_feedforward_layernorm
    gain = 1 + norm.weight.detach().float()  # pyright: ignore
    assert not torch.allclose(gain, torch.ones_like(gain))
    d, site, target = gemma.shape.d_model, Site("mlp_in", 1), Site("mlp_out", 1)
    bare = torch.randn(400, d, generator=torch.Generator().manual_seed(1))
    data = {site: bare * gain, target: bare.tanh()}
    doc = torch.arange(400) // 20
    rows = ActivationSet(data, doc, torch.arange(400) % 20, torch.zeros(400, dtype=torch.long), {"model": gemma.name})
    rows.save(tmp_path / "rows")
    dictionary = Transcoder(**weights(d, 24, d))
    about = DictionaryConfig.of(dictionary, site, target, model=gemma.name, l0=4, read_gain=False)
    native.save(tmp_path / "from", dictionary, about)
    words = ("--from", tmp_path / "from", "--steps", 2, *QUICK, *ALL, "--out", tmp_path / "out")
    done = train(*words, on=tmp_path / "rows")
    assert done.exit_code == 0, done.stderr
    made = only(tmp_path / "out")
    assert made.config.read_gain
    torch.testing.assert_close(made.dictionary(bare * gain), dictionary(bare), rtol=1e-4, atol=1e-4)


def save_members(folder: Path, kind: type[SingleLayer], layers: tuple[int, ...] = (0, 1, 2)) -> list[SingleLayer]:
    made: list[SingleLayer] = []
    for layer in layers:
        given = weights(12, 16, 12, layer)
        if kind is SkipTranscoder:
            given["W_skip"] = torch.eye(12)
        made.append(kind(**given))
        about = DictionaryConfig.of(made[-1], replace(READ, layer=layer), replace(WRITTEN, layer=layer), model="m")
        native.save(folder / str(layer), made[-1], about)  # pyright: ignore
    return made


@pytest.mark.parametrize("kind", [Transcoder, SkipTranscoder])
def test_a_clt_begins_from_one_transcoder_of_each_layer(train: Train, tmp_path: Path, kind: type[SingleLayer]) -> None:
    members = save_members(tmp_path / "members", kind)
    folders = [word for layer in (2, 0, 1) for word in ("--from", tmp_path / "members" / str(layer))]
    words = ("--kind", "clt", "--latents", 16, "--l0", 12, "--steps", 1, "--learning-rate", 1e-9, *QUICK)
    done = train(*words, *folders, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    clt = only(tmp_path / "out").dictionary
    for layer, one in enumerate(members):  # all sixteen are taken, so each layer has its own, but for their sizes
        alike = torch.nn.functional.cosine_similarity(clt.W_enc[layer], one.W_enc, dim=0)
        torch.testing.assert_close(alike, torch.ones(16), rtol=1e-4, atol=1e-4)
    assert (clt.W_skip is not None) == (kind is SkipTranscoder)
    wrong = train(*words, *folders[:-2], "--layers", "0,1,2", "--out", tmp_path / "no")
    assert wrong.exit_code == 2
    assert "begins from one transcoder of each" in wrong.stderr
    other = ("--site", "resid_post.0", "--layers", "0,1,2", "--out", tmp_path / "no")
    assert "cannot begin from" in train(*words, *folders, *other).stderr
