"""A Hugging Face hub of one's own on 127.0.0.1: the file routes, small repositories, and every kind of trouble.

Large files are answered as the hub does it, by a redirect to another host (here ``localhost``) that knows nothing of
tokens. ``trouble`` is a list of faults, each used up by the first request that fits it.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Tree = Mapping[str, bytes]


@dataclass
class Fault:
    """What happens to one request."""

    method: str
    """``HEAD``, ``GET``, ``API`` (commit and listing)."""
    path: str = ""
    """Part of the path of the requests that are hit."""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    """Break the connection after this many bytes of the body."""
    ignore_range: bool = False
    swap: bytes | None = None
    """Send this instead."""


@dataclass
class Asked:
    """One request that came."""

    method: str
    path: str
    range: str | None
    token: str | None


class FakeHub:
    """Repositories by name, each with revisions; what was asked; what goes wrong."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Tree]] = {}
        self.gated: set[str] = set()
        self.trouble: list[Fault] = []
        self.asked: list[Asked] = []
        self.url = ""

    def add(self, repo: str, tree: Tree, revision: str = "main") -> str:
        """Put ``tree`` under ``revision``; gives its commit."""
        marks = [f"{path}:{hashlib.sha256(data).hexdigest()}" for path, data in sorted(tree.items())]
        commit = hashlib.sha1("\n".join(marks).encode()).hexdigest()
        self.repos.setdefault(repo, {}).update({revision: tree, commit: tree})
        return commit

    def gets(self, part: str = "") -> list[Asked]:
        """The requests for content."""
        return [one for one in self.asked if one.method == "GET" and part in one.path and "/api/" not in one.path]

    # answers

    def _fault(self, method: str, path: str) -> Fault | None:
        for fault in self.trouble:
            if fault.method == method and fault.path in path:
                self.trouble.remove(fault)
                return fault
        return None

    def _tree(self, repo: str, revision: str) -> tuple[str, Tree] | Response:
        if repo in self.gated:
            return Response(status_code=401, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if repo not in self.repos:
            return Response(status_code=404, headers={"X-Error-Code": "RepoNotFound"})
        if revision not in self.repos[repo]:
            return Response(status_code=404, headers={"X-Error-Code": "RevisionNotFound"})
        tree = self.repos[repo][revision]
        commit = next(name for name, one in self.repos[repo].items() if one is tree and len(name) == 40)
        return commit, tree

    def api(self, request: Request) -> Response:
        self._log(request)
        if (fault := self._fault("API", request.url.path)) is not None:
            return Response(status_code=fault.status, headers=fault.headers)
        repo = "{owner}/{name}".format(**request.path_params)
        found = self._tree(repo, request.path_params["revision"])
        if isinstance(found, Response):
            return found
        commit, tree = found
        if "/tree/" not in request.url.path:
            return JSONResponse({"id": repo, "modelId": repo, "sha": commit})
        folder = request.path_params["path"].rstrip("/") + "/"
        inner = {path[len(folder) :].split("/")[0] for path in tree if path.startswith(folder)}
        if not inner:
            return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound"})
        kinds = [("file" if folder + name in tree else "directory", folder + name) for name in sorted(inner)]
        return JSONResponse([{"type": kind, "oid": "0" * 40, "size": 0, "path": path} for kind, path in kinds])

    def resolve(self, request: Request) -> Response:
        self._log(request)
        path = request.path_params["path"]
        fault = self._fault(request.method, path)
        if fault is not None and fault.status:
            return Response(status_code=fault.status, headers=fault.headers)
        found = self._tree("{owner}/{name}".format(**request.path_params), request.path_params["revision"])
        if isinstance(found, Response):
            return found
        commit, tree = found
        if path not in tree:
            return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = tree[path]
        headers = {"X-Repo-Commit": commit}
        if path.endswith((".safetensors", ".npz")):  # stored as large files: by redirect
            if fault is not None:
                self.trouble.insert(0, fault)  # for the host that it leads to
            headers |= {
                "X-Linked-Size": str(len(data)),
                "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "Location": self.url.replace("127.0.0.1", "localhost") + request.url.path.replace("/resolve/", "/cdn/"),
            }
            return Response(status_code=302, headers=headers)
        git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        return self._content(request, data, fault, headers | {"ETag": f'"{git}"'})

    def cdn(self, request: Request) -> Response:
        self._log(request)
        tree = self.repos["{owner}/{name}".format(**request.path_params)][request.path_params["revision"]]
        path = request.path_params["path"]
        return self._content(request, tree[path], self._fault(request.method, path), {"ETag": '"of-the-cdn"'})

    def _content(self, request: Request, data: bytes, fault: Fault | None, headers: dict[str, str]) -> Response:
        data = fault.swap if fault is not None and fault.swap is not None else data
        start, status = 0, 200
        asked = request.headers.get("range")
        if asked and not (fault is not None and fault.ignore_range):
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            if start >= len(data):
                return Response(status_code=416)
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        body = data[start:]
        headers = headers | {"Content-Length": str(len(body)), "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers)
        cut = None if fault is None else fault.cut
        return StreamingResponse(_pieces(body, cut), status_code=status, headers=headers)

    def _log(self, request: Request) -> None:
        headers = request.headers
        method = "API" if "/api/" in request.url.path else request.method
        self.asked.append(Asked(method, request.url.path, headers.get("range"), headers.get("authorization")))


async def _pieces(body: bytes, cut: int | None):
    for at in range(0, len(body) if cut is None else cut, 1024):
        yield body[at : at + 1024 if cut is None else min(at + 1024, cut)]
    if cut is not None:
        raise ConnectionResetError("the test cuts the connection")


@contextmanager
def running() -> Iterator[FakeHub]:
    """A hub that answers at ``hub.url`` until the block ends."""
    hub = FakeHub()
    at = "/{owner}/{name}/{kind}/{revision}/{path:path}"
    app = Starlette(
        routes=[
            Route("/api/models/{owner}/{name}/revision/{revision}", hub.api),
            Route("/api/models/{owner}/{name}/tree/{revision}/{path:path}", hub.api),
            Route(at.replace("{kind}", "resolve"), hub.resolve, methods=["GET", "HEAD"]),
            Route(at.replace("{kind}", "cdn"), hub.cdn, methods=["GET", "HEAD"]),
        ]
    )
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join(10)


def single_layer(folder: str, *, seed: int = 0, config: bool = True, size: int = 20_000) -> dict[str, bytes]:
    """The files of one released dictionary; the bytes are made up."""
    tree = {f"{folder}/params.safetensors": made_up(size, seed), f"{folder}/examples.safetensors": made_up(999, seed)}
    if config:
        tree[f"{folder}/config.json"] = json.dumps({"architecture": "jump_relu", "seed": seed}).encode()
    return tree


def made_up(size: int, seed: int = 0) -> bytes:
    """Bytes that no two places share."""
    blocks = (hashlib.sha256(f"{seed}:{i}".encode()).digest() for i in range(size // 32 + 1))
    return b"".join(blocks)[:size]
