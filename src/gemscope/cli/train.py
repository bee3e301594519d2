"""gemscope train: dictionaries from harvested rows, one or a whole sweep, from scratch or from an artefact."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gemscope.artifacts.config import Loaded
    from gemscope.training.config import TrainConfig
    from gemscope.training.recipe import Entry

Rows = Annotated[Path | None, typer.Argument(help="Folder of harvested rows.", show_default=False)]


def train(
    rows: Rows = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same one again goes on.")] = Path(
        "trained"
    ),
    kind: Annotated[str, typer.Option(help="sae, transcoder, skip_transcoder, crosscoder or clt.")] = "sae",
    site: Annotated[list[str] | None, typer.Option(help="What is read; may be repeated.", show_default=False)] = None,
    target: Annotated[str | None, typer.Option(help="What a transcoder or clt writes; mlp_out if not given.")] = None,
    layers: Annotated[str | None, typer.Option(help="Of a crosscoder or clt: 0,1,2 or all.")] = None,
    latents: Annotated[list[int] | None, typer.Option(help="Latents (per layer); may be repeated.", min=1)] = None,
    l0: Annotated[list[float] | None, typer.Option(help="Active latents per token; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of the first weights; may be repeated.", min=0)] = None,
    activation: Annotated[str, typer.Option(help="jumprelu, topk, batchtopk or relu.")] = "jumprelu",
    prefixes: Annotated[str | None, typer.Option(help="Matryoshka: 256,1024.", show_default=False)] = None,
    skip: Annotated[bool, typer.Option("--skip", help="A clt with a linear path within each layer.")] = False,
    tied: Annotated[bool, typer.Option("--tied", help="A clt or crosscoder with one decoder per layer.")] = False,
    steps: Annotated[int | None, typer.Option(help="Updates.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Tokens per update.", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's.")] = None,
    artefact: Annotated[
        Path | None, typer.Option("--from", help="A dictionary to finetune, of any format known.", show_default=False)
    ] = None,
    freeze: Annotated[list[str] | None, typer.Option(help="Weights left alone, such as W_dec.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe's name or file.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Of a recipe.", show_default=False)] = None,
    only: Annotated[list[str] | None, typer.Option(help="Entries of a recipe, as patterns.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Show what a recipe holds, and what it takes.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what it will take and whether it fits.")] = False,
    bf16_moments: Annotated[bool, typer.Option("--bf16-moments", help="Halve the optimiser's memory.")] = False,
    offload: Annotated[bool, typer.Option("--offload", help="Keep decoders in the host's memory.")] = False,
    latent_shards: Annotated[
        int | None, typer.Option(help="Under torchrun: processes that share a dictionary.", min=1)
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of the documents to measure on.")] = 0.05,
    checkpoint_every: Annotated[int, typer.Option(help="Updates between checkpoints.", min=1)] = 1000,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log there too.")] = False,
    wandb: Annotated[str | None, typer.Option(help="Project at Weights & Biases.", show_default=False)] = None,
) -> None:
    """Train dictionaries on harvested rows; several sites, latents, l0s or seeds are a sweep over one pass.

    Ctrl-C saves: the same command again goes on where it was.
    """
    if show:
        return _show_recipe(recipe, model, only or ())
    rows = _given_rows(rows)
    given = _given(steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    loaded = None if artefact is None else _loaded(artefact)
    if recipe is not None:
        configs = [entry.config for entry in _entries(recipe, model, only or ())]
    elif loaded is not None:
        configs = [_finetuning(loaded, l0, tuple(freeze or ()), given)]
    else:
        options = {"kind": kind, "target": target, "layers": layers, "activation": activation, "prefixes": prefixes}
        flags = {"skip": skip, "tied": tied, "offload": offload, "moments": "bfloat16" if bf16_moments else "float32"}
        axes: dict[str, Sequence[Any]] = {"d_sae": latents or [1024], "target_l0": l0 or [32.0], "seed": seed or [0]}
        configs = _sweep(rows, site or [], options, flags, axes, {**given, "frozen": tuple(freeze or ())})
    if plan:
        return _show_plan(rows, configs)
    logs = {"tensorboard": tensorboard, "wandb": wandb, "every": checkpoint_every}
    return _run(rows, out, configs, loaded, held_out, latent_shards, logs)


def _given_rows(rows: Path | None) -> Path:
    from gemscope.core.errors import InputError

    if rows is None:
        raise InputError("no rows were given; harvest some first with gemscope harvest, or gemscope quickstart.")
    return rows


def _given(**options: Any) -> dict[str, Any]:
    """Those that the user set."""
    return {name: value for name, value in options.items() if value is not None}


def _sweep(
    rows: Path,
    sites: Sequence[str],
    options: dict[str, Any],
    flags: dict[str, Any],
    axes: dict[str, Sequence[Any]],
    given: dict[str, Any],
) -> "list[TrainConfig]":
    """Every combination of sites and axes."""
    from itertools import product

    from gemscope.activations.sets import read_manifest
    from gemscope.core.errors import InputError
    from gemscope.core.sites import Site
    from gemscope.training.config import MULTI_LAYER, TrainConfig
    from gemscope.training.multilayer import MultiLayerConfig

    kind = options["kind"]
    known = [Site.parse(name) for name in read_manifest(rows)["sites"]]
    several = kind in MULTI_LAYER
    writes_other = kind in ("transcoder", "skip_transcoder", "clt")
    wanted = [Site.parse(s) for s in sites] or ([s for s in known if s.name == "mlp_in"] if writes_other else known)
    if not wanted:
        raise InputError(f"nothing here is read by a {kind}; harvest mlp_in and mlp_out, or name a --site.")
    chosen: tuple[int, ...] = ()
    if several:
        every = tuple(sorted(s.layer or 0 for s in known if s.name == wanted[0].name))
        text = options["layers"]
        chosen = every if text in (None, "all") else _numbers(text, "--layers")
        wanted = [Site(wanted[0].name, chosen[0])]
    prefixes = _numbers(options["prefixes"], "--prefixes") if options["prefixes"] else ()
    about = {"kind": kind, "activation": options["activation"], "prefixes": prefixes, "layers": chosen}
    special = several or flags["tied"] or flags["offload"]
    make: Any = MultiLayerConfig if special else TrainConfig
    found: list[TrainConfig] = []
    for where, *values in product(wanted, *axes.values()):
        named = dict(zip(axes, values, strict=True))
        target = Site(options["target"] or "mlp_out", where.layer) if writes_other else None
        found.append(make(site=where, target_site=target, **about, **named, **given, **(flags if special else {})))
    return found


def _numbers(text: str, option: str) -> tuple[int, ...]:
    from gemscope.core.errors import InputError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} is {text!r}; write whole numbers between commas, such as 0,1,2.") from None


def _loaded(artefact: Path) -> "Loaded":
    from gemscope.artifacts import native

    return native.load(artefact)


def _finetuning(
    loaded: "Loaded", l0: Sequence[float] | None, frozen: tuple[str, ...], given: dict[str, Any]
) -> "TrainConfig":
    from gemscope.training.finetune import finetune_config

    has_skip = getattr(loaded.dictionary, "W_skip", None) is not None
    return finetune_config(loaded.config, skip=has_skip, l0=l0[0] if l0 else None, frozen=frozen, **given)


def _entries(recipe: str | None, model: str | None, only: Sequence[str]) -> "list[Entry]":
    from gemscope.core.errors import InputError
    from gemscope.training.recipe import load, select

    if recipe is None or model is None:
        raise InputError("name a recipe and a model, as in --recipe gemma_scope_2 --model gemma-3-4b-pt.")
    return select(load(recipe, model), only)


def _show_recipe(recipe: str | None, model: str | None, only: Sequence[str]) -> None:
    from gemscope.cli.terminal import out
    from gemscope.cli.train_view import recipe_table

    out().print(recipe_table(_entries(recipe, model, only)))


def _show_plan(rows: Path, configs: "Sequence[TrainConfig]") -> None:
    from gemscope.activations.sets import read_manifest
    from gemscope.cli.terminal import out
    from gemscope.cli.train_view import plan_table
    from gemscope.core.sites import Site

    widths = {Site.parse(name): width for name, width in read_manifest(rows)["sites"].items()}
    out().print(plan_table(configs, widths))


def _run(
    rows: Path,
    out: Path,
    configs: "Sequence[TrainConfig]",
    loaded: "Loaded | None",
    held_out: float,
    latent_shards: int | None,
    logs: dict[str, Any],
) -> None:
    import torch

    from gemscope.activations.sets import ActivationSet
    from gemscope.cli.terminal import out as console
    from gemscope.cli.train_view import LiveTable, trained_table
    from gemscope.training.run import RunOptions, run
    from gemscope.training.sharding import start, stop
    from gemscope.training.tensorboard import TensorBoard
    from gemscope.training.wandb import WeightsAndBiases

    data = ActivationSet.load(rows)
    training, heldout = data.split(held_out)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    mesh = start(latent_shards, device.type)
    sinks: list[Any] = []
    if mesh.is_first and logs["tensorboard"]:
        sinks.append(TensorBoard(out / "tensorboard"))
    if mesh.is_first and logs["wandb"]:
        about = {"configs": [c.as_dict() for c in configs]}
        sinks.append(WeightsAndBiases(logs["wandb"], out / "wandb", about, out.name))
    about = data.about
    options = RunOptions(
        out, str(about.get("model", "unknown")), about.get("revision"), logs["every"], logs=tuple(sinks), title=out.name
    )
    begin = {0: loaded.dictionary} if loaded is not None else None
    with LiveTable(configs, quiet=not mesh.is_first) as live:
        done = run(training, heldout, configs, options, start=begin, progress=live, device=device, mesh=mesh)
    if mesh.is_first:
        console().print(trained_table(done, out), soft_wrap=True)
    stop()
