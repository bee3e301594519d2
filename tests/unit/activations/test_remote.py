"""Stores read by URL: fetched in parts, checked, kept; connections that break are tried again."""

import json
import socket
import threading
import urllib.request
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch

from gemscope.activations import places
from gemscope.activations.order import Position, Reading
from gemscope.activations.store import Store
from gemscope.core.errors import FormatError
from unit.activations import small

fsspec = pytest.importorskip("fsspec", reason="the extra 'remote' is not installed")
READING = Reading(block_rows=32, open_shards=2, pool_rows=400)
SITES = ("resid_post.0", "mlp_act.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.store(tmp_path_factory.mktemp("stores") / "s")


@pytest.fixture
def url(folder):
    """The store in fsspec's memory."""
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/bucket/s", recursive=True)
    yield "memory://bucket/s"
    system.rm("/bucket", recursive=True)


def test_a_url_reads_like_the_folder(url, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_RANGE", 5000)
    here, there = Store.open(folder), Store.open(url, cache=tmp_path / "cache")
    for a, b in zip(*(s.stream(SITES, 90, 1, epochs=1, reading=READING) for s in (here, there)), strict=True):
        assert all(torch.equal(a[site], b[site]) for site in a)
    assert there.statistics("mlp_act.1").mean_norm == here.statistics("mlp_act.1").mean_norm
    assert torch.equal(there.shard("resid_post.2", 1), here.shard("resid_post.2", 1))
    fetched = [p for p in (tmp_path / "cache").rglob("*/resid_post.2/*") if p.is_file()]
    assert len(fetched) == 1, "only what was wanted is fetched"


class Flaky:
    """A file system whose connections break two times of three."""

    def __init__(self, system, fail=lambda n: n % 3 > 0):
        self.system, self.calls, self.fail = system, 0, fail

    def size(self, path):
        return self.system.size(path)

    def cat_file(self, path, start, end):
        self.calls += 1
        if self.fail(self.calls):
            raise ConnectionResetError("dropped")
        return self.system.cat_file(path, start=start, end=end)


def test_broken_connections_are_tried_again_and_a_dead_one_is_named(url, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_WAIT", 0.001)
    flaky = Flaky(fsspec.filesystem("memory"))
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **_: (flaky, "/bucket/s"))
    store = Store.open(url, cache=tmp_path / "cache")
    assert sum(len(b[store.sites[0]]) for b in store.batches(store.sites[:1], 100)) == store.rows
    flaky.fail = lambda n: True
    with pytest.raises(FormatError, match="dropped"):
        Store.open(url, cache=tmp_path / "other")


def test_damage_on_the_way_is_found(url, folder, tmp_path):
    system = fsspec.filesystem("memory")
    name = "/bucket/s/acts/resid_post.0/000001.safetensors"
    data = bytearray(system.cat_file(name))
    data[1000] ^= 1
    system.pipe_file(name, bytes(data))
    store = Store.open(url, cache=tmp_path / "cache")
    with pytest.raises(FormatError, match=r"000001\.safetensors: the data is damaged"):
        list(store.batches(store.sites[:1], 100))
    system.rm(name)
    with pytest.raises(FormatError, match="missing"):
        list(store.batches(store.sites[:1], 100))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_another_store_at_the_same_url_is_not_taken_from_the_cache(url, folder, tmp_path):
    def first(where):
        return next(where.stream(SITES, 90, 1, reading=READING))

    first(Store.open(url, cache=tmp_path / "cache"))
    other = small.store(tmp_path / "other", replace(small.CONFIG, seed=9))
    fsspec.filesystem("memory").put(f"{other}/", "/bucket/s/", recursive=True)
    here, there = first(Store.open(other)), first(Store.open(url, cache=tmp_path / "cache"))
    assert all(torch.equal(here[site], there[site]) for site in here)


def test_the_cache_keeps_within_its_limit(url, folder, tmp_path):
    size = (folder / "acts/resid_post.0/000000.safetensors").stat().st_size
    store = Store.open(url, cache=tmp_path / "cache", cache_bytes=int(2.5 * size))
    reading = Reading(block_rows=32, open_shards=1, pool_rows=400)
    assert (
        sum(len(b[store.sites[0]]) for b in store.stream(store.sites[:1], 50, epochs=2, reading=reading))
        == 2 * store.rows
    )
    used = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.safetensors"))
    assert used <= 2.6 * size


class Dropping(threading.Thread):
    """A proxy on the loopback that cuts every third answer after some kilobytes."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.target, self.count, self.cut = port, 0, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]

    def run(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            self.count += 1
            threading.Thread(target=self.serve, args=(client, self.count % 3 == 0), daemon=True).start()

    def serve(self, client: socket.socket, drop: bool) -> None:
        upstream = socket.create_connection(("127.0.0.1", self.target))
        threading.Thread(target=self.pump, args=(client, upstream, None), daemon=True).start()
        self.pump(upstream, client, 3000 if drop else None)

    def pump(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        sent = 0
        try:
            while data := source.recv(2000):
                target.sendall(data)
                sent += len(data)
                if limit is not None and sent > limit:
                    self.cut += 1
                    break
        except OSError:
            pass
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture(scope="module")
def s3(folder):
    """The store in a bucket of moto's S3 server, seen through the proxy."""
    pytest.importorskip("s3fs", reason="the extra 'remote' is not installed")
    server_module = pytest.importorskip("moto.server", reason="moto is not installed")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    direct = fsspec.filesystem("s3", **options(port))
    direct.call_s3("create_bucket", Bucket="activations")
    direct.put(str(folder), "activations/s", recursive=True)
    proxy = Dropping(port)
    proxy.start()
    yield proxy
    proxy.server.close()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST"))
    server.stop()


def options(port: int) -> dict:
    client = {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "us-east-1"}
    return {"key": "test", "secret": "test", "client_kwargs": client, "skip_instance_cache": True}


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 4])
def test_s3_over_http_with_dropped_connections_resumes_exactly(s3, folder, tmp_path, monkeypatch, threads):
    monkeypatch.setattr(places, "_RANGE", 5000)
    monkeypatch.setattr(places, "_WAIT", 0.01)
    here = Store.open(folder)
    there = Store.open("s3://activations/s", cache=tmp_path / "cache", options=options(s3.port))
    whole, places_ = [], []
    stream = here.stream(SITES, 90, 1, epochs=1, reading=READING)
    for batch in stream:
        whole.append(batch)
        places_.append(json.loads(json.dumps(stream.position.as_dict())))
    for at in np.random.default_rng(threads).choice(len(whole) - 1, 4, replace=False):
        start = Position.of_dict(places_[at])
        rest = list(there.stream(SITES, 90, 1, start=start, epochs=1, threads=threads, reading=READING))
        assert len(rest) == len(whole) - at - 1
        for a, b in zip(rest, whole[at + 1 :], strict=True):
            assert all(torch.equal(a[site], b[site]) for site in a)
    assert s3.cut > 0
