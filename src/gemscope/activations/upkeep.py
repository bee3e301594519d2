"""Looking after stores: what is in one, whether it is whole, putting several together, removing one."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemscope.activations import locks
from gemscope.activations.finishing import finish, manifest, read_record, unit_statistics
from gemscope.activations.plan import Plan
from gemscope.activations.shards import (
    FileRecord,
    ShardWriter,
    acts_header,
    check_file,
    rows_header,
    tensor_bytes,
)
from gemscope.activations.statistics import added
from gemscope.activations.units import (
    acts_name,
    record_name,
    rows_name,
    statistics_header,
    statistics_name,
)
from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import atomic_path, read_json, read_tensors, storage_error, write_json


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds."""

    folder: str
    model: str
    sites: dict[str, int]
    """Site -> width."""
    dtype: str
    rows: int
    documents: int
    units: int
    """Units that are there."""
    units_planned: int
    bytes: int
    outliers: int
    skipped_documents: int
    mean_norm: dict[str, float]
    """Site -> mean norm of a row; empty while the harvest is not finished."""
    source: Any
    in_progress: bool
    """Somebody is writing into it now."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def info(folder: Path | str) -> StoreInfo:
    """Read plan, records and manifest; raises FormatError when there is no store."""
    folder = Path(folder)
    plan = Plan.read(folder)
    there = [read_record(folder, unit) for unit in range(plan.units) if (folder / record_name(unit)).is_file()]
    path = folder / "manifest.json"
    norms = {site: one["mean_norm"] for site, one in read_json(path)["sites"].items()} if path.is_file() else {}
    return StoreInfo(
        folder=str(folder),
        model=str(plan.config["model"]),
        sites={str(site): one.width for site, one in plan.sites.items()},
        dtype=plan.dtype,
        rows=sum(record["rows"] for record in there),
        documents=sum(record["documents"][1] - record["documents"][0] for record in there),
        units=len(there),
        units_planned=plan.units,
        bytes=sum(one["bytes"] for record in there for one in record["files"].values()),
        outliers=sum(record["outliers"] for record in there),
        skipped_documents=sum(record["skipped_documents"] for record in there),
        mean_norm=norms,
        source=plan.config["source"],
        in_progress=locks.is_locked(folder),
    )


def verify(folder: Path | str, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Read every byte and compare it with the records; one sentence a problem, none when the store is whole.

    ``progress`` is called with (done, total) bytes. Raises FormatError when there is no store.
    """
    folder = Path(folder)
    plan = Plan.read(folder)
    problems: list[str] = []
    records: list[dict[str, Any]] = []
    for unit in range(plan.units):
        try:
            records.append(read_record(folder, unit))
        except FormatError as error:
            problems.append(f"unit {unit} is not there: {error}")
    total = sum(one["bytes"] for record in records for one in record["files"].values())
    done = 0
    for record in records:
        for name, one in record["files"].items():
            wanted = FileRecord(one["bytes"], one["crc32"])
            if (problem := check_file(folder / name, wanted, _expected_header(plan, record, name))) is not None:
                there = folder / record_name(record["unit"])
                problems.append(f"{problem}; delete {there} and run the same harvest again")
            done += wanted.bytes
            if progress is not None:
                progress(done, total)
    return problems if problems else _check_manifest(folder, plan, records)


def _expected_header(plan: Plan, record: dict[str, Any], name: str) -> bytes:
    if name.startswith("rows/"):
        return rows_header(record["rows"])
    widths = {site: one.width for site, one in plan.sites.items()}
    if name.startswith("statistics/"):
        return statistics_header(widths)
    site = next(site for site in widths if name == acts_name(site, record["unit"]))
    return acts_header(record["rows"], widths[site], plan.dtype)


def _check_manifest(folder: Path, plan: Plan, records: Sequence[dict[str, Any]]) -> list[str]:
    """The manifest and the statistics are functions of the units: make them again and compare."""
    path = folder / "manifest.json"
    if not path.is_file():
        return [f"{path}: the file is missing; run the same harvest again to write it"]
    sums = {site: added((), one.width) for site, one in plan.sites.items()}
    for record in records:
        found = unit_statistics(folder, plan, record)
        sums = {site: added((sums[site], found[site]), one.width) for site, one in plan.sites.items()}
    problems: list[str] = []
    try:
        if read_json(path) != manifest(plan, records, sums):
            problems.append(f"{path}: it does not fit the units; run the same harvest again to write it anew")
        there = read_tensors(folder / "statistics.safetensors")
        for site, one in sums.items():
            for name, vector in (("mean", one.mean), ("second_moment", one.second_moment)):
                if not np.array_equal(there[f"{name}.{site}"].numpy(), vector):
                    problems.append(f"{folder}/statistics.safetensors: {name} of {site} does not fit the units")
    except (FormatError, KeyError) as error:
        problems.append(str(error))
    return problems


def merge(folders: Sequence[Path | str], into: Path | str) -> Plan:
    """One store of several, of the same model, sites and number type; shards are linked where the disk allows, else
    copied.

    Documents are numbered on: those of the second store come after those of the first. Raises InputError when the
    stores do not fit together or ``into`` is not empty, FormatError when one is not finished.
    """
    parts, into = [Path(folder) for folder in folders], Path(into)
    if not parts:
        raise InputError("no store to merge; name at least one.")
    plans = [Plan.read(folder) for folder in parts]
    for folder, plan in zip(parts, plans, strict=True):
        if not (folder / "manifest.json").is_file():
            raise FormatError(f"the harvest in {folder} is not finished; run the same command again first.")
        for name in ("model", "revision", "weights_sha256", "sites", "dtype", "positions"):
            if plan.config[name] != plans[0].config[name]:
                raise InputError(f"{folder} does not fit {parts[0]}: {name} is another; harvest them alike.")
    if into.exists() and any(into.iterdir()):
        raise InputError(f"{into} is not empty; choose another folder with --out.")
    whole = _merged_plan(plans)
    with locks.writing(into, 0, 1):
        write_json(into / "plan.json", whole.as_dict())
        unit = documents = 0
        for folder, plan in zip(parts, plans, strict=True):
            for old in range(plan.units):
                _take_unit(folder, plan, old, into, unit, documents)
                unit += 1
            documents += plan.documents
        finish(into, whole)
    return whole


def _merged_plan(plans: Sequence[Plan]) -> Plan:
    shared = {k: v for k, v in plans[0].config.items() if all(plan.config.get(k) == v for plan in plans)}
    config = {**shared, "source": {"kind": "merged", "stores": [dict(plan.config) for plan in plans]}}
    documents, bounds = 0, [0]
    for plan in plans:
        bounds += [documents + plan.range(unit)[1] for unit in range(plan.units)]
        documents += plan.documents
    rows = sum(plan.documents * plan.rows_per_document for plan in plans)
    return replace(
        plans[0],
        config=config,
        documents=documents,
        rows_per_document=rows / max(documents, 1),
        bounds=tuple(bounds),
    )


def _take_unit(folder: Path, plan: Plan, old: int, into: Path, new: int, documents: int) -> None:
    """Unit ``old`` of one store as unit ``new`` of another, its documents numbered from ``documents`` on."""
    record = read_record(folder, old)
    files: dict[str, Any] = {}
    for there, here in [
        *((acts_name(site, old), acts_name(site, new)) for site in plan.sites),
        (statistics_name(old), statistics_name(new)),
    ]:
        _link(folder / there, into / here)
        files[here] = record["files"][there]
    columns = read_tensors(folder / rows_name(old))
    arrays = [(columns["doc"] + documents).numpy(), columns["pos"].numpy(), columns["token"].numpy()]
    files[rows_name(new)] = _write(into / rows_name(new), rows_header(record["rows"]), arrays).as_dict()
    span = [documents + at for at in record["documents"]]
    write_json(into / record_name(new), {**record, "unit": new, "documents": span, "files": files})


def _write(path: Path, head: bytes, arrays: Sequence[npt.NDArray[Any]]) -> FileRecord:
    with atomic_path(path) as part:
        writer = ShardWriter(part, len(head))
        try:
            for array in arrays:
                writer.append(tensor_bytes(array))
            return writer.finish(head)
        finally:
            writer.close()


def _link(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
    except OSError:
        with atomic_path(target) as part:
            shutil.copyfile(source, part)


def remove(folder: Path | str) -> int:
    """Delete a store and give the bytes that were freed; raises FormatError when there is none, InputError while
    somebody is writing into it.
    """
    folder = Path(folder)
    Plan.read(folder)
    with locks.writing(folder, 0, 1):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise storage_error(folder, error) from error
    return size
