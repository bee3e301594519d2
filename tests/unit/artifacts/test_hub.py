"""Fetching from a hub that has every kind of trouble: what arrives is right, or nothing has its name."""

import errno
import hashlib
import json
import os
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from filelock import FileLock

from gemscope.artifacts.catalogue.released import find
from gemscope.artifacts.hub import download as downloads
from gemscope.artifacts.hub import fetch as fetching
from gemscope.artifacts.hub.download import part_of
from gemscope.artifacts.hub.fetch import check_space, fetch, plan
from gemscope.artifacts.hub.retry import Patience
from gemscope.artifacts.hub.sources import open_source
from gemscope.core.errors import (
    ArtifactNotFoundError,
    ArtifactRefusedError,
    ArtifactUnreachableError,
    FormatError,
    InputError,
    StorageError,
)
from unit.artifacts.fake_hub import Fault, made_up, single_layer

REPO = "google/gemma-scope-2-1b-pt"
FOLDER = "resid_post/layer_22_width_65k_l0_medium"
ARTIFACT = find(f"gemma-scope-2-1b-pt/{FOLDER}")
PARAMS = f"{FOLDER}/params.safetensors"


class Waits(list):
    """Stands in for ``time.sleep``."""

    def __call__(self, seconds):
        self.append(seconds)


@pytest.fixture
def waits():
    return Waits()


@pytest.fixture
def source(hub, waits):
    return open_source(hub.url, Patience(sleep=waits))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def bring(source, out, artifact=ARTIFACT, **options):
    return fetch(plan([artifact], source, out, **options))


def test_a_plan_asks_and_writes_nothing(hub, source, tmp_path):
    tree = single_layer(FOLDER)
    commit = hub.add(REPO, tree)
    todo = plan([ARTIFACT], source, tmp_path)
    assert [step.target.name for step in todo.steps] == ["config.json", "params.safetensors"]
    assert todo.size == todo.left == sum(len(tree[f"{FOLDER}/{step.target.name}"]) for step in todo.steps)
    assert todo.revisions == {REPO: commit}
    assert hub.gets() == []
    assert files(tmp_path) == []


def test_what_is_fetched_is_what_the_hub_has_with_its_provenance_beside_it(hub, source, tmp_path):
    tree = single_layer(FOLDER)
    commit = hub.add(REPO, tree)
    records = bring(source, tmp_path)
    folder = tmp_path / REPO / FOLDER
    assert files(folder) == ["config.json", "gemscope.json", "params.safetensors"]
    about = json.loads((folder / "gemscope.json").read_text())
    assert (about["repo"], about["folder"], about["revision"]) == (REPO, FOLDER, commit)
    for name, check in (("config.json", "git-sha1"), ("params.safetensors", "sha256")):
        data = tree[f"{FOLDER}/{name}"]
        assert (folder / name).read_bytes() == data
        entry = about["files"][name]
        assert entry["sha256"] == records[folder / name].sha256 == hashlib.sha256(data).hexdigest()
        assert (entry["size"], entry["checked"], entry["revision"]) == (len(data), check, commit)
        assert entry["source"] == hub.url
    assert not any("examples" in one.path for one in hub.asked)


def test_examples_come_when_asked_for(hub, source, tmp_path):
    hub.add(REPO, single_layer(FOLDER))
    bring(source, tmp_path, examples=True)
    assert "examples.safetensors" in files(tmp_path / REPO / FOLDER)


def test_a_second_fetch_downloads_nothing_unless_a_file_was_damaged(hub, source, tmp_path):
    tree = single_layer(FOLDER)
    hub.add(REPO, tree)
    bring(source, tmp_path)
    hub.asked.clear()
    bring(source, tmp_path)
    bring(source, tmp_path, rehash=True)
    assert hub.gets() == []
    target = tmp_path / REPO / PARAMS
    target.write_bytes(b"x" + target.read_bytes()[1:])
    bring(source, tmp_path)
    assert hub.gets() == []  # the record is trusted ...
    bring(source, tmp_path, rehash=True)  # ... unless told not to
    assert target.read_bytes() == tree[PARAMS]


def test_all_files_are_of_one_commit_even_when_the_branch_moves(hub, source, tmp_path):
    first = single_layer(FOLDER, seed=1)
    commit = hub.add(REPO, first)
    todo = plan([ARTIFACT], source, tmp_path)
    hub.add(REPO, single_layer(FOLDER, seed=2))
    fetch(todo)
    assert (tmp_path / REPO / PARAMS).read_bytes() == first[PARAMS]
    assert todo.revisions == {REPO: commit}


def test_a_pinned_revision_is_fetched_and_replaces_what_was_fetched_before(hub, source, tmp_path):
    old, new = single_layer(FOLDER, seed=1), single_layer(FOLDER, seed=2)
    commit = hub.add(REPO, old, "v1")
    hub.add(REPO, new)
    bring(source, tmp_path)
    assert (tmp_path / REPO / PARAMS).read_bytes() == new[PARAMS]
    bring(source, tmp_path, revision=commit)
    assert (tmp_path / REPO / PARAMS).read_bytes() == old[PARAMS]
    bring(source, tmp_path, revision="v1")
    assert json.loads((tmp_path / REPO / FOLDER / "gemscope.json").read_text())["requested"] == commit


def test_a_connection_that_is_cut_is_resumed_at_the_byte_it_reached(hub, source, tmp_path, waits):
    tree = single_layer(FOLDER)
    hub.add(REPO, tree)
    hub.trouble += [Fault("GET", "params", cut=5000), Fault("GET", "params", cut=700)]
    bring(source, tmp_path)
    assert (tmp_path / REPO / PARAMS).read_bytes() == tree[PARAMS]
    ranges = [one.range for one in hub.gets("/cdn/")]
    assert ranges[0] is None
    starts = [int(text.removeprefix("bytes=").rstrip("-")) for text in ranges[1:]]
    assert starts == [5000, 5700]
    assert waits == [1.0, 1.0]  # progress was made in between
    assert files(tmp_path / REPO / FOLDER) == ["config.json", "gemscope.json", "params.safetensors"]


def test_a_fetch_that_was_given_up_goes_on_in_the_next_run(hub, tmp_path, waits):
    tree = single_layer(FOLDER)
    hub.add(REPO, tree)
    hub.trouble += [Fault("GET", "params", cut=3000), *[Fault("GET", "params", cut=0)] * 2]
    impatient = open_source(hub.url, Patience(tries=2, sleep=waits))
    with pytest.raises(ArtifactUnreachableError, match="what has arrived is kept"):
        bring(impatient, tmp_path)
    target = tmp_path / REPO / PARAMS
    assert not target.exists()
    todo = plan([ARTIFACT], impatient, tmp_path)
    step = todo.steps[1]
    assert (step.state, step.have) == ("partial", 3000)
    assert part_of(target, step.file).read_bytes() == tree[PARAMS][:3000]
    hub.trouble.clear()
    hub.asked.clear()
    fetch(todo)
    assert target.read_bytes() == tree[PARAMS]
    assert [one.range for one in hub.gets("/cdn/")] == ["bytes=3000-"]


def test_a_part_of_another_content_is_not_continued(hub, source, tmp_path):
    old, new = single_layer(FOLDER, seed=1), single_layer(FOLDER, seed=2)
    hub.add(REPO, old)
    hub.trouble += [Fault("GET", "params", cut=3000), Fault("GET", "params", status=404)]
    with pytest.raises(ArtifactNotFoundError):
        bring(source, tmp_path)
    hub.add(REPO, new)
    bring(source, tmp_path)
    assert (tmp_path / REPO / PARAMS).read_bytes() == new[PARAMS]


def test_a_server_without_ranges_is_read_from_the_start(hub, source, tmp_path):
    tree = single_layer(FOLDER)
    hub.add(REPO, tree)
    hub.trouble += [Fault("GET", "params", cut=5000), Fault("GET", "params", ignore_range=True)]
    bring(source, tmp_path)
    assert (tmp_path / REPO / PARAMS).read_bytes() == tree[PARAMS]


def test_a_damaged_part_is_found_by_its_hash_and_fetched_anew(hub, source, tmp_path):
    tree = single_layer(FOLDER)
    hub.add(REPO, tree)
    todo = plan([ARTIFACT], source, tmp_path)
    step = todo.steps[1]
    step.target.parent.mkdir(parents=True)
    part_of(step.target, step.file).write_bytes(b"\0" * 8000)
    fetch(todo)
    assert step.target.read_bytes() == tree[PARAMS]
    assert [one.range for one in hub.gets("/cdn/")] == ["bytes=8000-", None]


@pytest.mark.parametrize("name", ["params.safetensors", "config.json"])
def test_content_other_than_announced_is_refused(hub, source, tmp_path, name):
    tree = single_layer(FOLDER)
    hub.add(REPO, tree)
    wrong = made_up(len(tree[f"{FOLDER}/{name}"]), seed=9)
    hub.trouble += [Fault("GET", name, swap=wrong)] * 2
    with pytest.raises(FormatError, match=r"not what .* announced"):
        bring(source, tmp_path)
    assert name not in " ".join(files(tmp_path))


def test_more_bytes_than_announced_are_refused(hub, source, tmp_path):
    tree = single_layer(FOLDER)
    hub.add(REPO, tree)
    hub.trouble += [Fault("GET", "params", swap=tree[PARAMS] + b"more")]
    with pytest.raises(FormatError, match="longer than"):
        bring(source, tmp_path)
    assert not (tmp_path / REPO / PARAMS).exists()


def test_a_gated_repository_is_refused_with_the_way_in(hub, source, tmp_path):
    hub.gated.add(REPO)
    with pytest.raises(ArtifactRefusedError, match=r"\(401\).*accept its licence"):
        plan([ARTIFACT], source, tmp_path)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_midway_is_a_sentence(hub, source, tmp_path, status):
    hub.add(REPO, single_layer(FOLDER))
    hub.trouble += [Fault("GET", "params", status=status)]
    with pytest.raises(ArtifactRefusedError, match=str(status)):
        bring(source, tmp_path)
    assert not (tmp_path / REPO / PARAMS).exists()


def test_what_is_not_there_is_named(hub, source, tmp_path):
    with pytest.raises(ArtifactNotFoundError, match="no repository 'google/gemma-scope-2-1b-pt'"):
        plan([ARTIFACT], source, tmp_path)
    hub.add(REPO, {"README.md": b"empty"})
    with pytest.raises(ArtifactNotFoundError, match="no revision 'v9'"):
        plan([ARTIFACT], source, tmp_path, revision="v9")
    with pytest.raises(ArtifactNotFoundError, match=r"has no resid_post/.*params\.safetensors"):
        plan([ARTIFACT], source, tmp_path)
    hole = find("gemma-scope-2-27b-it/transcoder_all/layer_4_width_16k_l0_small")
    hub.add(hole.repo, {"README.md": b"empty"})
    with pytest.raises(ArtifactNotFoundError, match="not in SAELens' registry"):
        plan([hole], source, tmp_path)
    assert files(tmp_path) == []


def test_a_missing_config_is_said_and_does_not_hinder(hub, source, tmp_path):
    hub.add(REPO, single_layer(FOLDER, config=False))
    todo = plan([ARTIFACT], source, tmp_path)
    assert todo.not_published == (f"{ARTIFACT.name}/config.json",)
    fetch(todo)
    assert files(tmp_path / REPO / FOLDER) == ["gemscope.json", "params.safetensors"]


def test_a_busy_hub_is_waited_for_as_long_as_it_asks(hub, source, tmp_path, waits):
    hub.add(REPO, single_layer(FOLDER))
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    hub.trouble += [
        Fault("API", status=429, headers={"Retry-After": "7"}),
        Fault("HEAD", "params", status=429, headers={"RateLimit": '"resolvers";r=0;t=11'}),
        Fault("GET", "config", status=503),
        Fault("GET", "params", status=429, headers={"Retry-After": soon}),
    ]
    bring(source, tmp_path)
    assert waits[:3] == [7.0, 12.0, 1.0]
    assert 80 < waits[3] <= 90
    assert hub.trouble == []


def test_a_busy_hub_is_not_waited_for_too_long_or_too_often(hub, source, tmp_path, waits):
    hub.add(REPO, single_layer(FOLDER))
    hub.trouble += [Fault("GET", "params", status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(ArtifactUnreachableError, match="asks to wait 3600 s"):
        bring(source, tmp_path)
    assert waits == []
    hub.trouble += [Fault("GET", "params", status=429)] * 6
    with pytest.raises(ArtifactUnreachableError, match=r"6 tries \(the hub answers 429, too many requests\)"):
        bring(source, tmp_path)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert not (tmp_path / REPO / PARAMS).exists()


def test_a_hub_that_is_not_there_is_said_at_once(tmp_path, waits):
    with pytest.raises(ArtifactUnreachableError, match="cannot be reached"):
        plan([ARTIFACT], open_source("http://127.0.0.1:9", Patience(sleep=waits)), tmp_path)
    assert sum(waits) <= 3


def test_the_stored_token_goes_to_no_mirror(hub, source, tmp_path, monkeypatch):
    hub.add(REPO, single_layer(FOLDER))
    bring(source, tmp_path / "mirror")
    assert {one.token for one in hub.asked} == {None}
    hub.asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    bring(source, tmp_path / "own")
    assert {one.token for one in hub.asked if "/cdn/" not in one.path} == {"Bearer hf_secret"}
    assert {one.token for one in hub.asked if "/cdn/" in one.path} == {None}


def test_a_full_disk_leaves_nothing_under_the_name_and_the_next_run_goes_on(hub, source, tmp_path, monkeypatch):
    tree = single_layer(FOLDER, size=3 << 20)
    hub.add(REPO, tree)
    append = downloads._Part.append
    monkeypatch.setattr(downloads, "_Part", _Full)
    with pytest.raises(StorageError, match=r"the disk is full: .*params\.safetensors was not written"):
        bring(source, tmp_path)
    target = tmp_path / REPO / PARAMS
    assert not target.exists()
    monkeypatch.undo()
    assert append is downloads._Part.append
    bring(source, tmp_path)
    assert target.read_bytes() == tree[PARAMS]
    assert hub.gets("/cdn/")[-1].range is not None


class _Full(downloads._Part):
    def append(self, chunk):
        if self.size >= 1 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().append(chunk)


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(hub, source, tmp_path, monkeypatch):
    hub.add(REPO, single_layer(FOLDER))
    todo = plan([ARTIFACT], source, tmp_path / "not yet there")
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: _Free(todo.left - 1))
    with pytest.raises(StorageError, match="too small"):
        fetch(todo)
    assert hub.gets() == []
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: _Free(todo.left))
    check_space(todo)


class _Free:
    def __init__(self, free):
        self.free = free


def test_a_folder_serves_as_a_hub_and_keeps_the_provenance(hub, source, tmp_path):
    tree = single_layer(FOLDER)
    commit = hub.add(REPO, tree)
    bring(source, tmp_path / "first")
    hub.asked.clear()
    copied = bring(open_source(tmp_path / "first"), tmp_path / "second")
    target = tmp_path / "second" / REPO / PARAMS
    assert hub.asked == []
    assert target.read_bytes() == tree[PARAMS]
    assert copied[target].revision == commit
    assert copied[target].checked == "sha256"
    # a file there that is damaged, under a record that is not
    (tmp_path / "first" / REPO / PARAMS).write_bytes(made_up(len(tree[PARAMS]), seed=4))
    with pytest.raises(FormatError, match="not what"):
        bring(open_source(tmp_path / "first"), tmp_path / "third")
    assert not (tmp_path / "third" / REPO / PARAMS).exists()


def test_a_plain_folder_has_no_revisions_and_may_lack_things(tmp_path):
    place = tmp_path / "hub" / REPO / FOLDER
    place.mkdir(parents=True)
    folder = open_source(tmp_path / "hub")
    with pytest.raises(ArtifactNotFoundError, match="has no resid_post"):
        plan([ARTIFACT], folder, tmp_path / "out")
    (place / "params.safetensors").write_bytes(made_up(5000))
    with pytest.raises(InputError, match="no revisions"):
        plan([ARTIFACT], folder, tmp_path / "out", revision="v1")
    [(target, entry)] = bring(folder, tmp_path / "out").items()
    assert target.read_bytes() == made_up(5000)
    assert (entry.checked, entry.revision) == ("length", None)
    with pytest.raises(ArtifactNotFoundError, match="no repository"):
        plan([find("gemma-scope-2-4b-it/clt/width_262k_l0_big".replace("4b-it", "1b-it"))], folder, tmp_path / "out")


def test_nothing_is_written_through_a_link_that_leads_out(hub, source, tmp_path):
    hub.add(REPO, single_layer(FOLDER))
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "google").symlink_to(elsewhere)
    with pytest.raises(InputError, match="leads out"):
        bring(source, out)
    (out / "google").unlink()
    todo = plan([ARTIFACT], source, out)
    step = todo.steps[1]
    step.target.parent.mkdir(parents=True)
    (elsewhere / "victim").write_bytes(b"mine")
    part_of(step.target, step.file).symlink_to(elsewhere / "victim")
    with pytest.raises(StorageError, match="is a link"):
        fetch(todo)
    assert (elsewhere / "victim").read_bytes() == b"mine"
    assert files(elsewhere) == ["victim"]


def test_a_file_of_someone_else_is_not_replaced(hub, source, tmp_path):
    tree = single_layer(FOLDER)
    hub.add(REPO, tree)
    target = tmp_path / REPO / PARAMS
    target.parent.mkdir(parents=True)
    target.write_bytes(b"my own work")
    with pytest.raises(InputError, match="gemscope did not fetch it"):
        plan([ARTIFACT], source, tmp_path)
    assert target.read_bytes() == b"my own work"
    target.write_bytes(tree[PARAMS])  # the same content is taken over
    bring(source, tmp_path)
    assert hub.gets("params") == []


def test_two_fetches_of_one_file_do_not_mix(hub, source, tmp_path):
    hub.add(REPO, single_layer(FOLDER))
    todo = plan([ARTIFACT], source, tmp_path)
    step = todo.steps[1]
    step.target.parent.mkdir(parents=True)
    lock = FileLock(part_of(step.target, step.file).with_suffix(".lock"))
    with lock, pytest.raises(InputError, match="another process"):
        fetch(todo)
    fetch(todo)


@pytest.mark.parametrize(("measured", "chosen"), [((22, 38, 71, 139, 294), 71), ((60, 140), 60), ((3,), 3)])
def test_the_canonical_one_of_gemma_scope_1_is_looked_up(hub, source, tmp_path, measured, chosen):
    artifact = find("gemma-scope-2b-pt-res/layer_20/width_16k/canonical")
    tree = {f"layer_20/width_16k/average_l0_{l0}/params.npz": made_up(2000, l0) for l0 in measured}
    hub.add(artifact.repo, tree)
    [(target, _)] = bring(source, tmp_path, artifact).items()
    assert target.relative_to(tmp_path / artifact.repo).as_posix() == (
        f"layer_20/width_16k/average_l0_{chosen}/params.npz"
    )
    assert target.read_bytes() == made_up(2000, chosen)


def test_a_transcoder_of_gemma_scope_1_must_be_named_when_there_are_several(hub, source, tmp_path):
    artifact = find("gemma-scope-2b-pt-transcoders/layer_19/width_16k")
    hub.add(artifact.repo, {f"layer_19/width_16k/average_l0_{l0}/params.npz": b"0" for l0 in (12, 90)})
    with pytest.raises(InputError, match=r"average_l0_12, .*average_l0_90"):
        plan([artifact], source, tmp_path)
    named = find("gemma-scope-2b-pt-transcoders/layer_19/width_16k/average_l0_12")
    assert plan([named], source, tmp_path).size == 1


@pytest.mark.parametrize("revision", ["", "../main", "a b", "x?y"])
def test_a_strange_revision_is_refused_before_anything_is_asked(hub, source, tmp_path, revision):
    with pytest.raises(InputError, match="no revision"):
        plan([ARTIFACT], source, tmp_path, revision=revision)
    assert hub.asked == []


@pytest.mark.parametrize("where", ["ftp://somewhere", "http://", "http://[", "/no/such/folder"])
def test_a_hub_that_is_neither_address_nor_folder_is_refused(where):
    with pytest.raises(InputError, match="neither"):
        open_source(where)


def test_a_crosscoder_has_one_file_per_layer(hub, source, tmp_path):
    artifact = find("gemma-scope-2-1b-pt/crosscoder/layer_7_13_17_22_width_262k_l0_medium")
    names = [f"params_layer_{i}.safetensors" for i in range(4)]
    hub.add(artifact.repo, {f"{artifact.folder}/{name}": made_up(100, i) for i, name in enumerate(names)})
    assert [path.name for path in bring(source, tmp_path, artifact)] == names
