"""A hub on this machine, with one repository of the published layout."""

import pytest

from unit.artifacts import fake_hub


@pytest.fixture(scope="session")
def _server():
    with fake_hub.running() as hub:
        yield hub


@pytest.fixture
def hub(_server, monkeypatch):
    """Empty at the start of each test; no token but the one that would be wrong to send."""
    _server.repos.clear()
    _server.gated.clear()
    _server.trouble.clear()
    _server.asked.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return _server
