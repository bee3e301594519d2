"""Gemma Scope 1's files: paths, spellings, transcoders without gain, embedding SAEs, and nothing unpickled."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from gemscope.artifacts import formats, gemma_scope_1
from gemscope.core.errors import FormatError, InputError
from gemscope.core.sites import Site
from unit.artifacts import makers

PATHS = {
    "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71": ("resid_post.20", "google/gemma-2-2b", 71.0),
    "gemma-scope-9b-it-res/layer_9/width_131k/average_l0_121": ("resid_post.9", "google/gemma-2-9b-it", 121.0),
    "gemma-scope-9b-pt-att/layer_3/width_16k/average_l0_52": ("z.3", "google/gemma-2-9b", 52.0),
    "models--google--gemma-scope-2b-pt-mlp/snapshots/abc/layer_4/width_16k/average_l0_85": (
        "mlp_out.4",
        "google/gemma-2-2b",
        85.0,
    ),
    "gemma-scope-27b-pt-res/layer_22/width_131k/average_l0_82": ("resid_post.22", "google/gemma-2-27b", 82.0),
}


@pytest.mark.parametrize("path", PATHS)
def test_site_model_and_l0_are_read_off_the_path(tmp_path, path):
    tensors = makers.weights()
    loaded = formats.load(makers.folder_1(tmp_path / path, tensors))
    assert (str(loaded.config.site), loaded.config.model, loaded.config.l0) == PATHS[path]
    x = makers.rows()
    assert (loaded.dictionary.double()(x.double()) - makers.oracle(tensors, x)).abs().max() < 1e-12


def test_transcoders_read_the_norm_without_its_gain(tmp_path):
    path = tmp_path / "gemma-scope-2b-pt-transcoders/layer_19/width_16k/average_l0_12"
    loaded = formats.load(makers.folder_1(path, makers.weights()))
    assert loaded.config.kind == "transcoder"
    assert (loaded.config.reads[0], loaded.config.writes[0]) == (Site("mlp_in", 19), Site("mlp_out", 19))
    assert not loaded.config.read_gain


def test_folding_the_gain_makes_it_a_transcoder_of_the_norms_output(tmp_path):
    path = tmp_path / "gemma-scope-2b-pt-transcoders/layer_19/width_16k/average_l0_12"
    tensors = makers.weights()
    loaded = formats.load(makers.folder_1(path, tensors))
    gain, x = torch.rand(makers.D_IN) + 0.5, makers.rows()
    folded = loaded.dictionary.double().fold_input_gain(gain.double())
    assert (folded(x.double() * gain.double()) - makers.oracle(tensors, x)).abs().max() < 1e-10


@pytest.mark.parametrize("lower", [False, True])
def test_there_and_back_is_the_same_bytes(tmp_path, lower):
    path = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    folder = makers.folder_1(tmp_path / "a" / path, makers.weights(), lower=lower)
    loaded = formats.load(folder)
    lost = formats.save(tmp_path / "b" / path, loaded.dictionary, loaded.config, format="gemma-scope-1")
    assert lost == ()
    makers.same_files(folder, tmp_path / "b" / path, "params.npz")


def test_a_folder_named_otherwise_loses_what_the_name_said(tmp_path):
    folder = makers.folder_1(tmp_path / "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", makers.weights())
    loaded = formats.load(folder)
    lost = formats.save(tmp_path / "mine", loaded.dictionary, loaded.config, format="gemma-scope-1")
    assert len(lost) == 3
    with pytest.raises(FormatError, match="--site"):
        formats.load(tmp_path / "mine")
    with pytest.raises(FormatError, match="--model"):
        formats.load(tmp_path / "mine", site="resid_post.20")
    again = formats.load(tmp_path / "mine", site="resid_post.20", model="google/gemma-2-2b")
    assert again.config.site == loaded.config.site


def test_canonical_is_the_l0_closest_to_100(tmp_path):
    base = tmp_path / "gemma-scope-2b-pt-res/layer_20/width_16k"
    for seed, l0 in enumerate((22, 38, 71, 139, 294)):
        makers.folder_1(base / f"average_l0_{l0}", makers.weights(seed=seed))
    assert formats.load(base / "canonical").config.l0 == 71
    makers.folder_1(base / "average_l0_129", makers.weights())
    assert formats.load(base / "canonical").config.l0 == 71


def test_a_scaling_factor_must_be_all_ones(tmp_path):
    path = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    good = makers.folder_1(tmp_path / "a" / path, makers.weights(), scaling_factor=torch.ones(makers.D_SAE))
    assert formats.load(good).dictionary.d_sae == makers.D_SAE
    bad = makers.folder_1(tmp_path / "b" / path, makers.weights(), scaling_factor=torch.full((makers.D_SAE,), 2.0))
    with pytest.raises(FormatError, match="scaling_factor"):
        formats.load(bad)


def test_an_embedding_sae_applies_to_embeddings_as_the_model_reads_them(tmp_path):
    """It was made for the table's rows u; the model's embedding is sqrt(d) u."""
    path = "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_44"
    tensors = makers.weights()
    loaded = formats.load(makers.folder_1(tmp_path / "a" / path, tensors))
    assert str(loaded.config.site) == "embed"
    u, scale = makers.rows(), makers.D_IN**0.5
    assert torch.allclose(loaded.dictionary(u * scale).double(), makers.oracle(tensors, u) * scale, atol=1e-5)
    pre = u.double() @ tensors["w_enc"].double() + tensors["b_enc"].double()
    assert torch.allclose(
        loaded.dictionary.encode(u * scale).double(), makers.jump(pre, tensors["threshold"]), atol=1e-5
    )
    formats.save(tmp_path / "b" / path, loaded.dictionary, loaded.config, format="gemma-scope-1")
    with np.load(tmp_path / "b" / path / "params.npz") as again:
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            np.testing.assert_allclose(again[name], tensors[name.lower()], rtol=2e-7)


def test_what_gemma_scope_1_does_not_have_is_refused(tmp_path):
    two = makers.folder_2(tmp_path / "x", makers.weights(), makers.config_2("transcoder"))
    loaded = formats.load(two)
    with pytest.raises(InputError, match="without the norm's gain"):
        gemma_scope_1.save(tmp_path / "y", loaded.dictionary, loaded.config)
    clt = formats.load(makers.multi_folder_2(tmp_path / "c", makers.multi_weights(), makers.config_clt()))
    with pytest.raises(InputError, match="no clt"):
        gemma_scope_1.save(tmp_path / "y", clt.dictionary, clt.config)


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (open, ("/tmp/gemscope-was-unpickled", "w"))


def test_a_pickle_in_the_file_is_not_run(tmp_path):
    folder = makers.folder_1(tmp_path / "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", makers.weights())
    array = np.empty(1, dtype=object)
    array[0] = Bomb()
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    with zipfile.ZipFile(folder / "params.npz", "a") as archive:
        archive.writestr("W_more.npy", buffer.getvalue())
    with pytest.raises(FormatError, match=r"nothing else is read|damaged"):
        formats.load(folder)
    (folder / "params.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FormatError):
        formats.load(folder)
    from pathlib import Path

    assert not Path("/tmp/gemscope-was-unpickled").exists()


def test_a_header_that_claims_more_than_is_there_allocates_nothing(tmp_path):
    folder = makers.folder_1(tmp_path / "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", makers.weights())
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 20)})
    with zipfile.ZipFile(folder / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", header.getvalue() + bytes(16))
    with pytest.raises(FormatError, match="header asks for"):
        formats.load(folder)


def test_what_a_damaged_archive_makes_its_reader_say_is_cut_to_a_sentence(tmp_path):
    folder = makers.folder_1(tmp_path / "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", makers.weights())
    path = folder / "params.npz"
    content = bytearray(path.read_bytes())
    content[27] = 5  # the first array's name is now 1,280 bytes longer, most of them of its header
    path.write_bytes(bytes(content))
    with pytest.raises(FormatError, match="damaged") as caught:
        formats.load(folder)
    assert len(str(caught.value)) < len(str(path)) + 300
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("W\n" * 1000 + ".npy", b"\x93NUMPY\x09\x00")
    with pytest.raises(FormatError, match="npy version") as caught:
        formats.load(folder)
    assert len(str(caught.value)) < len(str(path)) + 300
    assert "\n" not in str(caught.value)
