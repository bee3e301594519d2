"""``gemscope index``: an index made over a store, read from or written in the layouts of others."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemscope.cli.cluster import Ray, RayCommand, Workers
from gemscope.cli.features import Json, Model, SuiteFolder, loaded_in, opened_index
from gemscope.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemscope.features.index import FeatureIndex

_INDEX = Path("index")


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(cls=RayCommand)(index)


def index(
    store: Annotated[Path | None, typer.Option(help="Folder of a store of activations.", show_default=False)] = None,
    dictionary: Annotated[
        list[Path] | None, typer.Option("--dictionary", "-d", help="Folder of a dictionary; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the index; the same one again goes on.", show_default="index"),
    ] = None,
    model: Model = None,
    top: Annotated[int | None, typer.Option(help="Strongest examples of a latent.", show_default="20")] = None,
    groups: Annotated[int | None, typer.Option(help="Quantile groups of its activations.", show_default="5")] = None,
    per_group: Annotated[int | None, typer.Option(help="Random examples of each group.", show_default="5")] = None,
    sample: Annotated[int | None, typer.Option(help="Tokens they are chosen from.", show_default="64")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens known on both sides.", show_default="12")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random choices.", show_default="0")] = None,
    share: Annotated[str, typer.Option("--slice", help="Of several workers, which: 0/3.")] = "0/1",
    ray: Ray = None,
    workers: Workers = 2,
    suite: SuiteFolder = None,
    bundle: Annotated[
        Path | None,
        typer.Option("--from", help="Read Neuronpedia's layout, or examples.safetensors.", show_default=False),
    ] = None,
    into: Annotated[
        Path | None, typer.Option("--to", help="Write the index in Neuronpedia's layout.", show_default=False)
    ] = None,
    examples: Annotated[bool, typer.Option("--examples", help="With --to: write examples.safetensors.")] = False,
    as_json: Json = False,
) -> None:
    """Index every latent of dictionaries over a store, in one pass; or read and write indexes of others.

    With --store, run it on several machines with --ray, or with --slice i/n; who comes last writes the index. What was
    finished is kept after a stop. With --to, --dictionary adds the directions of dictionaries to the bundle.
    """
    from gemscope.cli.terminal import err
    from gemscope.cli.terminal import out as screen

    sizes = {"top": top, "groups": groups, "per_group": per_group, "sample": sample, "window": window, "seed": seed}
    asked = {**sizes, "slice": None if share == "0/1" else share, "ray": ray, "dictionary": dictionary, "suite": suite}
    _consistent(store, bundle, into, {**asked, "examples": examples or None, "json": as_json or None})
    if into is not None:
        written = _export(out, suite, model, into, dictionary, examples)
        screen().print(f"{len(written)} files in {into}")
        return
    place = out or _INDEX
    if bundle is not None:
        made = _import(bundle, place, model, top)
    else:
        made = _build(store, dictionary or [], place, model, share, None if ray is None else (ray, workers), sizes)
    if made is None:
        err().print("this slice is done; the index is written when all slices are.")
    elif as_json:
        print(json.dumps(dict(made.about), indent=2, ensure_ascii=False))
    else:
        over = f" over {made.about['tokens']:,} tokens" if made.about["tokens"] else ""
        screen().print(f"{len(made):,} latents of {len(made.names)} dictionaries{over}: {place}")


def _consistent(store: Path | None, bundle: Path | None, into: Path | None, asked: "Mapping[str, object]") -> None:
    """Raises InputError for options that do not go together, or would do nothing."""
    from gemscope.artifacts.examples import FILE

    ways = [way for way, place in (("--store", store), ("--from", bundle), ("--to", into)) if place is not None]
    if len(ways) > 1:
        raise InputError(f"{' and '.join(ways)} do not go together; give one of them.")
    way = ways[0] if ways else "--store"
    has_examples = bundle is not None and (bundle / FILE).is_file()
    used = {
        "--store": asked.keys() - {"suite", "examples"},
        "--from": {"json", "top"} if has_examples else {"json"},
        "--to": {"suite", "examples"} if asked["examples"] else {"suite", "dictionary"},
    }
    idle = [name for name, value in asked.items() if value is not None and name not in used[way]]
    if idle:
        raise InputError(f"--{idle[0].replace('_', '-')} does nothing here beside {way}; leave it out.")


def _export(
    folder: Path | None, suite: Path | None, model: str | None, into: Path, given: list[Path] | None, examples: bool
) -> list[Path]:
    """Write an index in a layout of others: that in ``folder``, or the suite's."""
    from gemscope.features.neuronpedia import export_bundle
    from gemscope.features.scope_examples import export_examples
    from gemscope.features.search import indexed

    if folder is not None and not (folder / "index.json").is_file():
        raise InputError(f"there is no index in {folder}; give the folder of one with --out, or none for the suite's.")
    if folder is None and suite is None and model is None and (_INDEX / "index.json").is_file():
        folder = _INDEX
    _, made = opened_index(suite, model, folder)
    if examples:
        return [export_examples(made, name, into / name) for name in made.names]
    found = loaded_in(None, given) if given else None
    if found and (others := [name for name in found if name not in made.sizes]):
        raise InputError(f"the index has no dictionary {others[0]}; it has {', '.join(made.names)}.")
    return export_bundle(made, into, indexed(made, found) if found else None)


def _import(evidence: Path, out: Path, model: str | None, top: int | None) -> "FeatureIndex":
    """Read Neuronpedia's layout, or the ``examples.safetensors`` beside a dictionary."""
    from gemscope.artifacts.examples import FILE
    from gemscope.features.config import IndexConfig
    from gemscope.features.neuronpedia import import_bundle
    from gemscope.features.scope_examples import import_examples
    from gemscope.models.gemma import Gemma

    if not (evidence / FILE).is_file():
        return import_bundle(evidence, out)
    if model is None:
        raise InputError(f"{FILE} has no spellings of its tokens; give its model with --model.")
    name = evidence.resolve().name
    return import_examples(evidence, out, Gemma.load(model), name=name, top=IndexConfig.top if top is None else top)


def _build(
    store: Path | None,
    folders: list[Path],
    out: Path,
    model: str | None,
    share: str,
    ray: tuple[str, int] | None,
    chosen: dict[str, int | None],
) -> "FeatureIndex | None":
    from gemscope.activations.harvesting import Slice
    from gemscope.activations.store import Store
    from gemscope.cli.cluster import ray_config
    from gemscope.cli.terminal import StageBars
    from gemscope.core.progress import StageProgress
    from gemscope.features.blocks import StoreRows
    from gemscope.features.cluster import index_on_ray
    from gemscope.features.config import IndexConfig
    from gemscope.features.index import index as build
    from gemscope.models.gemma import Gemma

    if store is None or not folders:
        raise InputError("give a store with --store and at least one --dictionary; a suite has its index already.")
    opened = Store.open(store)
    found = loaded_in(None, folders)
    config = IndexConfig(**{name: value for name, value in chosen.items() if value is not None})
    plan = opened.plan.config
    gemma = Gemma.load(model or str(plan["model"]), revision=None if model else plan.get("revision"))
    rows = StoreRows(opened)
    with StageBars() as bars:

        def progress(done: int, total: int) -> None:
            bars(StageProgress("index", done, total, "tokens"))

        if ray is not None:
            return index_on_ray(out, rows, found, ray_config(*ray), config, gemma=gemma, progress=progress)
        return build(out, rows, found, config, gemma=gemma, share=Slice.parse(share), progress=progress)
