"""The command line. Everything heavy is imported inside the commands, so that ``--help`` answers at once.

A mistake of the user is one sentence on standard error and exit code 2; Ctrl-C is exit code 130; a closed
pipe is silent.
"""

import errno
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from gemscope import __version__
from gemscope.cli import artifacts, benchmark, catalogue, features, indexing, lens, store
from gemscope.cli.evaluate import compare, evaluate
from gemscope.cli.train import train
from gemscope.core.errors import GemscopeError

if TYPE_CHECKING:
    from gemscope.suites.reading import Reading

_STOPPED = "stopped; what was finished is kept, run the same command again to go on."


class _Commands(TyperGroup):
    """Turns what a command may end with into a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GemscopeError as error:
            raise _ended(str(error), error.exit_code) from None
        except KeyboardInterrupt:
            raise _ended(_STOPPED, 130) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            where = error.filename or "standard output"
            raise _ended(f"cannot use {where} ({error.strerror or error}); give another place.", 2) from None


def _ended(sentence: str, code: int) -> typer.Exit:
    print(f"gemscope: {sentence}", file=sys.stderr)
    return typer.Exit(code)


app = typer.Typer(
    cls=_Commands,
    help="gemscope: an open microscope for the Gemma 3 family.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

store.register(app)

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Built-in name, model folder or hub id.", show_default="microworld-it"),
]
SuiteFolder = Annotated[
    Path | None, typer.Option("--suite", "-s", help="Folder of a suite.", show_default="suites/MODEL")
]
Layer = Annotated[int | None, typer.Option("--layer", "-l", help="Layer to read.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(wanted: bool) -> bool:
    if wanted:
        print(f"gemscope {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    model: Model = None,
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to build in.", show_default="suites/MODEL")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to harvest.", min=1)] = None,
    heldout: Annotated[int | None, typer.Option(help="Held-out tokens to measure on.", min=1)] = None,
    latents: Annotated[int | None, typer.Option(help="Latents per dictionary.", min=1)] = None,
    l0: Annotated[float | None, typer.Option(help="Active latents per token to aim for.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Of texts, first weights and order.", min=0)] = None,
) -> None:
    """Harvest, train and evaluate: one dictionary per layer, from nothing, in minutes.

    What is finished is kept: run it again to go on after a stop.
    """
    from dataclasses import replace

    from gemscope.cli.inputs import DEFAULT_MODEL
    from gemscope.cli.tables import evaluations, next_steps, other_kinds
    from gemscope.cli.terminal import StageBars, out
    from gemscope.suites.config import QuickstartConfig
    from gemscope.suites.quickstart import quickstart as build
    from gemscope.suites.suite import default_folder

    name = model or DEFAULT_MODEL
    given = {
        "tokens": tokens,
        "heldout_tokens": heldout,
        "d_sae": latents,
        "target_l0": l0,
        "steps": steps,
        "seed": seed,
    }
    config = replace(QuickstartConfig(), **{key: value for key, value in given.items() if value is not None})
    with StageBars() as bars:
        suite = build(name, folder or default_folder(name), config, report=bars)
    console = out()
    console.print()
    console.print(evaluations([suite.evaluation(site) for site in suite.sites], config.target_l0))
    console.print(other_kinds([suite.other(name).config for name in suite.others]))
    console.print(next_steps(suite, name, folder, chat=suite.about["chat"]), soft_wrap=True)


@app.command()
def look(
    text: Annotated[
        str | None, typer.Argument(help="The text; standard input when absent or '-'.", show_default=False)
    ] = None,
    layer: Layer = None,
    suite: SuiteFolder = None,
    model: Model = None,
    top: Annotated[int, typer.Option("--top", "-k", help="Latents per token.", min=1)] = 3,
    chat: Annotated[
        bool, typer.Option("--chat", help="Take the text as a user's turn and read the answer too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a layer's latents see in a text, token by token."""
    from gemscope.cli.inputs import open_suite, read_text

    words = read_text(text)
    opened = open_suite(model, suite)
    from gemscope.models.gemma import Gemma
    from gemscope.suites.reading import read, read_chat

    gemma = Gemma.load(model or opened.model, revision=None if model else opened.revision)
    function = read_chat if chat else read
    _show(function(gemma, opened, words, layer=layer, top=top), as_json)


def _show(reading: "Reading", as_json: bool) -> None:
    from gemscope.cli import look as view
    from gemscope.cli.terminal import out

    console = out()
    if as_json:
        print(json.dumps(reading.as_dict(), ensure_ascii=False, indent=2))
    else:
        console.print(view.reading(reading, console.width), soft_wrap=False)


lens.register(app)
artifacts.register(app)
benchmark.register(app)
indexing.register(app)
features.register(app)
app.command()(train)
app.command()(evaluate)
app.command()(compare)


@app.command()
def models() -> None:
    """List the models: built in, known, and which are on this machine."""
    from gemscope.cli.models import table
    from gemscope.cli.terminal import out

    out().print(table())


@app.command()
def doctor() -> None:
    """Check this installation: versions, devices, disk, models, and what is missing."""
    from gemscope.cli.doctor import report
    from gemscope.cli.terminal import out

    out().print(report())


app.command("list")(catalogue.list_)
app.command()(catalogue.fetch)


def main() -> None:
    """The program ``gemscope``."""
    try:
        app()
    except KeyboardInterrupt:
        print(f"gemscope: {_STOPPED}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
