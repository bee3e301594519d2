"""The table of measures, one line per dictionary, in 80 columns."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gemscope.artifacts.config import DictionaryConfig
from gemscope.cli.inputs import DEFAULT_MODEL
from gemscope.core.sites import Site
from gemscope.evaluation.compare import Comparison
from gemscope.evaluation.concepts import FOUND_AUROC, MIN_POSITIVES
from gemscope.evaluation.result import Evaluation
from gemscope.suites.suite import Suite

_COLUMNS = ("site", "L0", "FVU", "Δ loss", "recovered", "dead", "concepts", "passages")


def evaluations(measured: Sequence[Evaluation], target_l0: float | None) -> RenderableType:
    """The table and, under it, what its columns mean."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "site" else "right", no_wrap=True)
    for evaluation in measured:
        table.add_row(*_cells(evaluation))
    first = measured[0]
    target = "" if target_l0 is None else f" (target {target_l0:g})"
    notes = [
        f"L0         active latents per token{target}, over {first.fidelity.rows:,} held-out tokens",
        "FVU        fraction of variance unexplained: 0 is perfect, 1 is the mean",
        f"Δ loss     nats lost when spliced in, over {first.loss.predictions:,} predictions",
        "recovered  share of the loss of ablating the site to its mean",
    ]
    if first.concepts is not None:
        notes.append(
            f"concepts   with a latent of AUROC ≥ {FOUND_AUROC:g}, of those with ≥ {MIN_POSITIVES} held-out tokens"
        )
        notes.append("passages   the same for labels of whole passages: kinds of text, planted faults")
    return Group(table, Text(), *(Text(note, style="dim") for note in notes))


_PROBES = {
    "best": ("best latent", 1),
    "k=1": ("latents", 1),
    "k=16": ("latents", 16),
    "dense": ("dense", None),
    "tokens*": ("token statistics", None),
    "random*": ("random dictionary", 16),
    "PCA*": ("PCA", 16),
    "shuffled*": ("shuffled labels", 16),
}
"""Column -> method and k; controls with a star."""


def probes(measured: Sequence[Evaluation]) -> RenderableType:
    """Mean AUROC of the probes of each dictionary, beside their controls; nothing where there are none."""
    shown = [(one, one.probes) for one in measured if one.probes is not None and one.probes.concepts]
    if not shown:
        return Text()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("mean AUROC", no_wrap=True)
    for name in (*_PROBES, "absorb"):
        table.add_column(name, justify="right", no_wrap=True)
    for one, report in shown:
        values = [*(report.mean(*method) for method in _PROBES.values()), report.absorption]
        table.add_row(_short(one), *("–" if value is None else f"{value:.3f}" for value in values))
    report = shown[0][1]
    notes = (
        f"{len(report.concepts)} labels, fitted on {report.train_rows:,} tokens, scored on {report.test_rows:,} others",
        "best: single latent; *: controls, random, PCA and shuffled with k = 16. absorb: share of tokens",
        "at which its latents are silent and another stands in. Everything else: --json or --out",
    )
    return Group(Text(), table, Text(), *(Text(note, style="dim") for note in notes))


def first_letters(measured: Sequence[Evaluation]) -> RenderableType:
    """Splitting and absorption of first letters; nothing where they were not measured."""
    shown = [(one, one.first_letters) for one in measured if one.first_letters is not None]
    if not shown:
        return Text()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("first letters", no_wrap=True)
    for name in ("letters", "latents each", "absorbed", "partly"):
        table.add_column(name, justify="right", no_wrap=True)
    for one, found in shown:
        values = (found.splits, found.full, found.partial)
        table.add_row(_short(one), str(len(found.letters)), *("–" if v is None else f"{v:.3f}" for v in values))
    note = f"{shown[0][1].words:,} words of the vocabulary; letters that the model does not know are left out"
    return Group(Text(), table, Text(), Text(note, style="dim"))


def comparison(found: Comparison) -> RenderableType:
    """Both dictionaries, figure by figure, where the difference is, and the verdict."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("figure", "where", "first", "second", "difference", "95 % interval", "better"):
        table.add_column(name, justify="left" if name in ("figure", "where", "better") else "right", no_wrap=True)
    lines = [*found.differences, *([] if found.concepts is None else [found.concepts])]
    for one in lines:
        interval = "–" if one.interval is None else f"{one.interval[0]:+.4f} {one.interval[1]:+.4f}"
        numbers = (f"{one.first:.4f}", f"{one.second:.4f}", f"{one.difference:+.4f}", interval)
        table.add_row(one.figure.replace("_", " "), one.where, *numbers, one.better or "")
    names = Text(
        f"first: {found.first}\nsecond: {found.second}\n{found.documents} documents, drawn in pairs", style="dim"
    )
    return Group(Text(found.verdict, style="bold"), Text(), table, names)


def other_kinds(found: Sequence[DictionaryConfig]) -> RenderableType:
    """One line for each dictionary of another kind, with the measures in its config."""
    if not found:
        return Text()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("also trained", "reads", "writes", "L0", "FVU", "Δ loss", "recovered"):
        table.add_column(name, justify="left" if name in ("also trained", "reads", "writes") else "right", no_wrap=True)
    for config in found:
        measured = config.extra["evaluation"]
        loss = measured["loss"]
        share = loss["recovered_mean"]
        table.add_row(
            config.kind.replace("_", " "),
            _places(config.reads),
            _places(config.writes),
            f"{measured['l0']:.1f}",
            f"{measured['fvu']:.4f}",
            f"{loss['delta_loss']:.4f}",
            "–" if share is None else f"{100 * share:.1f}%",
        )
    return Group(Text(), table)


def _places(sites: Sequence[Site]) -> str:
    if len(sites) == 1:
        return str(sites[0])
    layers = [str(site.layer) for site in sites]
    return f"{sites[0].name}.{layers[0]}…{layers[-1]}"


def next_steps(suite: Suite, model: str, folder: Path | None, *, chat: bool) -> RenderableType:
    """What to do with a fresh suite; ``chat`` says whether the model is instruction-tuned."""
    where = f" --suite {folder}" if folder is not None else "" if model == DEFAULT_MODEL else f" --model {model}"
    commands = [
        f'look{where} "The capital of France is Paris."',
        *([f'look{where} --chat "What is the capital of Japan?"'] if chat else []),
        f'find{where} --text "The capital of France is Paris."',
        f"feature{where} {suite.sites[len(suite.sites) // 2]}/0",
    ]
    lines = [f"The suite is in {suite.folder}. Look at a text through it:", ""]
    lines += [f"  gemscope {command}" for command in commands]
    return Group(Text(), *(Text(line) for line in lines))


def _short(evaluation: Evaluation) -> str:
    """Its name, or the site, in 15 columns."""
    name = evaluation.name or str(evaluation.site)
    return name if len(name) <= 15 else name[:14] + "…"


def _cells(evaluation: Evaluation) -> list[str]:
    fidelity, loss, concepts = evaluation.fidelity, evaluation.loss, evaluation.concepts
    recovered = loss.recovered_mean
    return [
        _short(evaluation),
        f"{fidelity.l0:.1f}",
        f"{fidelity.fvu:.4f}",
        f"{loss.delta_loss:.4f}",
        "–" if recovered is None else f"{100 * recovered:.1f}%",
        f"{fidelity.dead}/{evaluation.d_sae}",
        *(
            ("–", "–")
            if concepts is None
            else ("/".join(map(str, n)) for n in (concepts.found, concepts.found_passages))
        ),
    ]
