"""``python -m gemscope.microworld``: ``train`` makes the checkpoints, ``score`` measures the planted behaviours."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table

from gemscope.core.files import write_json
from gemscope.core.provenance import collect
from gemscope.microworld import training
from gemscope.microworld.card import write_card
from gemscope.microworld.corpus import Kind, documents
from gemscope.microworld.scorecard import Scorecard, scorecard
from gemscope.models.gemma import Gemma

app = typer.Typer(add_completion=False, help="The built-in world with known truth, and the models trained on it.")
_console = Console()


def _train(config: training.MicroworldConfig, out: Path, start: Path | None) -> Path:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console) as bars:
        task = bars.add_task(f"microworld-{config.kind}", total=config.tokens, note="")

        def show(at: training.Progress) -> None:
            bars.update(task, completed=at.tokens, note=f"loss {at.loss:.3f}  {at.rate:,.0f} tokens/s")

        return training.train(config, out, start, show)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder that the two checkpoints are written to.")] = Path("microworld"),
    tokens: Annotated[int | None, typer.Option(help="Tokens for each checkpoint; default: as shipped.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and documents.")] = 0,
) -> None:
    """Train microworld-pt from nothing and microworld-it from it. Run again, it goes on where it was stopped."""
    start: Path | None = None
    for config in (training.PT, training.IT):
        config = dataclasses.replace(config, seed=seed, tokens=tokens or config.tokens)
        folder = out / f"microworld-{config.kind}"
        if not (folder / "training.json").is_file():
            _train(config, out, start)
        start = folder
        _console.print(f"{folder} is complete.", soft_wrap=True)


@app.command()
def score(
    models: Annotated[list[str] | None, typer.Argument(help="Model names or folders.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    misses: Annotated[bool, typer.Option(help="Show some of the prompts that failed.")] = False,
    write: Annotated[bool, typer.Option(help="Also write scorecard.json and the model card into each folder.")] = False,
) -> None:
    """Measure each planted behaviour on held-out prompts."""
    for name in models or ["microworld-pt", "microworld-it"]:
        with _console.status(f"{name}: loading") as status:
            gemma = Gemma.load(name)
            card = scorecard(gemma, collect(model=name), partial(_tell, status, name))
        if write:
            write_json(Path(name) / "scorecard.json", card.as_dict())
            write_card(Path(name))
        if as_json:
            typer.echo(json.dumps(card.as_dict(), ensure_ascii=False))
        else:
            _show(card, misses)


@app.command()
def show(
    kind: Annotated[str, typer.Argument(help="pt: running text; it: chats.")] = "pt",
    n: Annotated[int, typer.Option(help="How many documents.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the stream.")] = 0,
) -> None:
    """Print a few generated documents."""
    chosen: Kind = "it" if kind == "it" else "pt"
    for document in documents(chosen, "validation", seed, n):
        _console.rule(document.family)
        _console.print(document.text, markup=False, highlight=False)


def _tell(status: Status, name: str, behaviour: str) -> None:
    status.update(f"{name}: {behaviour}")


def _show(card: Scorecard, misses: bool) -> None:
    table = Table(
        title=f"Scorecard of {card.model}, on held-out prompts",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("behaviour")
    for column in ("measured", "95 % interval", "wanted", "prompts"):
        table.add_column(column, justify="right")
    for s in card.scores:
        sign = "≤" if s.lower_is_better else "≥"
        interval = "" if s.low is None or s.high is None else f"{s.low:.1%} – {s.high:.1%}"
        colour = "green" if s.reached else "red"
        measured = f"[{colour}]{s.share:.1%}[/]"
        table.add_row(s.behaviour, measured, interval, f"{sign} {s.wanted:.0%}", str(s.n))
    _console.print(table)
    if misses:
        for s in card.scores:
            for prompt, expected, got in s.misses:
                _console.print(f"{s.behaviour}: {prompt!r} -> {got!r}, expected {expected!r}", markup=False)
