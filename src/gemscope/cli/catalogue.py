"""``gemscope list`` and ``gemscope fetch``: the released dictionaries, shown and brought here."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gemscope.artifacts.catalogue.released import Query
    from gemscope.artifacts.hub.record import FileRecord

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Of this model: 1b-it, gemma-3-1b-it, gemma-2-2b.", metavar="MODEL")
]
SiteName = Annotated[str | None, typer.Option("--site", help="Reading here: resid_post, z, mlp_in, mlp_out.")]
Category = Annotated[str | None, typer.Option("--category", help="In this folder of the release: resid_post_all.")]
Layers = Annotated[
    list[str] | None, typer.Option("--layer", "-l", help="Of these layers: 9, 0-5, or 9,17,22.", metavar="LAYERS")
]
Width = Annotated[str | None, typer.Option("--width", "-w", help="16k, 65k, 262k, ... or the exact number.")]
L0 = Annotated[str | None, typer.Option("--l0", help="small, medium, big, canonical, or a target.")]
KindName = Annotated[
    str | None, typer.Option("--kind", help="sae, transcoder, skip_transcoder, crosscoder or clt.", metavar="KIND")
]
Affine = Annotated[bool | None, typer.Option("--affine/--no-affine", help="With or without the affine skip.")]
Names = Annotated[
    list[str] | None,
    typer.Argument(help="Names, or patterns with * in quotes.", show_default=False, metavar="[NAME]..."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def list_(
    names: Names = None,
    model: Model = None,
    site: SiteName = None,
    category: Category = None,
    layer: Layers = None,
    width: Width = None,
    l0: L0 = None,
    kind: KindName = None,
    affine: Affine = None,
    every: Annotated[bool, typer.Option("--all", "-a", help="Show every line of a long list.")] = False,
    as_json: Json = False,
) -> None:
    """List the dictionaries released with Gemma Scope 1 and 2. Needs no network."""
    from gemscope.artifacts.catalogue.released import select
    from gemscope.cli.catalogue_view import listing

    chosen = select(_query(names, model, site, category, layer, width, l0, kind, affine))
    if as_json:
        print(json.dumps([artifact.as_dict() for artifact in chosen], indent=2))
    else:
        print(listing(chosen, every=every))


def fetch(
    names: Names = None,
    model: Model = None,
    site: SiteName = None,
    category: Category = None,
    layer: Layers = None,
    width: Width = None,
    l0: L0 = None,
    kind: KindName = None,
    affine: Affine = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to put them in.", show_default="artifacts")
    ] = None,
    revision: Annotated[str, typer.Option("--revision", help="Branch, tag or commit of the hub.")] = "main",
    hub: Annotated[
        str | None, typer.Option("--hub", help="A mirror's address, or a folder OWNER/REPOSITORY/FILES.")
    ] = None,
    examples: Annotated[
        bool, typer.Option("--with-examples", help="Also the top activating examples, larger than the weights.")
    ] = False,
    rehash: Annotated[bool, typer.Option("--rehash", help="Read files again that are here, to check them.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be fetched.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch released dictionaries: one by its name, or all that fit the options.

    A stopped fetch goes on where it was when it is run again.
    """
    from gemscope.artifacts.catalogue.released import select
    from gemscope.artifacts.hub.fetch import DEFAULT_OUT, plan
    from gemscope.artifacts.hub.fetch import fetch as bring
    from gemscope.artifacts.hub.retry import Patience
    from gemscope.artifacts.hub.sources import open_source
    from gemscope.cli.catalogue_view import Bars, fetched_json, plan_text, said, summary
    from gemscope.core.errors import InputError

    query = _query(names, model, site, category, layer, width, l0, kind, affine)
    if query == _query(*[None] * 9):
        raise InputError("nothing was chosen; give a name from gemscope list, or options such as --model 1b-it.")
    chosen = select(query)
    if not chosen:
        raise InputError("no released dictionary fits all these options; see which there are with gemscope list.")
    source = open_source(hub, Patience(tell=said))
    todo = plan(chosen, source, out or DEFAULT_OUT, revision=revision, examples=examples, rehash=rehash)
    records: dict[Path, FileRecord] = {}
    if dry_run:
        if not as_json:
            print(plan_text(todo))
    else:
        said(summary(todo))
        with Bars(todo, quiet=as_json) as bars:
            records = bring(todo, bars)
        if not as_json and todo.steps:
            first = shlex.quote(str(todo.steps[0].target.parent))
            said(f"look at {'it' if len(chosen) == 1 else 'one'} with: gemscope inspect {first}")
    if as_json:
        print(json.dumps(fetched_json(todo, records), indent=2))


def _query(
    names: list[str] | None,
    model: str | None,
    site: str | None,
    category: str | None,
    layer: list[str] | None,
    width: str | None,
    l0: str | None,
    kind: str | None,
    affine: bool | None,
) -> "Query":
    from gemscope.artifacts.catalogue.released import Query, parse_layers

    return Query(
        model=model,
        site=site,
        category=category,
        layers=parse_layers(layer or ()),
        width=width,
        l0=l0,
        kind=kind,
        affine=affine,
        names=tuple(names or ()),
    )
