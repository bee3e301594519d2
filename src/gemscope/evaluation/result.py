"""Everything that is measured of one dictionary, as one value that reads back."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemscope.core.errors import FormatError
from gemscope.core.files import read_json, write_json
from gemscope.core.sites import Site
from gemscope.core.values import revived
from gemscope.evaluation.concepts import ConceptReport
from gemscope.evaluation.controls import Control
from gemscope.evaluation.fidelity import Fidelity
from gemscope.evaluation.first_letter import FirstLetters
from gemscope.evaluation.geometry import Geometry
from gemscope.evaluation.probes import ProbeReport
from gemscope.evaluation.splice import SpliceLoss

FORMAT = "gemscope.evaluation"
VERSION = 2


@dataclass(frozen=True)
class Evaluation:
    """How good one dictionary is; every part says over how many tokens it was measured."""

    model: str
    site: Site
    """The first place that it reads."""
    d_sae: int
    fidelity: Fidelity
    loss: SpliceLoss
    concepts: ConceptReport | None
    """None when the documents had no labels."""
    about: Mapping[str, Any]
    """Positions left out, documents, provenance, and what the caller added."""
    name: str = ""
    kind: str = "sae"
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    architecture: str = ""
    """Its activation."""
    geometry: Geometry | None = None
    controls: tuple[Control, ...] = ()
    """Fidelity of a random dictionary and of PCA, at equal L0."""
    probes: ProbeReport | None = None
    """None when they were not asked for."""
    first_letters: FirstLetters | None = None
    """None when they were not asked for."""
    intervals: Mapping[str, tuple[float, float] | None] = field(default_factory=dict[str, tuple[float, float] | None])
    """The central 95 % of each headline figure when documents are drawn anew."""
    documents: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    """Sums per document, what ``compare`` draws from; ``delta@user`` is that of a group."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        own = {
            "site": str(self.site),
            "fidelity": self.fidelity.as_dict(),
            "loss": self.loss.as_dict(),
            "concepts": None if self.concepts is None else self.concepts.as_dict(),
            "probes": None if self.probes is None else self.probes.as_dict(),
            "about": dict(self.about),
        }
        return {"format": FORMAT, "version": VERSION, **asdict(self), **own}

    def save(self, path: Path | str) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, self.as_dict())

    @classmethod
    def load(cls, path: Path | str) -> "Evaluation":
        """Read what ``save`` wrote; raises FormatError for anything else."""
        return cls.of(read_json(path), str(path))

    @classmethod
    def of(cls, value: Any, where: str) -> "Evaluation":
        """From plain JSON values; raises FormatError, naming ``where`` they come from."""
        if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
            raise FormatError(f"{where} is no {FORMAT} of version {VERSION}; evaluate the dictionary again.")
        try:
            return revived(cls, value)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{where} lacks a part ({error}); evaluate the dictionary again.") from error
