"""Measure one dictionary folder, in a suite or not, on held-out text."""

from pathlib import Path

from gemscope.artifacts import formats
from gemscope.core.errors import InputError
from gemscope.dictionaries.sae import SAE
from gemscope.evaluation.evaluate import Evaluation, evaluate
from gemscope.evaluation.verify import verify
from gemscope.models.gemma import Gemma
from gemscope.suites.config import QuickstartConfig
from gemscope.suites.corpus import heldout_text
from gemscope.suites.quickstart import Report, StageProgress

_CHECKED = 40
"""Documents on which it is checked that a dictionary belongs to its site."""


def evaluate_folder(
    folder: Path | str,
    model: str | None = None,
    config: QuickstartConfig | None = None,
    report: Report | None = None,
    *,
    verified: bool = True,
) -> Evaluation:
    """Evaluate the SAE in ``folder``, in any format, with the text of the quickstart; ``model`` is its own unless
    another is given.

    With ``verified`` it is first measured that it belongs to its site. Raises FormatError when the folder holds no
    dictionary, InputError when it holds another kind, PairingError when it does not belong, and the errors of loading a
    model.
    """
    loaded = formats.load(folder)
    dictionary, about = loaded.dictionary, loaded.config
    if not isinstance(dictionary, SAE):
        raise InputError(f"{folder} holds a {about.kind}, and only SAEs are evaluated; see it with gemscope inspect.")
    config = config or QuickstartConfig()
    gemma = Gemma.load(model or about.model, revision=None if model else about.revision)
    text = heldout_text(gemma, config.heldout_tokens, config.seed)
    dictionary = dictionary.to(gemma.device)
    if verified:
        verify(gemma, loaded, text.items[:_CHECKED])
    return evaluate(
        gemma,
        dictionary,
        about.site,
        text.items,
        text.labels,
        splice_tokens=config.splice_tokens,
        batch_tokens=config.batch_tokens,
        progress=lambda done, total: report(StageProgress("evaluate", done, total, "tokens")) if report else None,
        about={"dictionary": str(folder)},
    )
