"""Rows of activations: saved and read back, split by document, shuffled alike for every site."""

import pytest
import torch

from gemscope.activations.sets import ActivationSet, read_manifest
from gemscope.core.errors import FormatError, InputError
from gemscope.core.sites import Site

LOW, HIGH = Site("resid_post", 0), Site("mlp_in", 1)


def made(rows: int = 57, dtype: torch.dtype = torch.bfloat16) -> ActivationSet:
    number = torch.arange(rows)
    return ActivationSet(
        data={HIGH: torch.stack([number, -number], 1).to(dtype), LOW: number[:, None].to(dtype)},
        doc=number // 5,
        pos=number % 5 + 1,
        token=number + 100,
        about={"model": "tiny"},
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_saved_set_reads_back_the_same(tmp_path, dtype):
    kept = made(dtype=dtype)
    kept.save(tmp_path / "acts")
    back = ActivationSet.load(tmp_path / "acts")
    assert back.sites == [LOW, HIGH]
    assert back.rows == len(back) == 57
    assert back.about == {"model": "tiny"}
    for site in kept.sites:
        assert torch.equal(back[site], kept[site])
        assert back[site].dtype == dtype
    for name in ("doc", "pos", "token"):
        assert torch.equal(getattr(back, name), getattr(kept, name))
    assert read_manifest(tmp_path / "acts")["sites"] == {"resid_post.0": 1, "mlp_in.1": 2}


def test_batches_show_every_site_the_same_rows_once_per_epoch():
    kept = made()
    seen = list(kept.batches(kept.sites, 8, seed=3, epoch=1))
    low = torch.cat([batch[LOW][:, 0] for batch in seen])
    high = torch.cat([batch[HIGH] for batch in seen])
    assert [len(batch[LOW]) for batch in seen] == [8] * 7 + [1]
    assert len(low.unique()) == 57
    assert torch.equal(high[:, 0], low)
    assert torch.equal(high[:, 1], -low)
    assert (kept.width(LOW), kept.width(HIGH)) == (1, 2)


def test_the_order_depends_on_seed_and_epoch_and_not_on_the_sites():
    kept = made()

    def order(sites, seed, epoch):
        return torch.cat([batch[LOW][:, 0] for batch in kept.batches(sites, 57, seed=seed, epoch=epoch)]).tolist()

    assert order([LOW], 0, 0) == order([HIGH, LOW], 0, 0)
    assert len({tuple(order([LOW], *key)) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4
    assert order([LOW], 0, 0) != sorted(order([LOW], 0, 0))


def test_a_split_parts_documents_and_not_rows_and_is_stable():
    kept = made(500)
    train, out = kept.split(0.3, seed=1)
    assert not set(train.doc.tolist()) & set(out.doc.tolist())
    assert train.rows + out.rows == 500
    assert 0.15 < out.rows / 500 < 0.45
    assert torch.equal(out[LOW][:, 0].float(), torch.arange(500)[torch.isin(kept.doc, out.doc)].bfloat16().float())
    longer = made(1000).split(0.3, seed=1)[1]
    assert set(out.doc.tolist()) <= set(longer.doc.tolist())
    assert set(out.doc.tolist()) != set(kept.split(0.3, seed=2)[1].doc.tolist())
    with pytest.raises(InputError, match="outside"):
        kept.split(1.0)


def test_unknown_sites_and_empty_batches_are_refused():
    kept = made()
    with pytest.raises(InputError, match=r"no activations of resid_post\.5"):
        kept["resid_post.5"]
    with pytest.raises(InputError, match="below 1"):
        next(kept.batches([LOW], 0))


def test_damaged_folders_are_refused(tmp_path):
    folder = tmp_path / "acts"
    with pytest.raises(FormatError):
        ActivationSet.load(folder)
    made().save(folder)
    path = folder / "resid_post.0.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FormatError, match="truncated"):
        ActivationSet.load(folder)
    made(30).save(tmp_path / "other")
    (tmp_path / "other" / "rows.safetensors").replace(folder / "rows.safetensors")
    with pytest.raises(FormatError, match="57 rows"):
        ActivationSet.load(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(FormatError, match=r"no gemscope\.activations"):
        ActivationSet.load(folder)
