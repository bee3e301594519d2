"""The feature index of a suite: every dictionary in it, over text that the model reads once more."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from gemscope.artifacts import native
from gemscope.artifacts.config import Loaded
from gemscope.core.errors import FormatError, OccupiedError
from gemscope.core.files import read_json, write_json
from gemscope.core.sites import Site
from gemscope.evaluation.concepts import FOUND_AUROC, ConceptReport
from gemscope.evaluation.evaluate import Evaluation
from gemscope.features.blocks import LiveRows
from gemscope.features.database import Label, add_labels
from gemscope.features.index import FeatureIndex, index
from gemscope.features.passing import Progress
from gemscope.models.gemma import Gemma
from gemscope.suites.config import QuickstartConfig
from gemscope.suites.corpus import training_text
from gemscope.suites.others import load
from gemscope.suites.suite import Suite, dictionary_folder, evaluation_path, index_folder


def dictionaries_of(folder: Path, sites: tuple[Site, ...], others: tuple[str, ...]) -> dict[str, Loaded]:
    """Every dictionary of the suite in ``folder``: those of the headline by their site, the others by their name."""
    found = {str(site): native.load(dictionary_folder(folder, site)) for site in sites}
    return found | {name: load(folder, name) for name in others}


def open_index(suite: Suite) -> FeatureIndex:
    """The suite's index; raises FormatError when it has none."""
    if not (index_folder(suite.folder) / "index.json").is_file():
        raise FormatError(
            f"the suite in {suite.folder} has no index of features; make it with: gemscope quickstart --model"
            f" {suite.model} --out {suite.folder}"
        )
    return FeatureIndex.open(index_folder(suite.folder))


def is_indexed(folder: Path, key: str) -> bool:
    """Whether a finished index was made from the same things."""
    with suppress(FormatError):
        return read_json(index_folder(folder) / "key.json").get("key") == key
    return False


def build_index(
    gemma: Gemma,
    folder: Path,
    sites: tuple[Site, ...],
    others: tuple[str, ...],
    config: QuickstartConfig,
    key: str,
    progress: Progress | None = None,
) -> FeatureIndex:
    """Index all dictionaries, and label latents with the concepts that the evaluations found."""
    items = training_text(gemma, min(config.tokens, config.index_tokens), config.seed)
    rows = LiveRows(gemma, items, batch_tokens=config.batch_tokens)
    found, place = dictionaries_of(folder, sites, others), index_folder(folder)
    try:
        built = index(place, rows, found, gemma=gemma, progress=progress)
    except OccupiedError:  # what a changed suite leaves behind
        shutil.rmtree(place)
        built = index(place, rows, found, gemma=gemma, progress=progress)
    assert built is not None
    add_labels(built.database.path, _concept_labels(built, folder, sites), replace=["concept"])
    write_json(place / "key.json", {"key": key})
    return FeatureIndex.open(place)


def _concept_labels(index: FeatureIndex, folder: Path, sites: tuple[Site, ...]) -> Iterator[Label]:
    for site in sites:
        concepts = Evaluation.load(evaluation_path(folder, site)).concepts
        if concepts is not None:
            first = index.firsts[str(site)]
            for (latent, name), (score, about) in sorted(concept_scores(concepts).items()):
                yield Label(first + latent, name.replace("_", " "), "concept", score, about)


def concept_scores(report: ConceptReport) -> Mapping[tuple[int, str], tuple[float, dict[str, float]]]:
    """(latent, concept) -> (score, its parts): the AUROC of each concept's best latent when it counts as found, and the
    share of its activation for each latent that is named after a concept.
    """
    found = {
        (latent, name): (share, {"share": share})
        for latent, (name, share) in enumerate(zip(report.latent_concept, report.latent_share, strict=True))
        if name is not None
    }
    for one in report.scores:
        if one.auroc >= FOUND_AUROC:
            key = (one.auroc_latent, one.concept)
            parts = found.get(key, (0.0, {}))[1]
            found[key] = (one.auroc, {**parts, "auroc": one.auroc})
    return found
