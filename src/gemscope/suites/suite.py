"""A suite: one folder with everything that was learned about one model.

suite.json                what it holds; written last, so that its presence means the suite is whole
activations/              the harvested rows (gemscope.activations.sets)
dictionaries/<site>/      one dictionary, native format
evaluation/<site>.json    its measures on held-out text
others/<name>/            one dictionary of each other kind, with its measures in its config
index/                    the evidence for every latent of all of them (gemscope.features)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemscope.artifacts import native
from gemscope.artifacts.config import Loaded
from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import read_json, write_json
from gemscope.core.sites import Site
from gemscope.dictionaries.sae import SAE
from gemscope.evaluation.result import Evaluation

FORMAT = "gemscope.suite"
VERSION = 1


def default_folder(model: str) -> Path:
    """Where a model's suite is kept by default: ./suites/ and the last part of the model's name."""
    return Path("suites") / Path(model).name


def activations_folder(folder: Path) -> Path:
    """The harvested rows of the suite in ``folder``."""
    return folder / "activations"


def dictionary_folder(folder: Path, site: Site) -> Path:
    """One dictionary of the suite in ``folder``."""
    return folder / "dictionaries" / str(site)


def evaluation_path(folder: Path, site: Site) -> Path:
    """The measures of one dictionary of the suite in ``folder``."""
    return folder / "evaluation" / f"{site}.json"


def index_folder(folder: Path) -> Path:
    """The feature index of the suite in ``folder``."""
    return folder / "index"


@dataclass(frozen=True)
class Suite:
    """An opened suite; dictionaries and evaluations are read when asked for."""

    folder: Path
    model: str
    """The name or folder that ``Gemma.load`` takes."""
    revision: str | None
    sites: tuple[Site, ...]
    """The sites that have a dictionary, in the order of a forward pass."""
    about: dict[str, Any]
    """The configuration it was built with, the hash of the model's weights, provenance."""
    others: tuple[str, ...] = ()
    """Names of the dictionaries of other kinds."""

    def save(self) -> None:
        """Write suite.json."""
        value = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "revision": self.revision,
            "sites": [str(site) for site in self.sites],
            "others": list(self.others),
            "about": self.about,
        }
        write_json(self.folder / "suite.json", value)

    @classmethod
    def open(cls, folder: Path | str) -> "Suite":
        """Read suite.json; raises FormatError when there is no whole suite in ``folder``, with the remedy."""
        folder = Path(folder)
        if not (folder / "suite.json").is_file():
            raise FormatError(
                f"there is no finished suite in {folder}; run 'gemscope quickstart --out {folder}' first."
            )
        value = read_json(folder / "suite.json")
        if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
            raise FormatError(f"{folder / 'suite.json'} is no {FORMAT} of version {VERSION}; run quickstart again.")
        try:
            sites = tuple(Site.parse(name) for name in value["sites"])
            return cls(folder, value["model"], value["revision"], sites, value["about"], tuple(value.get("others", [])))
        except (KeyError, TypeError) as error:
            raise FormatError(f"{folder / 'suite.json'} lacks a part ({error}); run quickstart again.") from error

    def site(self, layer: int) -> Site:
        """The suite's site at a layer; raises InputError with the layers there are."""
        for site in self.sites:
            if site.layer == layer:
                return site
        layers = ", ".join(str(site.layer) for site in self.sites)
        raise InputError(f"the suite in {self.folder} has no dictionary at layer {layer}; its layers are {layers}.")

    def dictionary(self, site: Site) -> SAE:
        """The dictionary at a site; raises FormatError when its files are damaged or hold another kind."""
        return native.load_sae(dictionary_folder(self.folder, site))

    def other(self, name: str) -> Loaded:
        """A dictionary of another kind; raises InputError with the names there are, FormatError when it is damaged."""
        if name not in self.others:
            known = ", ".join(self.others) or "none"
            raise InputError(f"the suite in {self.folder} has no dictionary {name!r}; its others are {known}.")
        return native.load(self.folder / "others" / name)

    def evaluation(self, site: Site) -> Evaluation:
        """The measures of the dictionary at a site; raises FormatError when it is missing or damaged."""
        return Evaluation.load(evaluation_path(self.folder, site))

    def best_site(self) -> Site:
        """The site whose dictionary finds the most concepts; by the lowest FVU where none were labelled."""

        def rank(site: Site) -> tuple[int, float]:
            evaluation = self.evaluation(site)
            found = 0 if evaluation.concepts is None else evaluation.concepts.found[0]
            return found, -evaluation.fidelity.fvu

        return max(self.sites, key=rank)
