"""gemscope benchmark: our trainer on tasks whose answer is known."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gemscope.benchmark.worlds import Line, Run
    from gemscope.training.outcome import Progress

app = typer.Typer(help="Our trainer on tasks whose answer is known.", no_args_is_help=True)

_QUICK = ("easy", "nano", "transcoder", "crosscoder")
_COLUMNS = ("method", "n", "MCC", "adj.", "F1", "adj.", "R²", "L0", "dead", "CPU s", "target")


def register(root: typer.Typer) -> None:
    """Add the commands."""
    root.add_typer(app, name="benchmark")


@app.callback()
def _root() -> None:
    """Our trainer on tasks whose answer is known."""


@app.command()
def worlds(
    tier: Annotated[
        list[str] | None,
        typer.Option("--tier", "-t", help="Which world; may be repeated.", show_default="four of them"),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="jumprelu, batchtopk or matryoshka; may be repeated.", show_default="all")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each.", min=1)] = 3,
    rows: Annotated[int | None, typer.Option(help="Rows to train on.", show_default="the world's", min=1024)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="File of the runs; the same one again goes on.")] = Path(
        "worlds.jsonl"
    ),
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cpu")] = None,
    show: Annotated[bool, typer.Option("--list", help="Only show which worlds there are.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train on worlds of known features and show what was found, beside recorded peers.

    A run takes from 15 seconds to 2 minutes of a CPU; what is finished is kept.
    """
    import json
    from dataclasses import asdict
    from typing import cast, get_args

    import torch

    from gemscope.benchmark.worlds import benchmark, lines
    from gemscope.cli.terminal import out as console
    from gemscope.core.errors import InputError
    from gemscope.evaluation.worlds.tiers import TIERS, Method

    if show:
        console().print(_list())
        return
    known = get_args(Method)
    for name in method or []:
        if name not in known:
            raise InputError(f"there is no method {name!r}; use one of {', '.join(known)}.")
    chosen, wanted = tier or list(_QUICK), cast(Sequence[Any], method or [])
    place = None if device is None else torch.device(device)
    runs = benchmark(chosen, range(seeds), wanted, file=out, rows=rows, device=place, progress=_Said())
    found = lines(runs)
    if as_json:
        print(json.dumps([asdict(line) for line in found], ensure_ascii=False, indent=2))
        return
    for name in dict.fromkeys(chosen):
        console().print(_table(TIERS[name].about, name, [line for line in found if line.tier == name], runs))


class _Said:
    """Says where a benchmark stands: one line that moves in a terminal, else one line a run."""

    def __init__(self) -> None:
        from gemscope.cli.terminal import err

        self._console = err()

    def __call__(self, name: str, now: "Progress | None") -> None:
        done = now is None or now.step == now.total
        if self._console.is_terminal and now is not None:
            text = f"{name}  {now.step:,} of {now.total:,} steps  FVU {now.fvu[0]:.3f}  L0 {now.l0[0]:.2f}"
            self._console.print(f"{text:<78}", end="\n" if done else "\r")
        elif done:
            self._console.print(f"{name}  {'kept from before' if now is None else f'{now.total:,} steps'}")


def _list() -> "RenderableType":
    from rich.table import Table

    from gemscope.evaluation.worlds.tiers import TIERS

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("world", "rows", "what is planted"):
        table.add_column(name, justify="right" if name == "rows" else "left")
    for one in TIERS.values():
        table.add_row(one.name, f"{one.rows / 1e6:.1f} M", one.about)
    return table


def _table(about: str, name: str, found: "Sequence[Line]", runs: "Sequence[Run]") -> "RenderableType":
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from gemscope.benchmark.recorded import RECORDED

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for line in found:
        table.add_row(*_cells(line))
    peers = [
        f"{peer.trainer} {peer.method}: MCC {peer.mcc:.3f}, F1 {peer.f1:.3f} ({peer.source})"
        for peer in RECORDED
        if peer.tier == name
    ]
    first = next(run for run in runs if run.tier == name)
    floor, rest = first.score["mcc_floor"], [text for line in found if (text := _rest(line))]
    chance = first.score["detection"]["f1_floor"]
    notes = [
        f"by chance MCC {floor:.3f}, F1 {chance:.3f}; adj.: 0 there and 1 at the truth; n seeds of {first.rows:,} rows"
    ]
    more = [*rest, *peers, *notes]
    return Group(Text(), Text(f"{name}: {about}", style="bold"), table, *(Text(text, style="dim") for text in more))


def _cells(line: "Line") -> list[str]:
    means, spread = line.means, line.deviations
    return [
        line.method,
        str(len(line.seeds)),
        f"{means['mcc']:.3f}±{spread['mcc']:.3f}",
        f"{means['mcc_adjusted']:.3f}",
        f"{means['f1']:.3f}±{spread['f1']:.3f}",
        f"{means['f1_adjusted']:.3f}",
        f"{means['explained']:.3f}",
        f"{means['l0']:.2f}",
        f"{means['dead']:.1f}",
        f"{means['cpu_seconds']:.1f}",
        {True: "met", False: "missed", None: ""}[line.met],
    ]


def _rest(line: "Line") -> str:
    names = {"encoder_mcc": "encoder MCC", "affine_r2": "R² of the linear map", "shared_auc": "AUC shared / exclusive"}
    found = [f"{text} {line.means[key]:.3f}" for key, text in names.items() if key in line.means]
    return f"{line.method}: {', '.join(found)}" if found else ""
