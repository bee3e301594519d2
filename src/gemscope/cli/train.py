"""gemscope train: dictionaries from harvested rows, one, a sweep or a recipe, from scratch or from an artefact."""

import os
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.cli.end_to_end import for_end_to_end

if TYPE_CHECKING:
    import torch

    from gemscope.cli.rows import Rows
    from gemscope.cli.train_configs import Job
    from gemscope.training.config import TrainConfig
    from gemscope.training.outcome import Evaluate, Trained
    from gemscope.training.sharding import Mesh

_LOSS_TOKENS, _LOSS_DOCUMENTS = 12_000, 64

Given = Annotated[str | None, typer.Argument(help="A store: folder or URL.", show_default=False)]

_Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same one again goes on.")]
_From = Annotated[
    list[Path] | None,
    typer.Option(
        "--from",
        help="What to begin from, of any format known: dictionaries to finetune, one for each layer of a --kind clt or"
        " crosscoder, or the folder that holds what a --recipe begins from. May be repeated.",
        show_default=False,
    ),
]
_Sparsity = Annotated[
    str | None, typer.Option(help="Penalty: quadratic, linear, tanh or l1.", show_default="quadratic")
]
_Frequency = Annotated[
    float | None, typer.Option(help="Weight of the penalty on latents that are too frequent.", show_default="0")
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Another field of the config: bandwidth=0.3; may be repeated.", show_default=False),
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
    sparsity: _Sparsity = None,
    frequency_weight: _Frequency = None,
    setting: _Set = None,
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
    given = locals()
    _go(SimpleNamespace(**given, given=_flags(given)))


def _flags(options: dict[str, Any]) -> dict[str, str]:
    """Those that are not at their default, as they are written."""
    spelt = {"rows": "ROWS", "artefact": "--from", "show": "--list", "setting": "--set"}
    defaults = {name: parameter.default for name, parameter in signature(train).parameters.items()}
    given = [name for name, value in options.items() if value not in (defaults[name], [])]
    return {name: spelt.get(name, f"--{name.replace('_', '-')}") for name in given}


def _go(o: SimpleNamespace) -> None:
    """Do it; ``o`` has all options by their names."""
    from gemscope.cli.terminal import out
    from gemscope.cli.train_configs import entries, jobs
    from gemscope.cli.train_view import plan_table, recipe_table
    from gemscope.training.planner import widths_of
    from gemscope.training.recipe import passes as passes_of

    live: str | None = o.live
    if o.show:
        out().print(recipe_table(entries(o)))
        return
    shards = o.latent_shards or 1
    if o.plan and o.recipe is not None and o.rows is None and live is None:
        for group in passes_of(entries(o)):
            out().print(plan_table([entry.config for entry in group], widths_of(group), shards), soft_wrap=True)
        return
    device = _device()  # before a model is loaded there
    rows = None if live is not None else _given_rows(o.rows)
    passes = jobs(o, rows)
    configs = [[job.entry.config for job in group] for group in passes]
    if rows is None:
        from gemscope.cli.rows import live_rows

        wanted = list(dict.fromkeys(site for group in configs for config in group for site in config.sites))
        rows = live_rows(live or "", wanted, o.text or [], o.tokens, o.out)
    rows = for_end_to_end(rows, [config for group in configs for config in group])
    if not o.plan:
        _run(o, rows, passes, device)
        return
    for group in configs:
        out().print(plan_table(group, rows.widths, shards), soft_wrap=True)


def _given_rows(rows: str | None) -> "Rows":
    from gemscope.cli.rows import open_rows
    from gemscope.core.errors import InputError

    if rows is None:
        raise InputError("no rows were given; harvest some first with gemscope harvest, or read a model with --live.")
    return open_rows(rows)


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
        dictionary.cpu()
        return {"delta_loss": found.delta_loss, "loss": found.as_dict()}

    return measure


def _device() -> "torch.device":
    """This process's GPU, which is then where everything goes, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def _run(o: SimpleNamespace, rows: "Rows", passes: "Sequence[Sequence[Job]]", device: "torch.device") -> None:
    """Pass after pass; of a recipe, those that are finished in the folder are left out."""
    from gemscope.cli.terminal import out
    from gemscope.cli.train_view import trained_table
    from gemscope.training.recipe import Finished
    from gemscope.training.sharding import start, stop

    sides = rows.data.split(o.held_out)
    mesh = start(o.latent_shards, device.type)
    finished = Finished(o.out, f"{sides[0].rows} of {rows.model} {rows.revision}, {o.held_out} held out")
    todo = [o.recipe is None or not all(job.entry in finished for job in group) for group in passes]
    for i, group in enumerate(passes):
        folder = o.out / f"pass_{i + 1}" if len(passes) > 1 else o.out
        where = f"pass {i + 1} of {len(passes)}, {len(group)} dictionaries"
        if mesh.is_first and not todo[i]:
            out().print(f"{where}: finished before")
        elif mesh.is_first and len(passes) > 1:
            out().print(where)
        if not todo[i]:
            continue
        done = _pass(o, rows, sides, group, folder, device, mesh)
        if mesh.is_first:
            if o.recipe is not None:
                finished.add([job.entry for job in group], [folder / "dictionaries" / one.name for one in done])
            out().print(trained_table(done, folder), soft_wrap=True)
        mesh.wait()  # what a later pass begins from is written down
    stop()


def _pass(
    o: SimpleNamespace,
    rows: "Rows",
    sides: Any,
    group: "Sequence[Job]",
    folder: Path,
    device: "torch.device",
    mesh: "Mesh",
) -> "list[Trained]":
    """One pass over the training side of the rows, into ``folder``."""
    from gemscope.cli.terminal import err
    from gemscope.cli.train_view import LiveTable, memory_warning
    from gemscope.training.origins import begin
    from gemscope.training.run import RunOptions, run
    from gemscope.training.tensorboard import TensorBoard
    from gemscope.training.wandb import WeightsAndBiases

    training, heldout = sides
    configs = [job.entry.config for job in group]
    if mesh.is_first and (said := memory_warning(configs, rows.widths, mesh, device)) is not None:
        err().print(said, style="yellow", soft_wrap=True)
    sinks: list[Any] = []
    if mesh.is_first and o.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard"))
    if mesh.is_first and o.wandb:
        about = {"configs": [c.as_dict() for c in configs]}
        sinks.append(WeightsAndBiases(o.wandb, folder / "wandb", about, folder.name))
    options = RunOptions(folder, rows.model, rows.revision, o.checkpoint_every, logs=tuple(sinks), title=folder.name)
    origins = {i: job.origin for i, job in enumerate(group) if job.origin is not None}
    starts = {i: begin(configs[i], origin(), training) for i, origin in origins.items()}
    with LiveTable(configs, quiet=not mesh.is_first) as live:
        return run(
            training,
            heldout,
            configs,
            options,
            start=starts,
            progress=live,
            device=device,
            mesh=mesh,
            measure=_loss(rows, heldout, configs, o.loss_text or []) if mesh.is_first else None,
        )
