"""The format's document against what is written, and its few lines against what is read."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from gemscope.activations.store import Store
from unit.activations import small

DOCUMENT = (Path(__file__).parents[3] / "docs" / "formats.md").read_text("utf-8")
SECTION = DOCUMENT[DOCUMENT.index("## Store") :].split("\n## ")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from dataclasses import replace

    config = replace(small.CONFIG, sites=("resid_post.3", "mlp_act.1"))
    return small.store(tmp_path_factory.mktemp("s") / "store", config)


def fields(title: str) -> set[str]:
    part = SECTION[SECTION.index(f"### {title}") :].split("\n### ")[0]
    cells = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_lines_of_the_document_read_a_shard(folder, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    assert len([line for line in code.splitlines() if "import" not in line]) <= 5
    monkeypatch.chdir(folder.parent)
    names: dict = {}
    exec(code, names)
    store = Store.open(folder)
    assert torch.equal(torch.from_numpy(names["acts"]), store.shard("resid_post.3", 0).float())
    assert np.array_equal(names["rows"]["token"], store.origin(0).token.numpy())
    with safe_open(folder / "acts/resid_post.3/000000.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("acts"), store.shard("resid_post.3", 0))


def test_every_json_field_is_in_the_document_and_the_other_way_round(folder):
    for title, name in (
        ("Fields of `plan.json`", "plan.json"),
        ("Fields of `units/UNIT.json`", "units/000001.json"),
        ("Fields of `manifest.json`", "manifest.json"),
    ):
        assert fields(title) == set(json.loads((folder / name).read_text()))
    assert fields("Tensors") == {"acts", "doc", "pos", "token"}
    manifest = json.loads((folder / "manifest.json").read_text())
    text = json.dumps(manifest["units"], sort_keys=True, separators=(",", ":"))
    assert manifest["units_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    plan = manifest["plan"]
    assert plan["id"] == hashlib.sha256(json.dumps(plan["config"], sort_keys=True).encode()).hexdigest()


def test_every_file_is_in_the_document_and_every_tensor_begins_where_it_says(folder):
    documented = re.findall(r"^\| `([a-z]+[^`]*)` \|", SECTION[: SECTION.index("### Tensors")], re.MULTILINE)
    patterns = [
        re.compile(name.replace("UNIT", r"\d{6}").replace("SITE", r"[a-z_.0-9]+").replace("*", ".*"))
        for name in documented
    ]
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith("."):
            assert any(pattern.fullmatch(name) for pattern in patterns), name
        if path.suffix == ".safetensors":
            assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 256 == 0


def test_a_bucket_is_ordered_as_the_document_says(folder):
    store = Store.open(folder)
    (plan,) = {store.plan.id}
    assert plan
    for record in store.manifest["units"]:
        origin, at = store.origin(record["unit"]), 0
        for number, rows in enumerate(record["buckets"]):
            order = np.random.default_rng([small.CONFIG.seed, record["unit"], number]).permutation(rows)
            keys = list(zip(origin.doc[at : at + rows].tolist(), origin.pos[at : at + rows].tolist(), strict=True))
            assert [keys[i] for i in order] == sorted(keys)
            at += rows
        assert at == record["rows"]
