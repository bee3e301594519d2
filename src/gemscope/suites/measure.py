"""Measure dictionary folders, in a suite or not, on held-out text: all of them in one pass of the model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gemscope.artifacts import formats
from gemscope.artifacts.config import Loaded
from gemscope.core.errors import InputError
from gemscope.core.progress import Report, StageProgress
from gemscope.evaluation.evaluate import evaluate
from gemscope.evaluation.labelled import from_jsonl
from gemscope.evaluation.result import Evaluation
from gemscope.evaluation.subject import Subject
from gemscope.evaluation.tasks import rule_labels
from gemscope.evaluation.verify import verify
from gemscope.models.gemma import Gemma
from gemscope.suites.config import QuickstartConfig
from gemscope.suites.corpus import heldout_text
from gemscope.suites.quickstart import evaluate_config

_CHECKED = 40
"""Documents on which it is checked that a dictionary belongs to its site."""


def evaluate_folders(
    folders: Sequence[Path | str],
    model: str | None = None,
    config: QuickstartConfig | None = None,
    report: Report | None = None,
    *,
    text: Path | str | None = None,
    full: bool = True,
    random_model: bool = True,
    first_letters: bool = False,
    verified: bool = True,
) -> tuple[Evaluation, ...]:
    """Evaluate the dictionaries in ``folders``, of any kind and format; ``model`` is theirs unless another is given.

    ``text`` is a JSONL file of documents with labelled spans, by default the text of the quickstart; ``full`` adds
    probes and controls to the fidelity, ``first_letters`` the splitting and absorption of first letters. With
    ``verified`` it is first measured that each belongs to its site. Raises FormatError when a folder holds no
    dictionary, InputError when they are of several models, PairingError when one does not belong, and the errors of
    loading a model.
    """
    loaded = [formats.load(folder) for folder in folders]
    gemma = _model(loaded, model)
    config = config or QuickstartConfig()
    if text is None:
        held = heldout_text(gemma, config.heldout_tokens, config.seed)
        items, labels = held.items, held.labels
    else:
        items, labels = from_jsonl(gemma, text)
    if verified:
        for one in loaded:
            verify(gemma, one, items[:_CHECKED])
    names = _names([Path(folder) for folder in folders])
    subjects = [Subject.of(name, one, gemma) for name, one in zip(names, loaded, strict=True)]
    measured = evaluate(
        gemma,
        subjects,
        items,
        labels if labels.names else None,
        replace(evaluate_config(config, full=full), random_model=full and random_model, first_letters=first_letters),
        tasks=rule_labels(items) if full else None,
        progress=lambda done, total: report(StageProgress("evaluate", done, total, "tokens")) if report else None,
        about={"text": "microworld" if text is None else str(text), "tokens": sum(len(item.ids) for item in items)},
    )
    return tuple(
        replace(one, about={**one.about, "dictionary": str(folder), "format": read.format})
        for one, folder, read in zip(measured, folders, loaded, strict=True)
    )


def _model(loaded: Sequence[Loaded], model: str | None) -> Gemma:
    named = {(one.config.model, one.config.revision) for one in loaded}
    if model is not None:
        return Gemma.load(model)
    if len(named) > 1:
        names = ", ".join(sorted(name for name, _ in named))
        raise InputError(
            f"these dictionaries are of several models ({names}); give one with --model, or one at a time."
        )
    name, revision = named.pop()
    return Gemma.load(name, revision=revision)


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many more as it takes to tell them apart."""
    resolved = [folder.resolve() for folder in folders]
    for depth in range(1, 1 + max(len(path.parts) for path in resolved)):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({i})" for i, path in enumerate(resolved, 1)]
