"""gemscope train: dictionaries from harvested rows, one or a whole sweep, from scratch or from an artefact."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.cli.end_to_end import for_end_to_end

if TYPE_CHECKING:
    from gemscope.artifacts.config import Loaded
    from gemscope.cli.rows import Rows
    from gemscope.core.sites import Site
    from gemscope.training.config import TrainConfig
    from gemscope.training.recipe import Entry
    from gemscope.training.trainer import Evaluate

_LOSS_TOKENS, _LOSS_DOCUMENTS = 12_000, 64

Given = Annotated[str | None, typer.Argument(help="A store: folder or URL.", show_default=False)]

_Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same one again goes on.")]
_From = Annotated[
    Path | None, typer.Option("--from", help="A dictionary to finetune, of any format known.", show_default=False)
]
_Shards = Annotated[int | None, typer.Option(help="Under torchrun: processes that share a dictionary.", min=1)]
_Live = Annotated[str | None, typer.Option(help="Instead of rows: a model, run while training.", show_default=False)]
_Text = Annotated[
    list[str] | None, typer.Option(help="Of --live: files, as for harvest.", show_default="the microworld's")
]
_EndToEnd = Annotated[
    float | None, typer.Option(help="With --live: weight of the KL of the spliced model.", show_default=False)
]
_LossText = Annotated[
    list[str] | None, typer.Option(help="Measure Δ loss on these files, or on 'microworld'.", show_default=False)
]


def train(
    rows: Given = None,
    out: _Out = Path("trained"),
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
    artefact: _From = None,
    freeze: Annotated[list[str] | None, typer.Option(help="Weights left alone, such as W_dec.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe's name or file.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Of a recipe.", show_default=False)] = None,
    only: Annotated[list[str] | None, typer.Option(help="Entries of a recipe, as patterns.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Show what a recipe holds, and what it takes.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what it will take and whether it fits.")] = False,
    bf16_moments: Annotated[bool, typer.Option("--bf16-moments", help="Halve the optimiser's memory.")] = False,
    offload: Annotated[bool, typer.Option("--offload", help="Keep decoders in the host's memory.")] = False,
    latent_shards: _Shards = None,
    held_out: Annotated[float, typer.Option(help="Share of the documents to measure on.")] = 0.05,
    live: _Live = None,
    text: _Text = None,
    tokens: Annotated[int, typer.Option(help="Of --live: tokens before they come again.", min=1)] = 1_000_000,
    end_to_end: _EndToEnd = None,
    loss_text: _LossText = None,
    checkpoint_every: Annotated[int, typer.Option(help="Updates between checkpoints.", min=1)] = 1000,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log there too.")] = False,
    wandb: Annotated[str | None, typer.Option(help="Project at Weights & Biases.", show_default=False)] = None,
) -> None:
    """Train dictionaries on harvested rows; several sites, latents, l0s or seeds are a sweep over one pass.

    Ctrl-C saves: the same command again goes on where it was.
    """
    _go(SimpleNamespace(**locals()))


def _go(o: SimpleNamespace) -> None:
    """Do it; ``o`` has all options by their names."""
    if o.show:
        _show_recipe(o.recipe, o.model, o.only or ())
        return
    live: str | None = o.live
    rows = None if live is not None else _given_rows(o.rows)
    loaded = None if o.artefact is None else _loaded(o.artefact)
    configs = _configs(o, rows, loaded)
    if rows is None:
        from gemscope.cli.rows import live_rows

        wanted = list(dict.fromkeys(site for config in configs for site in config.sites))
        rows = live_rows(live or "", wanted, o.text or [], o.tokens, o.out)
    rows = for_end_to_end(rows, configs)
    if o.plan:
        _show_plan(rows, configs)
    else:
        _run(o, rows, configs, loaded)


def _configs(o: SimpleNamespace, rows: "Rows | None", loaded: "Loaded | None") -> "list[TrainConfig]":
    """What is to be trained."""
    given = _given(steps=o.steps, batch_size=o.batch_size, learning_rate=o.learning_rate, end_to_end=o.end_to_end)
    frozen = tuple(o.freeze or ())
    if o.recipe is not None:
        return [entry.config for entry in _entries(o.recipe, o.model, o.only or ())]
    if loaded is not None:
        return [_finetuning(loaded, o.l0, frozen, given)]
    names = ("kind", "target", "layers", "activation", "prefixes")
    options = {name: getattr(o, name) for name in names}
    moments = "bfloat16" if o.bf16_moments else "float32"
    flags = {"skip": o.skip, "tied": o.tied, "moments": moments, "offload": o.offload}
    axes: dict[str, Sequence[Any]] = {"d_sae": o.latents or [1024], "target_l0": o.l0 or [32.0], "seed": o.seed or [0]}
    known = _known(rows, o.live, o.site or ())
    return _sweep(known, o.site or [], options, flags, axes, {**given, "frozen": frozen})


def _given_rows(rows: str | None) -> "Rows":
    from gemscope.cli.rows import open_rows
    from gemscope.core.errors import InputError

    if rows is None:
        raise InputError("no rows were given; harvest some first with gemscope harvest, or read a model with --live.")
    return open_rows(rows)


def _known(rows: "Rows | None", live: str | None, sites: Sequence[str]) -> "list[Site]":
    """The sites there are."""
    from gemscope.cli.rows import sites_of_model
    from gemscope.core.sites import Site

    if rows is not None:
        return rows.data.sites
    assert live is not None
    known = sites_of_model(live)
    return [*known, *(Site.parse(site) for site in sites if Site.parse(site) not in known)]


def _given(**options: Any) -> dict[str, Any]:
    """Those that the user set."""
    return {name: value for name, value in options.items() if value is not None}


def _sweep(
    known: "Sequence[Site]",
    sites: Sequence[str],
    options: dict[str, Any],
    flags: dict[str, Any],
    axes: dict[str, Sequence[Any]],
    given: dict[str, Any],
) -> "list[TrainConfig]":
    """Every combination of sites and axes."""
    from itertools import product

    from gemscope.core.errors import InputError
    from gemscope.core.sites import Site
    from gemscope.training.config import MULTI_LAYER, TrainConfig
    from gemscope.training.multilayer import MultiLayerConfig

    kind = options["kind"]
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


def _show_plan(rows: "Rows", configs: "Sequence[TrainConfig]") -> None:
    from gemscope.cli.terminal import out
    from gemscope.cli.train_view import plan_table

    out().print(plan_table(configs, rows.widths), soft_wrap=True)


def _loss(rows: "Rows", heldout: Any, configs: "Sequence[TrainConfig]", texts: list[str]) -> "Evaluate | None":
    """Measures the model's loss with a dictionary in the place of what it reconstructs."""
    if not texts:
        return None
    from itertools import islice

    from gemscope.cli.store import text_source
    from gemscope.evaluation.splice import splice_losses
    from gemscope.evaluation.subject import Subject
    from gemscope.models.gemma import Gemma
    from gemscope.suites.corpus import heldout_text
    from gemscope.training.data import first_rows

    gemma = Gemma.load(rows.model, revision=rows.revision)
    if texts == ["microworld"]:
        items = heldout_text(gemma, _LOSS_TOKENS, 0).items
    else:
        source = text_source(gemma, texts, Path())
        some = islice(source.read(0, _LOSS_DOCUMENTS), _LOSS_DOCUMENTS)
        items = [gemma.tokens(one) if isinstance(one, str) else gemma.chat(one) for one in some]
    sites = list(dict.fromkeys(site for config in configs for site in config.writes))
    means = {site: x.mean(0) for site, x in first_rows(heldout, sites, 8192, 1024, 0).items()}

    def measure(config: "TrainConfig", dictionary: Any) -> dict[str, Any]:
        subject = Subject(str(config.site), dictionary.to(gemma.device), config.reads, config.writes)
        found = splice_losses(gemma, [subject], means, items)[0][0].loss
        return {"delta_loss": found.delta_loss, "loss": found.as_dict()}

    return measure


def _run(o: SimpleNamespace, rows: "Rows", configs: "Sequence[TrainConfig]", loaded: "Loaded | None") -> None:
    import torch

    from gemscope.cli.terminal import out as console
    from gemscope.cli.train_view import LiveTable, trained_table
    from gemscope.training.run import RunOptions, run
    from gemscope.training.sharding import start, stop
    from gemscope.training.tensorboard import TensorBoard
    from gemscope.training.wandb import WeightsAndBiases

    training, heldout = rows.data.split(o.held_out)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    mesh = start(o.latent_shards, device.type)
    sinks: list[Any] = []
    if mesh.is_first and o.tensorboard:
        sinks.append(TensorBoard(o.out / "tensorboard"))
    if mesh.is_first and o.wandb:
        about = {"configs": [c.as_dict() for c in configs]}
        sinks.append(WeightsAndBiases(o.wandb, o.out / "wandb", about, o.out.name))
    options = RunOptions(o.out, rows.model, rows.revision, o.checkpoint_every, logs=tuple(sinks), title=o.out.name)
    measure = _loss(rows, heldout, configs, o.loss_text or [])
    begin = {0: loaded.dictionary} if loaded is not None else None
    with LiveTable(configs, quiet=not mesh.is_first) as live:
        done = run(
            training,
            heldout,
            configs,
            options,
            start=begin,
            progress=live,
            device=device,
            mesh=mesh,
            measure=measure,
        )
    if mesh.is_first:
        console().print(trained_table(done, o.out), soft_wrap=True)
    stop()
