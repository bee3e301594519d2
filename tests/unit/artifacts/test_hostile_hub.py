"""What calls itself a hub and is none, or means ill: one sentence, and nothing outside the folder that was named."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from gemscope.artifacts.catalogue.released import find
from gemscope.artifacts.hub.fetch import fetch, plan
from gemscope.artifacts.hub.retry import Patience
from gemscope.artifacts.hub.sources import HubSource
from gemscope.core.errors import GemscopeError

TWO = "gemma-scope-2-270m-it/resid_post/layer_5_width_16k_l0_medium"
ONE = "gemma-scope-2b-pt-res/layer_3/width_16k/canonical"
COMMIT = "a" * 40


class Answers(BaseHTTPRequestHandler):
    """Says what ``server.told`` says for ``api``, ``tree`` and ``file``; what it lacks is as a hub would have it."""

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        told = self.server.told  # type: ignore[attr-defined]
        what = "tree" if "/tree/" in self.path else "api" if self.path.startswith("/api") else "file"
        usual = {"api": {"id": "x/y", "modelId": "x/y", "sha": COMMIT, "siblings": []}, "tree": [], "file": "1234567"}
        said = told.get(what, usual[what])
        body = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        self.send_response(200)
        headers = {"X-Repo-Commit": COMMIT, "ETag": '"mark"', "Content-Length": str(len(body))}
        for name, value in (headers | told.get("headers", {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Callable[[dict[str, object]], HubSource]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def open_source(told: dict[str, object]) -> HubSource:
        server.told = told  # type: ignore[attr-defined]
        return HubSource(f"http://127.0.0.1:{server.server_port}", Patience(sleep=lambda _: None))

    yield open_source
    server.shutdown()
    server.server_close()


def brought(source: HubSource, name: str, out: Path) -> list[str]:
    """The files under ``out`` after a fetch."""
    fetch(plan([find(name)], source, out))
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


NO_HUB = {
    "a page": (TWO, {"api": "<html>hello</html>"}),
    "null": (TWO, {"api": "null"}),
    "a list": (TWO, {"api": [1, 2]}),
    "a number": (TWO, {"api": "7"}),
    "a commit that is a path": (TWO, {"api": {"id": "x/y", "sha": "../../x"}}),
    "no commit of a file": (TWO, {"headers": {"X-Repo-Commit": "../../x"}}),
    "a size that is none": (TWO, {"headers": {"X-Linked-Size": "abc"}}),
    "a negative size": (TWO, {"headers": {"X-Linked-Size": "-5"}}),
    "a size of many digits": (TWO, {"headers": {"X-Linked-Size": "9" * 5000}}),
    "a listing of nothing": (ONE, {"tree": [{"nothing": 1}]}),
    "a listing that is a page": (ONE, {"tree": "<html>"}),
}


@pytest.mark.parametrize("case", NO_HUB)
def test_an_answer_that_no_hub_gives_is_a_sentence(hub, tmp_path, case):
    name, told = NO_HUB[case]
    with pytest.raises(GemscopeError, match="does not answer like a Hugging Face hub") as caught:
        brought(hub(told), name, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.rglob("*")) == []


def test_a_size_beyond_every_disk_is_said_before_anything_is_written(hub, tmp_path):
    with pytest.raises(GemscopeError, match="disk is too small"):
        brought(hub({"headers": {"X-Linked-Size": "9" * 30}}), TWO, tmp_path / "out")
    assert list(tmp_path.rglob("*")) == []


def test_folders_with_dots_or_endless_numbers_are_passed_over(hub, tmp_path):
    names = ["../../../average_l0_99", "average_l0_../../x", "average_l0_77/..", "average_l0_" + "9" * 5000]
    names += ["average_l0_²", "average_l0_٣", "average_l0_71"]
    listing = [{"type": "directory", "path": f"layer_3/width_16k/{name}", "oid": "x"} for name in names]
    folder = "google/gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_"
    files = brought(hub({"tree": listing}), ONE, tmp_path / "out")
    assert {file.rpartition("/")[0] for file in files} <= {f"{folder}71", f"{folder}99"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_mark_that_is_a_path_names_no_file(hub, tmp_path):
    files = brought(hub({"headers": {"ETag": '"../../../../evil"'}}), TWO, tmp_path / "out")
    assert {file.rpartition("/")[2] for file in files} == {"config.json", "params.safetensors", "gemscope.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
