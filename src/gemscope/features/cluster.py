"""A feature index as tasks of Ray (extra ``ray``): workers count units, this process writes the files.

Notable: each worker keeps the sum of what it counted in a file of its own in the index's folder, which all machines
must see; one that is started again goes on from there, and the sums add up to the same bytes whoever counted.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from gemscope.activations import locks
from gemscope.activations.cluster import RayConfig, spread
from gemscope.activations.harvesting import Slice
from gemscope.artifacts.config import Loaded
from gemscope.features.blocks import Rows
from gemscope.features.config import IndexConfig
from gemscope.features.index import FeatureIndex, index
from gemscope.features.passing import (
    Counter,
    Progress,
    check_dictionaries,
    check_plan,
    counted_units,
    is_finished,
    missing_units,
    plan_of,
)
from gemscope.models.gemma import Gemma


class CountWorker:
    """Runs in a process of its own, and counts the units it is told."""

    def __init__(
        self,
        number: int,
        rows: Rows,
        dictionaries: Mapping[str, Loaded],
        config: IndexConfig,
        folder: str,
        shares: int,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        if torch.cuda.is_available():  # Ray shows a worker its own GPU only
            for loaded in dictionaries.values():
                loaded.dictionary.to("cuda")
        self._folder = Path(folder)
        self._counter = Counter(self._folder, rows, dictionaries, config, Slice(number, shares))

    def work(self, unit: int) -> int:
        """One unit, unless it is counted already; gives its number."""
        if unit not in counted_units(self._folder):
            self._counter.count(unit)
        return unit


def index_on_ray(
    folder: Path | str,
    rows: Rows,
    dictionaries: Mapping[str, Loaded],
    ray_config: RayConfig,
    config: IndexConfig | None = None,
    *,
    gemma: Gemma | None = None,
    progress: Progress | None = None,
) -> FeatureIndex:
    """``index``, its units counted by Ray's workers.

    A worker that dies is started again and its unit with it. Raises InputError when Ray is not installed or cannot be
    reached, and the errors of ``index``.
    """
    folder, config = Path(folder).resolve(), config or IndexConfig()
    check_dictionaries(rows, dictionaries)
    if not is_finished(folder):
        with locks.writing(folder, 0, 1):
            check_plan(folder, plan_of(rows, dictionaries, config))
            missing = missing_units(folder, range(rows.units))
            if missing:
                _count(folder, rows, dictionaries, config, missing, ray_config, progress)
    made = index(folder, rows, dictionaries, config, gemma=gemma)
    assert made is not None
    return made


def _count(
    folder: Path,
    rows: Rows,
    dictionaries: Mapping[str, Loaded],
    config: IndexConfig,
    missing: list[int],
    ray_config: RayConfig,
    progress: Progress | None,
) -> None:
    total = rows.rows * len(missing) // rows.units

    def done(count: int) -> None:
        if progress is not None:
            progress(total * count // len(missing), total)

    shares = ray_config.workers
    arguments = (rows, dict(dictionaries), config, str(folder), shares, torch.get_num_threads())
    spread(CountWorker, arguments, missing, ray_config, done)
