"""Activations in memory, one row per token position, the same rows for every site.

- a set is a value: it is saved as one folder that is whole or not there, and read back as it was;
- each row remembers its document, its position and its token, so that text can be found again;
- one permutation, a function of seed and epoch only, is shared by all sites: the dictionaries of several
  layers, or the two ends of a transcoder, see the same tokens in the same batch.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import atomic_folder, read_json, read_tensors, write_json, write_tensors
from gemscope.core.sites import Site

FORMAT = "gemscope.activations"
VERSION = 1


@dataclass(frozen=True)
class ActivationSet:
    """Rows of activations at one or more sites."""

    data: Mapping[Site, Float[Tensor, "rows _"]]
    """Site -> activations [rows, width], bf16 or fp32."""
    doc: Int[Tensor, "rows"]
    """Which document a row comes from: its place in what was harvested, from 0."""
    pos: Int[Tensor, "rows"]
    """Position in the document's tokens, its <bos> being 0."""
    token: Int[Tensor, "rows"]
    """Token id at that position."""
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How the rows were made: model, rule for leaving positions out, provenance. Written to the manifest as
    it is.
    """

    @property
    def sites(self) -> list[Site]:
        """The sites, in the order of a forward pass."""
        return sorted(self.data, key=lambda site: site.order)

    @property
    def rows(self) -> int:
        """Number of token positions."""
        return len(self.doc)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, site: Site | str) -> Float[Tensor, "rows _"]:
        return self.data[self.check_site(site)]

    def check_site(self, site: Site | str) -> Site:
        """The site as a value; raises InputError when it was not captured."""
        site = Site.parse(site)
        if site not in self.data:
            raise InputError(f"no activations of {site} here; there are {', '.join(map(str, self.sites))}.")
        return site

    def select(self, keep: Bool[Tensor, "rows"] | Int[Tensor, "kept"]) -> "ActivationSet":
        """The rows of a mask, or of indices in their order, as a new set."""
        return ActivationSet(
            data={site: x[keep] for site, x in self.data.items()},
            doc=self.doc[keep],
            pos=self.pos[keep],
            token=self.token[keep],
            about=self.about,
        )

    def split(self, held_out: float, seed: int = 0) -> tuple["ActivationSet", "ActivationSet"]:
        """(training rows, held-out rows), by document: no document has rows in both.

        A document's side is a hash of its number and the seed, so that it stays where it is when documents
        are added; of few documents a side may get none. Raises InputError unless 0 < held_out < 1.
        """
        if not 0 < held_out < 1:
            raise InputError(f"held-out share {held_out} is outside (0, 1); use for example 0.1.")
        documents, which = torch.unique(self.doc, return_inverse=True)
        out = torch.tensor([document_share(seed, int(doc)) < held_out for doc in documents], dtype=torch.bool)[which]
        return self.select(~out), self.select(out)

    def width(self, site: Site | str) -> int:
        """Width of a site's activations."""
        return self[site].shape[1]

    def batches(
        self, sites: Sequence[Site], batch_size: int, seed: int = 0, epoch: int = 0
    ) -> Iterator[dict[Site, Float[Tensor, "batch _"]]]:
        """Every row once, shuffled: [batch_size, width] per site in the stored number type, the last batch
        smaller.

        The order is a function of seed and epoch. Raises InputError for a batch size below 1 or a site not
        captured.
        """
        if batch_size < 1:
            raise InputError(f"batch size {batch_size} is below 1; use for example 2048.")
        arrays = {site: self[site] for site in sites}
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(self.rows))
        for rows in order.split(batch_size):
            yield {site: x[rows] for site, x in arrays.items()}

    def save(self, folder: Path | str) -> None:
        """Write one safetensors file per site, rows.safetensors and manifest.json; the folder appears only
        when whole.
        """
        with atomic_folder(folder) as temporary:
            for site, x in self.data.items():
                write_tensors(temporary / f"{site}.safetensors", {"acts": x})
            write_tensors(temporary / "rows.safetensors", {"doc": self.doc, "pos": self.pos, "token": self.token})
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "rows": self.rows,
                "sites": {str(site): self.width(site) for site in self.sites},
                "about": dict(self.about),
            }
            write_json(temporary / "manifest.json", manifest)

    @classmethod
    def load(cls, folder: Path | str) -> "ActivationSet":
        """Read what ``save`` wrote; raises FormatError when a file is missing, damaged or of another kind."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        rows = read_tensors(folder / "rows.safetensors")
        if any(name not in rows or rows[name].shape != (manifest["rows"],) for name in ("doc", "pos", "token")):
            raise FormatError(f"{folder}/rows.safetensors does not describe {manifest['rows']} rows; harvest it again.")
        data: dict[Site, Tensor] = {}
        for name, width in manifest["sites"].items():
            path = folder / f"{name}.safetensors"
            x = read_tensors(path).get("acts")
            if x is None or x.shape != (manifest["rows"], width):
                raise FormatError(f"{path} does not hold {manifest['rows']} rows of width {width}; harvest it again.")
            data[Site.parse(name)] = x
        return cls(data, rows["doc"], rows["pos"], rows["token"], manifest["about"])


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest of a saved set, without its arrays; raises FormatError when there is none."""
    manifest = read_json(Path(folder) / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise FormatError(f"{folder} holds no {FORMAT} of version {VERSION}; harvest it again.")
    return manifest


def document_share(seed: int, doc: int) -> float:
    """A fixed number in [0, 1) for a document: on which side of a split it falls, in sets, stores and streams alike."""
    digest = hashlib.blake2b(f"{seed}:{doc}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
