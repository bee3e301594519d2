"""``gemscope harvest`` and ``gemscope store``: activations to disk, and looking after what is there."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemscope.cli.cluster import Ray, RayCommand, Workers

if TYPE_CHECKING:
    from gemscope.activations.harvesting import Slice
    from gemscope.activations.plan import HarvestConfig
    from gemscope.activations.sources import Source
    from gemscope.models.gemma import Gemma

Folder = Annotated[Path, typer.Argument(help="Folder of a store.", show_default=False)]
Texts = Annotated[
    list[str] | None,
    typer.Argument(help=".txt, .jsonl, .parquet files, '-' for stdin; absent: the microworld.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Built-in name, model folder or hub id.", show_default="microworld-it"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


stores = typer.Typer(help="Look after stores of activations.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(cls=RayCommand)(harvest)
    app.command()(replies)
    app.add_typer(stores, name="store")


def harvest(
    texts: Texts = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the store.")] = Path("store"),
    model: Model = None,
    site: Annotated[
        list[str] | None, typer.Option(help="Site, of every layer or of one: mlp_in, resid_post.3.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers, as in 0,2,5-9.", show_default="all")] = None,
    tokens: Annotated[int | None, typer.Option(help="Content tokens to harvest.", show_default="all text")] = None,
    context: Annotated[int, typer.Option(help="Tokens read at once; longer texts are cut.")] = 1024,
    dataset: Annotated[str | None, typer.Option(help="Hugging Face data set, NAME or NAME:CONFIG.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    column: Annotated[str, typer.Option(help="Field of JSONL, Parquet and data sets.")] = "text",
    lines: Annotated[bool, typer.Option("--lines", help="Each line of a text file is a document.")] = False,
    dtype: Annotated[str, typer.Option(help="Stored number type: bfloat16 or float32.")] = "bfloat16",
    model_dtype: Annotated[
        str | None, typer.Option(help="The model's: bf16 or fp32.", show_default="by device")
    ] = None,
    bucket_rows: Annotated[int | None, typer.Option(help="Rows shuffled together.", show_default="1 GiB")] = None,
    unit_rows: Annotated[int | None, typer.Option(help="Rows of a unit.", show_default="3/4 bucket")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Positions in one forward pass.")] = 8192,
    packing: Annotated[bool, typer.Option("--packing", help="Short texts share rows of a batch.")] = False,
    outlier_factor: Annotated[float, typer.Option(help="An outlier's norm, in medians.")] = 10.0,
    drop_outliers: Annotated[bool, typer.Option("--drop-outliers", help="Leave outliers out.")] = False,
    seed: Annotated[int, typer.Option(help="Of the shuffle and of generated text.", min=0)] = 0,
    unit_slice: Annotated[str, typer.Option(help="Do units i, i+n, ... only: i/n.")] = "0/1",
    ray: Ray = None,
    workers: Workers = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take.")] = False,
) -> None:
    """Store activations of text: shuffled shards of every site, for training.

    Stop it at any time; the same command goes on where it was.
    """
    from gemscope.activations.harvesting import Slice
    from gemscope.activations.plan import HarvestConfig
    from gemscope.cli.harvest_view import dry
    from gemscope.cli.inputs import DEFAULT_MODEL
    from gemscope.models.gemma import Gemma

    share = Slice.parse(unit_slice)
    name = model or DEFAULT_MODEL
    gemma = Gemma.load(name, dtype=model_dtype)
    config = HarvestConfig(
        sites=_sites(gemma, site or ["resid_post"], layers),
        tokens=tokens if tokens is not None or texts or dataset else 1_000_000,
        context=context,
        dtype=dtype,
        bucket_rows=bucket_rows,
        unit_rows=unit_rows,
        batch_tokens=batch_tokens,
        packing=packing,
        outlier_factor=outlier_factor,
        drop_outliers=drop_outliers,
        seed=seed,
    )
    source = text_source(gemma, texts or [], out, dataset, split, column, lines=lines, seed=seed)
    if dry_run:
        return dry(gemma, source, config, out)
    return _run(out, (name, model_dtype), gemma, source, config, share, ray, workers)


def replies(
    texts: Texts = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSONL file to write.")] = Path("replies.jsonl"),
    model: Model = None,
    documents: Annotated[int | None, typer.Option(help="Documents to answer.", show_default="all", min=1)] = None,
    column: Annotated[str, typer.Option(help="Field of JSONL and Parquet.")] = "text",
    lines: Annotated[bool, typer.Option("--lines", help="Each line of a text file is a document.")] = False,
    new_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 1.0,
    batch: Annotated[int, typer.Option(help="Documents answered at once.", min=1)] = 32,
    seed: Annotated[int, typer.Option(help="Of the draws and of generated text.", min=0)] = 0,
    model_dtype: Annotated[
        str | None, typer.Option(help="The model's: bf16 or fp32.", show_default="by device")
    ] = None,
) -> None:
    """Let a model answer chats, and write them with its replies: text to finetune dictionaries on.

    Each document's last user turn is answered. Stop it at any time; the same command goes on where it was.
    """
    from gemscope.activations.replies import ReplyConfig, write_replies
    from gemscope.cli.inputs import DEFAULT_MODEL
    from gemscope.cli.terminal import StageBars
    from gemscope.cli.terminal import out as console
    from gemscope.core.progress import StageProgress
    from gemscope.models.gemma import Gemma
    from gemscope.suites.corpus import GeneratedText

    gemma = Gemma.load(model or DEFAULT_MODEL, dtype=model_dtype)
    config = ReplyConfig(documents, new_tokens, batch, temperature, seed)
    source = GeneratedText(True, "train", seed, running=False)
    if texts:
        source = text_source(gemma, texts, out.parent, column=column, lines=lines)
    with StageBars() as bars:
        count = write_replies(
            gemma, source, out, config, lambda done, total: bars(StageProgress("answer", done, total, "documents"))
        )
    console().print(f"{out}: {count:,} chats.")


def _run(
    out: Path,
    model: tuple[str, str | None],
    gemma: "Gemma",
    source: "Source",
    config: "HarvestConfig",
    share: "Slice",
    ray: str | None,
    workers: int,
) -> None:
    """Harvest here or on Ray, with a view of it."""
    from gemscope.activations.cluster import ModelSpec, harvest_on_ray
    from gemscope.activations.harvesting import harvest_to
    from gemscope.cli.cluster import ray_config
    from gemscope.cli.harvest_view import HarvestView

    with HarvestView() as view:
        if ray is None:
            harvest_to(out, gemma, source, config, share=share, progress=view, on_estimate=view.expect)
        else:
            name, dtype = model
            spec = ModelSpec(str(Path(name).resolve()) if Path(name).is_dir() else name, gemma.revision, dtype)
            where = ray_config(ray, workers)
            harvest_on_ray(out, spec, gemma, source, config, where, progress=view, on_estimate=view.expect)
    view.end(out)


def _sites(gemma: "Gemma", names: list[str], layers: str | None) -> tuple[str, ...]:
    """``resid_post`` is that site in the chosen layers; ``resid_post.3`` and ``embed`` are themselves."""
    from gemscope.core.sites import SITE_KINDS

    chosen = range(gemma.shape.n_layers) if layers is None else _numbers(layers)
    found: list[str] = []
    for name in names:
        per_layer = name in SITE_KINDS and SITE_KINDS[name].per_layer
        found += [f"{name}.{layer}" for layer in chosen] if per_layer else [name]
    return tuple(found)


def _numbers(text: str) -> list[int]:
    from gemscope.core.errors import InputError

    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdecimal() or (last and not last.strip().isdecimal()):
            raise InputError(f"cannot read the layers {text!r}; write for example 0,2,5-9.")
        found += range(int(first), int(last or first) + 1)
    return found


def text_source(
    gemma: "Gemma",
    texts: list[str],
    out: Path,
    dataset: str | None = None,
    split: str = "train",
    column: str = "text",
    *,
    lines: bool = False,
    seed: int = 0,
) -> "Source":
    """The documents of files, of a data set, of standard input (kept in ``out``), or of the microworld."""
    from gemscope.activations.sources import HubDataset, JsonLines, ParquetFiles, TextFiles, spooled
    from gemscope.core.errors import InputError
    from gemscope.suites.corpus import GeneratedText

    if dataset is not None:
        if texts:
            raise InputError("give files or --dataset, not both.")
        name, _, part = dataset.partition(":")
        return HubDataset(name, split, column, part or None)
    if not texts:
        return GeneratedText(gemma.is_chat, "train", seed)
    if texts == ["-"]:
        return spooled(sys.stdin.buffer, out / ".text")
    paths = tuple(Path(text) for text in texts)
    kinds = {path.suffix.lower() for path in paths}
    if kinds <= {".jsonl", ".ndjson"}:
        return JsonLines(paths, column)
    if kinds == {".parquet"}:
        return ParquetFiles(paths, column)
    if kinds & {".jsonl", ".ndjson", ".parquet"}:
        raise InputError("the files are of several kinds; harvest each kind into its own store, then merge them.")
    return TextFiles(paths, lines)


@stores.command()
def info(folder: Folder, as_json: Json = False) -> None:
    """Say what a store holds."""
    from gemscope.activations.upkeep import info as look
    from gemscope.cli.harvest_view import info_table
    from gemscope.cli.terminal import out

    found = look(folder)
    if as_json:
        print(json.dumps(found.as_dict(), ensure_ascii=False, indent=2))
    else:
        out().print(info_table(found))


@stores.command()
def verify(folder: Folder) -> None:
    """Read every byte and compare it with the checksums; exit code 2 when something is wrong."""
    from gemscope.activations.upkeep import verify as check
    from gemscope.cli.terminal import StageBars, out
    from gemscope.core.progress import StageProgress

    with StageBars() as bars:
        problems = check(folder, lambda done, total: bars(StageProgress("verify", done, total, "bytes")))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(2)
    out().print(f"{folder} is whole.")


@stores.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Finished stores.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new store.")],
) -> None:
    """Put stores together: one after the other, their shards linked, not copied."""
    from gemscope.activations.upkeep import merge as put_together
    from gemscope.cli.terminal import out as console

    plan = put_together(folders, out)
    console().print(f"{out}: {plan.units} units of {len(folders)} stores.")


@stores.command()
def rm(
    folder: Folder,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a store, and nothing that is none."""
    from gemscope.activations.upkeep import info as look
    from gemscope.activations.upkeep import remove
    from gemscope.cli.terminal import out

    found = look(folder)
    if not yes:
        typer.confirm(f"Delete {folder}, {found.rows:,} rows, {found.bytes / 1e9:.2f} GB?", abort=True)
    out().print(f"{remove(folder) / 1e9:.2f} GB freed.")
