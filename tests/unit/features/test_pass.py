"""Counts, histograms, examples and samples equal those of a slow count, whoever counted and however often it died."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gemscope.activations.harvesting import Slice
from gemscope.activations.sets import ActivationSet
from gemscope.activations.store import Store
from gemscope.artifacts.config import DictionaryConfig, Loaded
from gemscope.core.errors import InputError
from gemscope.core.files import write_tensors
from gemscope.core.sites import Site
from gemscope.dictionaries.sparse import Support
from gemscope.features import index as whole_index
from gemscope.features import passing
from gemscope.features.blocks import LiveRows, SetRows, StoreRows, Where
from gemscope.features.config import IndexConfig
from gemscope.features.effects import partners
from gemscope.features.finishing import quantile_groups, write_contexts
from gemscope.features.index import FeatureIndex, index
from gemscope.features.layout import bfloat16
from unit.activations import small
from unit.dictionaries.zoo import random_dictionary
from unit.features import brute
from unit.models.tiny_gemma import TEXTS, gemma

SITE = Site("resid_post", 0)
CONFIG = IndexConfig(top=4, groups=3, per_group=2, sample=9, window=3, nearest=2, partners=3)


def tied_rows(documents: int, longest: int, width: int, seed: int) -> ActivationSet:
    """Small whole numbers, so that many activations are equal."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest, documents)
    doc = np.repeat(np.arange(documents), lengths)
    pos = np.concatenate([np.arange(1, n + 1) for n in lengths])
    x = torch.from_numpy(random.integers(-2, 3, (len(doc), width))).float()
    columns = (torch.from_numpy(c) for c in (doc, pos, random.integers(0, 300, len(doc))))
    return ActivationSet({SITE: x}, *columns)


def whole_numbers(width: int = 5, d_sae: int = 13) -> Loaded:
    """An SAE whose activations of whole numbers are whole numbers."""
    sae = random_dictionary("sae", d_in=width, d_sae=d_sae, dtype=torch.float32)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.threshold):
            parameter.copy_(parameter.mul(1.5).round())
        sae.threshold.clamp_(min=0)
    return Loaded(sae, DictionaryConfig.of(sae, SITE, model="tiny"))


def check(part, name, expected, config=CONFIG):
    tally = part.tallies[name]
    tally.top.settle()
    for latent, want in enumerate(expected):
        assert int(tally.count[latent]) == want["count"]
        assert float(tally.peak[latent]) == np.float32(want["peak"])
        assert int(tally.special_count[latent]) == want["special_count"]
        assert float(tally.special_peak[latent]) == np.float32(want["special_peak"])
        bins = tally.histogram[latent]
        assert {int(b): int(bins[b]) for b in bins.nonzero()[:, 0]} == want["histogram"]
        steps = tally.steps[latent]
        assert {int(s): int(steps[s]) for s in steps.nonzero()[:, 0]} == want["steps"]
        there = int((tally.top.score[latent] >= 0).sum())
        places = [(int(p) >> 31, int(p) & 0x7FFFFFFF) for p in tally.top.place[latent, :there]]
        top = [(float(v), *p) for v, p in zip(tally.top.value[latent, :there], places, strict=True)]
        assert top == want["top"]
        half = config.window
        for rank, near in enumerate(want["near"]):
            row = tally.top.near[latent, rank].float()
            got = {int(i) - half: float(row[i]) for i in row.nonzero()[:, 0] if int(i) != half}
            assert got == near


@pytest.mark.parametrize("chunk", [7, 8192])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_rows_with_ties(tmp_path, monkeypatch, chunk, seed):
    monkeypatch.setattr(passing, "CHUNK_ROWS", chunk)
    rows, loaded = tied_rows(40, 12, 5, seed), whole_numbers()
    source = SetRows(rows, unit_rows=60)
    assert source.units > 2
    assert passing.count_units(tmp_path / "i", source, {"a": loaded}, CONFIG)
    part = passing.whole(tmp_path / "i", {"a": loaded}, CONFIG, source)
    acts = loaded.dictionary.encode(rows[SITE])
    plain = [False] * rows.rows
    expected = brute.counted(acts, rows.doc.tolist(), rows.pos.tolist(), [0] * rows.rows, plain, 4, 3)
    assert any(len({v for v, *_ in one["top"]}) < len(one["top"]) for one in expected)
    check(part, "a", expected)
    assert part.rows == rows.rows
    assert int(part.steps.sum()) == rows.rows
    tally = part.tallies["a"]
    assert tally.pair_rows == rows.rows
    ranked, both = partners(*tally.pairs, tally.latents, 3)
    for latent, want in enumerate(brute.jaccard((acts > 0).numpy(), 3)):
        got = [(int(i), int(n)) for i, n in zip(ranked.ids[latent], both[latent], strict=True) if i >= 0]
        assert got == [(b, n) for b, n, _ in want]
        torch.testing.assert_close(ranked.values[latent, : len(want)], torch.tensor([j for *_, j in want]))


def test_samples_are_of_their_groups_and_each_active_token_is_equally_likely(tmp_path):
    rows, loaded = tied_rows(60, 12, 5, 3), whole_numbers()
    acts = loaded.dictionary.encode(rows[SITE])
    latent = int(((acts > 0).sum(0) - 60).abs().argmin())
    tokens = {(int(d), int(p)): float(a) for d, p, a in zip(rows.doc, rows.pos, acts[:, latent], strict=True) if a > 0}
    group = brute.groups_of(list(tokens.values()), 3)
    seen = dict.fromkeys(tokens, 0)
    rounds = 300
    for seed in range(rounds):
        config = replace(CONFIG, seed=seed)
        block = next(SetRows(rows).blocks(0, [SITE]))
        tally = passing.Tally(loaded.dictionary.n_latents, config, 1.0)
        tally.update(*passing.encode(Loaded(loaded.dictionary, loaded.config), block, 0, rows.rows), block.where)
        groups = quantile_groups(tally)[latent]
        for place, value, mine in zip(tally.sample.place[latent], tally.sample.value[latent], groups, strict=True):
            where = (int(place) >> 31, int(place) & 0x7FFFFFFF)
            assert tokens[where] == float(value)
            assert int(mine) == group[float(value)]
            seen[where] += 1
    assert sum(seen.values()) == rounds * 9
    expected = rounds * 9 / len(seen)
    # a draw without replacement varies a little less than a multinomial one
    chi = sum((n - expected) ** 2 / expected for n in seen.values()) / (1 - 9 / len(seen))
    freedom = len(seen) - 1
    assert abs(chi - freedom) < 4 * (2 * freedom) ** 0.5


def tallied(values, config):
    """A tally of one latent that has ``values`` on tokens of a document each, and the quantile groups of its sample."""
    n = len(values)
    one, none = torch.ones(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    where = Where(torch.arange(n), one, none, none, one, none.bool())
    tally = passing.Tally(1, config, 1.0)
    tally.update(Support(torch.arange(n), none, n, 1), torch.tensor(values), where)
    return tally, quantile_groups(tally)[0]


SPREADS = {
    "one bin": lambda random: 1 + 0.12 * random.random(800),
    "two bins": lambda random: 1.1 + 0.1 * random.random(800),
    "wide": lambda random: np.exp(random.normal(0, 1, 800)),
    "many equal ones": lambda random: np.maximum(1.06, 1 + 0.1 * random.random(800)),
}


@pytest.mark.parametrize("spread", SPREADS)
def test_groups_are_quantiles_of_all_activations(spread):
    """Each group has its share of the examples' true quantiles, to what a sample of 64 can tell."""
    values = SPREADS[spread](np.random.default_rng(0)).astype(np.float32).tolist()
    group = brute.groups_of(values, 5)
    shares = np.bincount([group[value] for value in values], minlength=5) / len(values)
    seen, right, total = np.zeros(5), 0, 0
    for seed in range(40):
        tally, groups = tallied(values, IndexConfig(window=2, seed=seed))
        assert len(groups) == 64
        for value, mine in zip(tally.sample.value[0].tolist(), groups.tolist(), strict=True):
            assert abs(mine - group[value]) <= 1
            seen[mine] += 1
            right += mine == group[value]
            total += 1
    assert np.abs(seen / total - shares).max() < 0.04
    assert right / total > 0.75


@pytest.mark.parametrize("n", [1, 7, 64])
def test_groups_of_few_activations_are_exact(n):
    random = np.random.default_rng(n)
    values = random.choice([1.01, 1.02, 1.05, 1.07, 1.09, 3.0, 3.1, 9.0], n).astype(np.float32).tolist()
    tally, groups = tallied(values, IndexConfig(window=2))
    group = brute.groups_of(values, 5)
    assert groups[:n].tolist() == [group[value] for value in tally.sample.value[0, :n].tolist()]
    assert groups[n:].tolist() == [-1] * (64 - n)


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    """A store of the tiny model with documents longer than its context, and dictionaries at its sites."""
    folder = small.store(tmp_path_factory.mktemp("store") / "s")
    made = {
        "resid_post.0": random_dictionary("sae", d_in=24, d_sae=20, dtype=torch.float32),
        "resid_post.2": random_dictionary("sae", d_in=24, d_sae=14, dtype=torch.float32, seed=1),
    }
    both = random_dictionary("crosscoder", d_in=24, d_sae=9, n=2, dtype=torch.float32)
    loaded = {name: Loaded(one, DictionaryConfig.of(one, Site.parse(name), model="tiny")) for name, one in made.items()}
    sites = (Site("resid_post", 0), Site("resid_post", 2))
    loaded["crosscoder"] = Loaded(both, DictionaryConfig.of(both, sites, model="tiny"))
    return Store.open(folder), loaded


def content(folder):
    """All files but those that say when and how."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".npy",):
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def test_a_store_gives_the_slow_count_by_contexts(harvested, tmp_path):
    store, loaded = harvested
    rows = StoreRows(store)
    assert passing.count_units(tmp_path / "i", rows, loaded, CONFIG)
    part = passing.whole(tmp_path / "i", loaded, CONFIG, rows)
    every = []
    for unit in range(rows.units):
        for block in rows.blocks(unit, [Site("resid_post", 2)]):
            every.append((block.where, block.rows(Site("resid_post", 2), 0, len(block.where))))
    doc, piece, pos, step = (
        torch.cat([getattr(w, name) for w, _ in every]) for name in ("doc", "piece", "pos", "step")
    )
    assert int(piece.max()) > 1
    assert int(step.max()) < 16
    order = ((doc << 31) | pos).argsort()
    acts = loaded["resid_post.2"].dictionary.encode(torch.cat([x for _, x in every]))[order]
    doc, piece, pos, step = (x[order].tolist() for x in (doc, piece, pos, step))
    expected = brute.counted(acts, doc, pos, piece, [False] * len(doc), 4, 3)
    for one, latent in zip(expected, range(acts.shape[1]), strict=True):
        steps = {}
        for row in (acts[:, latent] > 0).nonzero()[:, 0].tolist():
            steps[brute.step_range(step[row])] = steps.get(brute.step_range(step[row]), 0) + 1
        one["steps"] = steps
    check(part, "resid_post.2", expected)


def test_one_and_three_workers_give_the_same_bytes(harvested, tmp_path):
    store, loaded = harvested
    rows, model = StoreRows(store), small.model()
    assert index(tmp_path / "one", rows, loaded, CONFIG, gemma=model) is not None
    assert index(tmp_path / "three", rows, loaded, CONFIG, gemma=model, share=Slice(2, 3)) is None
    assert index(tmp_path / "three", rows, loaded, CONFIG, gemma=model, share=Slice(0, 3)) is None
    assert index(tmp_path / "three", rows, loaded, CONFIG, gemma=model, share=Slice(1, 3)) is not None
    assert content(tmp_path / "one") == content(tmp_path / "three")
    one, three = FeatureIndex.open(tmp_path / "one"), FeatureIndex.open(tmp_path / "three")
    assert list(one.database.every_label()) == list(three.database.every_label())
    assert {k: v for k, v in one.about.items() if k != "provenance"} == {
        k: v for k, v in three.about.items() if k != "provenance"
    }
    with pytest.raises(InputError, match="holds an index of other config"):
        index(tmp_path / "one", rows, loaded, replace(CONFIG, top=5), gemma=model)


def test_a_pass_that_is_killed_goes_on_to_the_same_bytes(harvested, tmp_path):
    store, loaded = harvested
    rows, model = StoreRows(store), small.model()
    index(tmp_path / "whole", rows, loaded, CONFIG, gemma=model)
    folder = tmp_path / "killed"

    def work():
        index(folder, rows, loaded, CONFIG, gemma=model, progress=lambda *_: time.sleep(0.05))

    process = small.forked(work)
    while process.is_alive() and len(list(folder.glob("counted/contexts/*"))) < 2:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = passing.counted_units(folder)
    assert 0 < len(done) < rows.units
    assert index(folder, rows, loaded, CONFIG, gemma=model, share=Slice(1, 2)) is None
    assert index(folder, rows, loaded, CONFIG, gemma=model) is not None
    assert content(folder) == content(tmp_path / "whole")
    assert not (folder / "counted").exists()


def test_slices_that_end_together_write_the_files_once(harvested, tmp_path, monkeypatch):
    store, loaded = harvested
    rows, model = StoreRows(store), small.model()
    index(tmp_path / "one", rows, loaded, CONFIG, gemma=model)
    folder, calls, begun, go = tmp_path / "two", [], threading.Event(), threading.Event()
    for number in range(2):
        passing.count_units(folder, rows, loaded, CONFIG, share=Slice(number, 2))
    real = whole_index.finish

    def slow(*arguments):
        calls.append(arguments)
        begun.set()
        assert go.wait(10)
        real(*arguments)

    both = threading.Barrier(2, timeout=10)
    monkeypatch.setattr(whole_index, "finish", slow)
    monkeypatch.setattr(whole_index, "count_units", lambda *_, **__: both.wait() >= 0)
    with ThreadPoolExecutor(2) as beside:
        ended = [beside.submit(index, folder, rows, loaded, CONFIG, gemma=model) for _ in range(2)]
        assert begun.wait(10)
        with pytest.raises(InputError, match="is writing into"):  # a slice that is run again meanwhile
            passing.count_units(folder, rows, loaded, CONFIG, share=Slice(1, 2))
        go.set()
        assert all(one.result() is not None for one in ended)
    assert len(calls) == 1
    assert content(folder) == content(tmp_path / "one")
    assert passing.count_units(folder, rows, loaded, CONFIG, share=Slice(1, 2))
    assert not (folder / "counted").exists()


@pytest.mark.parametrize(("site", "width"), [("resid_post.0", 40), ("resid_post.1", 24)])
def test_a_dictionary_of_other_rows_is_refused_before_anything_is_written(harvested, tmp_path, site, width):
    sae = random_dictionary("sae", d_in=width, d_sae=16, dtype=torch.float32)
    other = {"other": Loaded(sae, DictionaryConfig.of(sae, Site.parse(site), model="tiny"))}
    with pytest.raises(InputError, match=site):
        index(tmp_path / "i", StoreRows(harvested[0]), other, CONFIG, gemma=small.model())
    assert not (tmp_path / "i").exists()


def write_units(folder, units, size, documents, order):
    """Units of documents of equal length, each with its tokens numbered on; numbered in ``order``."""
    for number, unit in enumerate(order):
        at = torch.arange(size) + unit * size
        doc, pos = at // (size // documents), at % (size // documents)
        columns = {"doc": doc.int(), "pos": pos.int(), "piece": (pos >= 100).int(), "token": at.int()}
        path = folder / "counted" / "contexts" / f"{number:06d}.safetensors"
        write_tensors(path, {**columns, "special": (pos == 0).to(torch.uint8)})
    return units * size


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_contexts_are_written_by_document_and_piece(tmp_path, order):
    count = write_units(tmp_path, 3, 600, 4, order)
    places, tokens = write_contexts(tmp_path, count)
    assert tokens.tolist() == np.load(tmp_path / "tokens.npy").tolist() == list(range(1800))
    assert [divmod(place, 1 << 31) for place in places.tolist()] == [divmod(at, 150) for at in range(1800)]
    assert np.load(tmp_path / "starts.npy").tolist() == [150 * doc + at for doc in range(12) for at in (0, 100)]
    assert np.load(tmp_path / "docs.npy").tolist() == [doc for doc in range(12) for _ in range(2)]
    special = np.unpackbits(np.load(tmp_path / "special.npy"))[:1800]
    assert np.flatnonzero(special).tolist() == list(range(0, 1800, 150))


def test_writing_the_contexts_takes_few_bytes_a_token(tmp_path):
    count = write_units(tmp_path, 32, 1 << 16, 256, range(32))
    read, write = os.pipe()

    def status(field):
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024

    def work():
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        write_contexts(tmp_path, count)
        os.write(write, f"{status('VmHWM') - before}".encode())

    process = small.forked(work)
    process.join()
    assert process.exitcode == 0
    assert int(os.read(read, 100)) < 24 * count
    os.close(read)
    os.close(write)


def test_a_model_on_the_fly_counts_special_tokens_apart(tmp_path):
    model = gemma("gemma3")
    items = [model.tokens(text) for text in TEXTS] + [model.chat("hello world"), model.chat("we like Paris")]
    loaded = {"resid_post.1": None}
    sae = random_dictionary("sae", d_in=24, d_sae=15, dtype=torch.float32)
    loaded["resid_post.1"] = Loaded(sae, DictionaryConfig.of(sae, Site("resid_post", 1), model="tiny"))
    rows = LiveRows(model, items, unit_tokens=20, batch_tokens=64)
    assert rows.units > 1
    built = index(tmp_path / "i", rows, loaded, CONFIG, gemma=model)
    acts, doc, pos, special = [], [], [], []
    for number, item in enumerate(items):
        x = model.capture(item, ["resid_post.1"])["resid_post.1"][0]
        acts.append(sae.encode(x))
        doc += [number] * len(item)
        pos += range(len(item))
        special += (~item.content_mask).tolist()
    expected = brute.counted(torch.cat(acts), doc, pos, [0] * len(doc), special, 4, 3)
    records = built.latents("resid_post.1").records
    for latent, want in enumerate(expected):
        assert records["count"][latent] == want["count"]
        assert records["density"][latent] == want["count"] / (len(doc) - sum(special))
        assert records["special_count"][latent] == want["special_count"]
        assert records["special_peak"][latent] == pytest.approx(want["special_peak"], rel=1e-4)
        page = built.feature(f"resid_post.1/{latent}", before=None, after=None)
        assert [(e.doc, e.marked) for e in page.top] == [(d, p) for _, d, p in want["top"]]
        assert [e.value for e in page.top] == pytest.approx([v for v, *_ in want["top"]], rel=1e-4)
        for example in page.top:
            assert (
                "".join(example.tokens)
                == "<bos>" * (not items[example.doc].text.startswith("<bos>")) + items[example.doc].text
            )
    assert bfloat16(np.array([0x3F80], np.uint16))[0] == 1.0
