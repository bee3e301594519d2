"""Rows to train on, and gemscope train in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gemscope.activations.sets import ActivationSet
from gemscope.cli.main import app
from gemscope.core.sites import Site

QUICK = ("--batch-size", "64", "--held-out", "0.2")

Train = Callable[..., Any]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 rows of three layers."""
    g = torch.Generator().manual_seed(0)
    sources = (torch.rand(600, 20, generator=g) < 0.2).float()
    sites = [Site(name, layer) for name in ("resid_post", "mlp_in", "mlp_out") for layer in range(3)]
    data = {site: sources @ torch.randn(20, 12, generator=g) + 1.0 for site in sites}
    doc = torch.arange(600) // 20
    folder = tmp_path_factory.mktemp("rows") / "set"
    ActivationSet(data, doc, torch.arange(600) % 20, torch.zeros(600, dtype=torch.long), {"model": "toy"}).save(folder)
    return folder


@pytest.fixture
def train(rows: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """``train("--l0", 4)`` on ``rows``."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object, on: object = rows) -> Any:
        given = [] if on is None else [str(on)]
        return CliRunner().invoke(app, ["train", *given, *map(str, words)])

    return call
