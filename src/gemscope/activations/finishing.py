"""The last step of a harvest: one manifest and one file of statistics for the whole store."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gemscope.activations.plan import FORMAT, VERSION, Plan
from gemscope.activations.shards import ShardWriter, header, tensor_bytes
from gemscope.activations.statistics import SiteStatistics, Vector, added
from gemscope.activations.units import record_name, statistics_name
from gemscope.core.errors import FormatError
from gemscope.core.files import atomic_path, read_json, read_tensors, write_json
from gemscope.core.sites import Site


def read_record(folder: Path, unit: int) -> dict[str, Any]:
    """The record of a unit that is whole; raises FormatError when it is missing or damaged."""
    path = folder / record_name(unit)
    record = read_json(path)
    if not isinstance(record, dict) or record.get("unit") != unit:
        raise FormatError(f"{path} is not the record of unit {unit}; delete it and run the same harvest again.")
    return record


def unit_statistics(folder: Path, plan: Plan, record: Mapping[str, Any]) -> dict[Site, SiteStatistics]:
    """Sums of one unit."""
    vectors = read_tensors(folder / statistics_name(record["unit"]))
    return {
        site: SiteStatistics(
            rows=record["rows"],
            total=vectors[f"total.{site}"].numpy(),
            squares=vectors[f"squares.{site}"].numpy(),
            norms=record["statistics"][str(site)]["norms"],
            largest=record["statistics"][str(site)]["largest"],
        )
        for site in plan.sites
    }


def finish(folder: Path, plan: Plan) -> dict[str, Any]:
    """Write ``statistics.safetensors`` and ``manifest.json``: functions of the units, so several workers may do it."""
    records = [read_record(folder, unit) for unit in range(plan.units)]
    sums = {site: added((), one.width) for site, one in plan.sites.items()}
    for record in records:
        found = unit_statistics(folder, plan, record)
        sums = {site: added((sums[site], found[site]), one.width) for site, one in plan.sites.items()}
    write_statistics(folder / "statistics.safetensors", sums)
    value = manifest(plan, records, sums)
    write_json(folder / "manifest.json", value)
    return value


def manifest(plan: Plan, records: Sequence[Mapping[str, Any]], sums: Mapping[Site, SiteStatistics]) -> dict[str, Any]:
    """What a reader needs to know, in one value."""
    text = json.dumps(list(records), sort_keys=True, separators=(",", ":"))
    return {
        "format": FORMAT,
        "version": VERSION,
        "plan": plan.as_dict(),
        "rows": sum(record["rows"] for record in records),
        "skipped_documents": sum(record["skipped_documents"] for record in records),
        "outliers": sum(record["outliers"] for record in records),
        "sites": {
            str(site): {
                "width": one.width,
                "mean_norm": sums[site].mean_norm,
                "mean_square_norm": sums[site].mean_square_norm,
                "largest_norm": sums[site].largest,
                "median_norm_of_sample": one.median_norm,
            }
            for site, one in plan.sites.items()
        },
        "units_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "units": list(records),
    }


def write_statistics(path: Path, sums: Mapping[Site, SiteStatistics]) -> None:
    """``mean.SITE`` and ``second_moment.SITE`` in float64."""
    tensors = {f"{name}.{site}": v for site, one in sums.items() for name, v in _moments(one)}
    head = header({name: ("float64", (math.prod(v.shape),)) for name, v in tensors.items()})
    with ExitStack() as stack:
        writer = ShardWriter(stack.enter_context(atomic_path(path)), len(head))
        stack.callback(writer.close)
        for vector in tensors.values():
            writer.append(tensor_bytes(vector))
        writer.finish(head)


def _moments(one: SiteStatistics) -> list[tuple[str, Vector]]:
    return [("mean", one.mean), ("second_moment", one.second_moment)]
