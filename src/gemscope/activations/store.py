"""A store that was harvested before, open for reading; several processes and threads may read it at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gemscope.activations.finishing import read_record
from gemscope.activations.order import Position, Reading
from gemscope.activations.places import Folder, Place, place_of
from gemscope.activations.plan import FORMAT, VERSION, Plan
from gemscope.activations.planned import PlannedRows
from gemscope.activations.pools import Contents, Shard, unpacked_bits
from gemscope.activations.reading import StoreReader
from gemscope.activations.sets import document_share
from gemscope.activations.shards import ITEM_BYTES, FileRecord, acts_header, check_size
from gemscope.activations.statistics import SiteStatistics
from gemscope.activations.stream import Origin, Stream
from gemscope.activations.units import TORCH_DTYPE, acts_name, record_name, rows_name
from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import read_json, read_tensors
from gemscope.core.sites import Site

_POOL_BYTES = 512 << 20
"""A pool of all wanted sites takes at most this, unless it is asked for otherwise."""


@dataclass(frozen=True, eq=False)
class Store(PlannedRows):
    """Rows of activations on disk. Make one with ``Store.open``."""

    place: Place
    plan: Plan
    shards: tuple[Shard, ...]
    """Those with at least one row."""
    manifest: Mapping[str, Any]
    """As written; only ``plan`` and ``units`` while the harvest is not finished."""
    keep: tuple[npt.NDArray[np.uint8], ...] | None = None
    """For each shard one bit a row, set where the row belongs to this side of a split; None: all."""

    @classmethod
    def open(
        cls,
        where: Path | str,
        *,
        cache: Path | str | None = None,
        cache_bytes: int | None = None,
        options: Mapping[str, Any] | None = None,
        partial: bool = False,
    ) -> "Store":
        """A folder, or a URL that fsspec reads (extra ``remote``), whose shards are then brought to ``cache``.

        ``partial`` reads the units that are there of a harvest that is not finished. Raises FormatError when there
        is no store, a file is missing or has another size than recorded, or the harvest is not finished.
        """
        place = place_of(where, cache, options, cache_bytes)
        local = isinstance(place, Folder)
        if local and not place.path("manifest.json").is_file() and place.path("plan.json").is_file():
            manifest = _unfinished(place, partial)
        else:
            manifest = read_json(place.path("manifest.json"))
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise FormatError(f"{place.name} holds no {FORMAT} of version {VERSION}; check the path.")
        try:
            plan = Plan.of_dict(manifest["plan"], f"{place.name}/manifest.json")
            shards = tuple(_shard(record) for record in manifest["units"] if record["rows"])
        except (KeyError, TypeError) as error:
            raise FormatError(f"{place.name}/manifest.json lacks a part ({error}); harvest it again.") from error
        if local:
            for shard in shards:
                for name, record in shard.files.items():
                    if (problem := check_size(place.path(name), record)) is not None:
                        raise FormatError(f"{problem}; see 'gemscope store verify {place.name}'.")
        return cls(place, plan, shards, manifest)

    @property
    def name(self) -> str:
        """Its folder or URL."""
        return self.place.name

    @property
    def rows(self) -> int:
        """Number of token positions."""
        if self.keep is None:
            return sum(shard.rows for shard in self.shards)
        return int(sum(np.bitwise_count(bits).sum(dtype=np.int64) for bits in self.keep))

    def __len__(self) -> int:
        return self.rows

    def statistics(self, site: Site | str) -> SiteStatistics:
        """Mean, second moment and norms over all rows of the store, whatever the split; raises FormatError while the
        harvest is not finished.
        """
        site = self.check_site(site)
        if "sites" not in self.manifest:
            raise FormatError(f"the harvest in {self.place.name} is not finished; run the same command again.")
        vectors = read_tensors(self.place.path("statistics.safetensors"))
        rows, scalars = self.manifest["rows"], self.manifest["sites"][str(site)]
        return SiteStatistics(
            rows=rows,
            total=vectors[f"mean.{site}"].numpy() * rows,
            squares=vectors[f"second_moment.{site}"].numpy() * rows,
            norms=scalars["mean_norm"] * rows,
            largest=scalars["largest_norm"],
        )

    def stream(
        self,
        sites: Sequence[Site | str],
        batch_size: int,
        seed: int = 0,
        *,
        start: Position | None = None,
        epochs: int | None = None,
        threads: int = 4,
        reading: Reading | None = None,
        origin: bool = False,
        device: torch.device | None = None,
    ) -> Stream:
        """Shuffled batches of the sites, aligned over them, in the stored number type, from ``start`` on.

        The order is a function of ``seed``, the epoch, ``reading`` and the sites' number only, whatever the
        threads; ``origin`` also gives documents, positions and tokens; ``device`` is where batches are brought,
        one ahead. Two pools are in memory. Raises InputError for a site not harvested.
        """
        wanted = [self.check_site(site) for site in sites]
        reading = reading or self.reading(wanted)
        contents = Contents(self.place, self.plan, self.shards, self.keep)
        reader = StoreReader(contents, wanted, seed, reading, threads, origin)
        return Stream(reader, wanted, batch_size, start=start or Position(), epochs=epochs, device=device)

    def reading(self, sites: Sequence[Site]) -> Reading:
        """How much is mixed at a time by default: 2**17 rows, fewer where they would take more than 512 MiB."""
        row_bytes = ITEM_BYTES[self.plan.dtype] * sum(self.width(site) for site in sites)
        usual = Reading()
        return replace(usual, pool_rows=max(usual.block_rows, min(usual.pool_rows, _POOL_BYTES // max(row_bytes, 1))))

    def split(self, held_out: float, seed: int = 0) -> tuple["Store", "Store"]:
        """(training side, held-out side), by document: no document has rows in both.

        A document falls on the same side in an ``ActivationSet`` of the same documents. Reads the document of every
        row once (4 bytes a row); of few documents a side may get none. Raises InputError unless 0 < held_out < 1.
        """
        if not 0 < held_out < 1:
            raise InputError(f"held-out share {held_out} is outside (0, 1); use for example 0.1.")
        train: list[npt.NDArray[np.uint8]] = []
        held: list[npt.NDArray[np.uint8]] = []
        for number, shard in enumerate(self.shards):
            docs, which = np.unique(self.origin(shard.unit).doc.numpy(), return_inverse=True)
            out = np.array([document_share(seed, int(doc)) < held_out for doc in docs])[which]
            mine = True if self.keep is None else unpacked_bits(self.keep[number], 0, shard.rows)
            train.append(np.packbits(~out & mine))
            held.append(np.packbits(out & mine))
        return replace(self, keep=tuple(train)), replace(self, keep=tuple(held))

    def shard(self, site: Site | str, unit: int) -> Float[Tensor, "rows _"]:
        """All rows of one unit at a site in the order of the file, memory-mapped."""
        site = self.check_site(site)
        shard = self._find(unit)
        path = self.place.path(acts_name(site, unit), shard.files[acts_name(site, unit)])
        width, dtype = self.width(site), self.plan.dtype
        head = len(acts_header(shard.rows, width, dtype))
        raw = np.memmap(path, np.uint8, mode="c", offset=head, shape=(shard.rows, width * ITEM_BYTES[dtype]))
        return torch.from_numpy(raw).view(TORCH_DTYPE[dtype])

    def origin(self, unit: int) -> Origin:
        """Where the rows of one unit come from."""
        shard = self._find(unit)
        columns = read_tensors(self.place.path(rows_name(unit), shard.files[rows_name(unit)]))
        if any(name not in columns or columns[name].shape != (shard.rows,) for name in ("doc", "pos", "token")):
            raise FormatError(
                f"{self.place.name}/{rows_name(unit)} does not describe {shard.rows} rows; verify the store."
            )
        return Origin(columns["doc"], columns["pos"], columns["token"])

    def _find(self, unit: int) -> Shard:
        for shard in self.shards:
            if shard.unit == unit:
                return shard
        raise InputError(f"there are no rows of unit {unit} in {self.place.name}.")


def _shard(record: Mapping[str, Any]) -> Shard:
    files = {name: FileRecord(one["bytes"], one["crc32"]) for name, one in record["files"].items()}
    return Shard(record["unit"], record["rows"], files)


def _unfinished(place: Folder, partial: bool) -> dict[str, Any]:
    """What there is of a harvest that is not finished, as a manifest."""
    plan = Plan.read(place.folder)
    there = [unit for unit in range(plan.units) if place.path(record_name(unit)).is_file()]
    if not partial:
        raise FormatError(
            f"the harvest in {place.name} is not finished ({len(there)} of {plan.units} units); run the same command"
            " again to go on."
        )
    records = [read_record(place.folder, unit) for unit in there]
    return {"format": FORMAT, "version": VERSION, "plan": plan.as_dict(), "units": records}
