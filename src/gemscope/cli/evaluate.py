"""``gemscope evaluate`` and ``gemscope compare``: the measures of dictionaries, and which of two is better."""

import json
from pathlib import Path
from typing import Annotated

import typer

Folders = Annotated[
    list[Path] | None, typer.Argument(help="Folders of dictionaries, to measure them now.", show_default=False)
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Built-in name, model folder or hub id.", show_default="microworld-it"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Measure a folder even if it does not fit its site.")]
Text = Annotated[
    Path | None,
    typer.Option("--text", help="JSONL of documents with labelled spans.", show_default="the microworld's"),
]
Fast = Annotated[bool, typer.Option("--fast", help="Fidelity and concepts only: no probes, no controls.")]


def evaluate(
    dictionaries: Folders = None,
    suite: Annotated[
        Path | None, typer.Option("--suite", "-s", help="Folder of a suite.", show_default="suites/MODEL")
    ] = None,
    layer: Annotated[int | None, typer.Option("--layer", "-l", help="Layer to read.", min=0)] = None,
    model: Model = None,
    text: Text = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for JSON, SAEBench JSON and the page.", show_default=False),
    ] = None,
    fast: Fast = False,
    random_model: Annotated[
        bool, typer.Option(help="Also probe the model with random weights; takes its memory again.")
    ] = True,
    first_letters: Annotated[
        bool, typer.Option("--first-letters", help="Also absorption of first letters, on words of the vocabulary.")
    ] = False,
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> None:
    """Measure dictionaries on held-out text: L0, FVU, delta loss, KL, concepts, probes with their controls.

    Without folders: the measures of a suite's dictionaries.
    """
    from gemscope.cli import tables
    from gemscope.cli.inputs import open_suite
    from gemscope.cli.terminal import StageBars, err
    from gemscope.cli.terminal import out as console
    from gemscope.evaluation.page import write
    from gemscope.suites.measure import evaluate_folders

    target = None
    if dictionaries:
        with StageBars() as bars:
            measured = evaluate_folders(
                dictionaries,
                model=model,
                report=bars,
                text=text,
                full=not fast,
                random_model=random_model,
                first_letters=first_letters,
                verified=not no_verify,
            )
    else:
        opened = open_suite(model, suite)
        sites = opened.sites if layer is None else [opened.site(layer)]
        measured = tuple(opened.evaluation(site) for site in sites)
        target = opened.about["config"]["target_l0"]
    if out is not None:
        written = write(out, measured)
        err().print(f"written to {out}: {', '.join(written)}", soft_wrap=True)
    if as_json:
        print(json.dumps([one.as_dict() for one in measured], ensure_ascii=False, indent=2))
    else:
        console().print(tables.evaluations(measured, target))
        console().print(tables.probes(measured))
        console().print(tables.first_letters(measured))


def compare(
    first: Annotated[Path, typer.Argument(help="A dictionary's folder, or its evaluation as JSON.")],
    second: Annotated[Path, typer.Argument(help="Another one, measured on the same text.")],
    model: Model = None,
    text: Text = None,
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> None:
    """Say whether a dictionary is better than another, and where: a paired bootstrap over documents."""
    from gemscope.cli import tables
    from gemscope.cli.terminal import StageBars
    from gemscope.cli.terminal import out as console
    from gemscope.evaluation.compare import compare as judge
    from gemscope.evaluation.result import Evaluation
    from gemscope.suites.measure import evaluate_folders

    folders = [path for path in (first, second) if path.is_dir()]
    if folders:
        with StageBars() as bars:
            measured = list(
                evaluate_folders(folders, model=model, report=bars, text=text, full=False, verified=not no_verify)
            )
    else:
        measured = list[Evaluation]()
    pair = [measured.pop(0) if path.is_dir() else Evaluation.load(path) for path in (first, second)]
    found = judge(pair[0], pair[1])
    if as_json:
        print(json.dumps(found.as_dict(), ensure_ascii=False, indent=2))
    else:
        console().print(tables.comparison(found))
