"""``gemscope inspect`` and ``gemscope convert``: dictionaries on disk, in any format."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemscope.core.quantities import size_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gemscope.artifacts.convert import Conversion
    from gemscope.artifacts.inspect import Inspection, Spread

SiteName = Annotated[
    str | None,
    typer.Option("--site", help="Where it belongs, if its files do not say: resid_post.12.", show_default=False),
]
ModelName = Annotated[
    str | None, typer.Option("--model", "-m", help="Its model, if its files do not say.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("inspect")(inspect)
    app.command("convert")(convert)


def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a dictionary, or a file in it.", show_default=False)],
    site: SiteName = None,
    model: ModelName = None,
    as_json: Json = False,
) -> None:
    """Say what a dictionary is: kind, site, shapes, norms, thresholds, memory, warnings."""
    from gemscope.artifacts.inspect import inspect as look
    from gemscope.cli.terminal import out

    found = look(path, site=site, model=model)
    if as_json:
        print(json.dumps(found.as_dict(), ensure_ascii=False, indent=2))
    else:
        out().print(inspection(found), soft_wrap=False)


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a dictionary, or of several.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            "--to", help="gemscope, gemma-scope-2, gemma-scope-1, saelens or circuit-tracer.", show_default=False
        ),
    ],
    site: SiteName = None,
    model: ModelName = None,
    as_json: Json = False,
) -> None:
    """Write a dictionary in another format, and say what is lost; only the new folder is written."""
    from gemscope.artifacts.convert import convert as change
    from gemscope.cli.terminal import out

    done = change(source, target, to, site=site, model=model)
    if as_json:
        print(json.dumps(asdict(done), ensure_ascii=False, indent=2))
    else:
        out().print(conversion(done), soft_wrap=True)


def inspection(found: "Inspection") -> "RenderableType":
    """Two columns, and under them what is odd."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(found):
        table.add_row(name, Text(value))
    notes = [Text(f"warning: {note}", style="yellow") for note in found.warnings]
    return Group(table, *([Text(), *notes] if notes else []))


def _lines(found: "Inspection") -> list[tuple[str, str]]:
    """What is shown, line by line."""
    k = "" if found.k is None else f", k {found.k:g}"
    gain = "" if found.read_gain else " (without the norm's gain)"
    reads, writes = _sites(found.reads) + gain, _sites(found.writes)
    per = f" in each of {len(found.reads)} positions, {found.n_latents:,} in all" if len(found.reads) > 1 else ""
    lines = [
        ("dictionary", f"{found.kind.replace('_', ' ')}, {found.activation}{k}"),
        ("format", found.format),
        ("model", found.model),
        ("reads", reads),
        *([("writes", writes)] if found.writes != found.reads else []),
        ("latents", f"{found.d_sae:,}{per}"),
        ("widths", f"{found.d_in:,} in, {found.d_out:,} out"),
        *([("L0 target", f"{found.l0:g}")] if found.l0 is not None else []),
        *([("prefixes", ", ".join(f"{n:,}" for n in found.prefixes))] if found.prefixes else []),
        (
            "memory",
            f"{size_text(found.bytes)}, and {size_text(found.encode_bytes)} for the activations of 1,024 tokens",
        ),
        ("encoder norms", _spread(found.encoder_norms)),
        ("decoder norms", _spread(found.decoder_norms)),
        *([("thresholds", _spread(found.thresholds))] if found.thresholds is not None else []),
        *([("evidence", "examples.safetensors")] if found.examples else []),
    ]
    shapes = [f"{t.name} {list(t.shape)} {t.dtype}" for t in found.tensors[:12]]
    more = [f"and {len(found.tensors) - 12} more"] if len(found.tensors) > 12 else []
    return [*lines, *(("tensors" if i == 0 else "", shape) for i, shape in enumerate([*shapes, *more]))]


def _sites(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} to {names[-1]}, {len(names)} layers"


def _spread(spread: "Spread") -> str:
    five = (spread.minimum, spread.quarter, spread.median, spread.three_quarters, spread.maximum)
    low, q1, median, q3, high = (f"{value:.4g}" for value in five)
    return f"{low} to {high}, median {median}, half of them {q1} to {q3}"


def conversion(done: "Conversion") -> "RenderableType":
    """What was written, what is odd, what is lost."""
    from rich.console import Group
    from rich.text import Text

    many = f"{done.written} dictionaries" if done.written > 1 else "1 dictionary"
    lines = [Text(f"{many}, {done.source} -> {done.target}: {done.folder}")]
    lines += [Text(f"warning: {note}", style="yellow") for note in done.warnings]
    lines += [Text(f"lost: {note}") for note in done.lost] or [Text("nothing is lost", style="dim")]
    return Group(*lines)
