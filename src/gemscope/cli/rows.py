"""The activations that a command is given: a store, here or at a URL, a small set, or a model to run while training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemscope.activations.contexts import LiveContexts
    from gemscope.activations.sets import ActivationSet
    from gemscope.activations.store import Store
    from gemscope.activations.streaming import LiveActivations
    from gemscope.core.sites import Site


@dataclass(frozen=True)
class Rows:
    """Rows of activations, and whose they are."""

    data: "ActivationSet | Store | LiveActivations | LiveContexts"
    model: str
    revision: str | None

    @property
    def widths(self) -> "Mapping[Site, int]":
        """Width of every site."""
        return {site: self.data.width(site) for site in self.data.sites}


def open_rows(where: str) -> Rows:
    """A store's folder or URL, or the folder of a set; raises FormatError for anything else."""
    from gemscope.activations.sets import FORMAT, ActivationSet
    from gemscope.activations.store import Store
    from gemscope.core.files import read_json

    manifest = Path(where) / "manifest.json"
    found: Any = read_json(manifest) if "://" not in where and manifest.is_file() else {}
    if isinstance(found, Mapping) and found.get("format") == FORMAT:  # pyright: ignore[reportUnknownMemberType]
        data = ActivationSet.load(where)
        return Rows(data, str(data.about.get("model", "unknown")), data.about.get("revision"))
    store = Store.open(where)
    return Rows(store, str(store.plan.config["model"]), store.plan.config["revision"])


def live_rows(model: str, sites: "Sequence[Site]", texts: list[str], tokens: int, out: Path, seed: int = 0) -> Rows:
    """The same computed while it is wanted, nothing stored; ``texts`` as for a harvest."""
    from gemscope.activations.plan import HarvestConfig
    from gemscope.activations.streaming import LiveActivations
    from gemscope.cli.store import text_source
    from gemscope.models.gemma import Gemma

    gemma = Gemma.load(model)
    source = text_source(gemma, texts, out, seed=seed)
    config = HarvestConfig(sites=tuple(map(str, sites)), tokens=tokens, seed=seed)
    return Rows(LiveActivations.of(gemma, source, config), gemma.name, gemma.revision)


def sites_of_model(model: str) -> "list[Site]":
    """What can be read live of each layer; the sites that Gemma Scope 2 has dictionaries of."""
    from gemscope.models.gemma import Gemma

    gemma = Gemma.load(model)
    return [site for name in ("resid_post", "mlp_in", "mlp_out", "z") for site in gemma.every_layer(name)]
