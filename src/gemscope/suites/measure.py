"""Measure one dictionary folder, in a suite or not, on held-out text."""

from pathlib import Path

from gemscope.artifacts import native
from gemscope.evaluation.evaluate import Evaluation, evaluate
from gemscope.models.gemma import Gemma
from gemscope.suites.config import QuickstartConfig
from gemscope.suites.corpus import heldout_text
from gemscope.suites.quickstart import Report, StageProgress


def evaluate_folder(
    folder: Path | str,
    model: str | None = None,
    config: QuickstartConfig | None = None,
    report: Report | None = None,
) -> Evaluation:
    """Evaluate the dictionary in ``folder`` with the text of the quickstart; ``model`` is its own unless
    another is given.

    Raises FormatError when the folder holds no dictionary, and the errors of loading a model.
    """
    dictionary, about = native.load_sae(folder), native.read_config(folder)
    config = config or QuickstartConfig()
    gemma = Gemma.load(model or about.model, revision=None if model else about.revision)
    text = heldout_text(gemma, config.heldout_tokens, config.seed)
    return evaluate(
        gemma,
        dictionary.to(gemma.device),
        about.site,
        text.items,
        text.labels,
        splice_tokens=config.splice_tokens,
        batch_tokens=config.batch_tokens,
        progress=lambda done, total: report(StageProgress("evaluate", done, total, "tokens")) if report else None,
        about={"dictionary": str(folder)},
    )
