"""Dictionaries that stay on disk: what they give is what the loaded one gives, and they read what they must."""

import json
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gemscope.artifacts import formats, native
from gemscope.artifacts.config import AnyDictionary, DictionaryConfig
from gemscope.artifacts.inspect import inspect
from gemscope.artifacts.lazy import LazyDictionary, Table
from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import read_tensors, write_tensors
from gemscope.core.sites import Site
from gemscope.core.tensor_files import TensorFile
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.multilayer import MultiLayer
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.single import SingleLayer
from gemscope.dictionaries.sparse import Slice
from unit.artifacts import makers
from unit.artifacts import test_round_trips as round_trips
from unit.dictionaries.zoo import ACTIVATIONS, KINDS, inputs, random_dictionary


def _saved(folder: Path, dictionary: AnyDictionary) -> LazyDictionary:
    reads = [Site("resid_post", i) for i in range(dictionary.n_positions)]
    native.save(folder, dictionary, DictionaryConfig.of(dictionary, reads, model="m"))
    return native.open_lazy(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_codes_and_reconstruction_are_those_of_the_loaded_one(
    kind: str, activation: Activation, dtype: torch.dtype, tmp_path: Path
) -> None:
    d = random_dictionary(kind, activation, dtype=dtype)
    lazy = _saved(tmp_path / "d", d)
    x = inputs(d, 6)
    support, values = d.encode_sparse(x)
    for memory in (1, 5 * 2 * 4 * d.d_in, 1 << 20):  # slices of 1, 5 and all latents
        found, again = lazy.encode_streamed(x, memory)
        assert torch.equal(found.rows, support.rows)
        assert torch.equal(found.latents, support.latents)
        torch.testing.assert_close(again, values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lazy.decode_sparse(support, values), d.decode_sparse(support, values))
    torch.testing.assert_close(lazy.reconstruct(x), d(x), rtol=1e-5, atol=1e-5)
    assert type(lazy.load()) is type(d)


def test_rows_by_index_are_exact_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    d = random_dictionary("transcoder", dtype=torch.float32)
    lazy = _saved(tmp_path / "a", d)
    assert isinstance(d, SingleLayer)
    assert torch.equal(lazy.decoder_rows([7, 0, 7]), d.decoder_rows([7, 0, 7]))
    assert torch.equal(lazy.encoder_columns([7, 0, 7]), d.encoder_columns([7, 0, 7]))
    with pytest.raises(InputError, match="no latent 13"):
        lazy.decoder_rows([13])
    c = random_dictionary("clt", dtype=torch.float32)
    lazy = _saved(tmp_path / "b", c)
    assert isinstance(c, MultiLayer)
    assert torch.equal(lazy.decoder_rows([4, 2], 0, 2), c.decoder_rows(0, [4, 2], 2))
    assert torch.equal(lazy.encoder_columns([4, 2], 1), c.encoder_columns(1, [4, 2]))
    with pytest.raises(InputError, match="position 2 do not write to 1"):
        lazy.decoder_rows([0], 2, 1)
    with pytest.raises(InputError, match="no position 3"):
        lazy.encoder_columns([0], 3)
    with pytest.raises(InputError, match=r"x has shape \(2, 5\).*\(3, 5\)"):
        lazy.encode_streamed(torch.zeros(2, 5))


def test_an_encoder_stored_with_a_latent_per_column_and_a_decoder_with_strides(tmp_path: Path) -> None:
    """The layout of the published multi-layer files: W_enc [d_in, d_sae], W_dec [d_sae, n, d_out] per position."""
    d = random_dictionary("crosscoder", dtype=torch.float32, n=2)
    assert isinstance(d, MultiLayer)
    assert d.threshold is not None
    tables: dict[str, Table] = {}
    for at in range(2):
        dense = torch.zeros(13, 2, 5)
        dense[:, at:] = d.W_dec[at].transpose(0, 1)
        tensors = {"e": d.W_enc[at].data, "d": dense, "b": d.b_enc[at].data, "t": d.threshold[at].data}
        save_file(tensors | {"o": d.b_dec[at].data}, tmp_path / f"{at}")
        file = TensorFile(tmp_path / f"{at}")
        vectors = {"b_enc": "b", "b_dec": "o", "threshold": "t"}
        tables |= {f"{name}.{at}": Table(file, key) for name, key in vectors.items()}
        tables[f"W_enc.{at}"] = Table(file, "e", transposed=True)
        tables |= {f"W_dec.{at}.{m}": Table(file, "d", first=m, step=2) for m in range(at, 2)}
    config = DictionaryConfig.of(d, [Site("resid_post", 0), Site("resid_post", 1)], model="m")
    lazy = LazyDictionary(config, tables, lambda: d)
    x = inputs(d, 6)
    for memory in (1, 1 << 20):
        torch.testing.assert_close(lazy.reconstruct(x, memory), d(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(lazy.encoder_columns([3, 1], 1), d.encoder_columns(1, [3, 1]))


@pytest.mark.parametrize("name", round_trips.NAMES)
def test_every_format_opens_without_loading_and_computes_the_same(name: str, tmp_path: Path) -> None:
    folder = round_trips.make(name, tmp_path / "a")
    folder = folder / "layer_1.safetensors" if name.endswith("set") else folder
    lazy, loaded = formats.open_lazy(folder), formats.load(folder)
    assert (lazy.config, lazy.format, lazy.warnings) == (loaded.config, loaded.format, loaded.warnings)
    d = loaded.dictionary
    x = inputs(d, 6)
    for memory in (1, 1 << 20):
        torch.testing.assert_close(lazy.reconstruct(x, memory), d(x), rtol=1e-5, atol=1e-5)
    if isinstance(d, MultiLayer):
        assert torch.equal(lazy.decoder_rows([7, 0], 0, 2), d.decoder_rows(0, [7, 0], 2))
    else:
        assert torch.equal(lazy.decoder_rows([7, 0]), d.decoder_rows([7, 0]))
    assert type(lazy.load()) is type(d)


def test_a_threshold_below_zero_acts_as_zero_in_a_stream_of_other_files_too(tmp_path: Path) -> None:
    tensors = makers.weights()
    tensors["threshold"][:5] = -1.0
    folder = makers.folder_2(tmp_path / "x", tensors, makers.config_2("resid_post"))
    x = makers.rows(40)
    found = formats.open_lazy(folder).reconstruct(x)
    torch.testing.assert_close(found, formats.load(folder).dictionary(x), rtol=1e-5, atol=1e-5)


def test_headers_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    _saved(tmp_path / "d", random_dictionary("sae", dtype=torch.float32))
    path = tmp_path / "d" / native.WEIGHTS_FILE
    write_tensors(path, read_tensors(path) | {"W_dec": torch.zeros(12, 5)})
    with pytest.raises(FormatError, match=r"W_dec .*\(12, 5\).*\(13, 5\)"):
        native.open_lazy(tmp_path / "d")


READ_ROWS = """
import json, sys, torch
from pathlib import Path
from gemscope.artifacts import formats, native

def rchar():
    return int(Path("/proc/self/io").read_text().split()[1])

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

torch.ones(8, 8) @ torch.ones(8, 8)
native.open_lazy(sys.argv[2])
torch.aminmax(torch.zeros(1 << 22))
Path("/proc/self/clear_refs").write_text("5")
before, memory = rchar(), peak()
if sys.argv[1] == "rows":
    lazy = native.open_lazy(sys.argv[2])
    rows = lazy.decoder_rows(torch.randint(0, 262144, (100,)))
    assert rows.shape == (100, 16)
    print(json.dumps([rchar() - before, lazy.bytes_read, lazy.nbytes]))
elif sys.argv[1] == "save":
    from gemscope.core.files import write_tensors
    loaded = native.load(sys.argv[2])
    d = loaded.dictionary
    d.W_enc.data = d.W_enc.data.contiguous()
    write_tensors(sys.argv[2] + ".first", {"a": torch.zeros(8)})
    Path("/proc/self/clear_refs").write_text("5")
    memory = peak()
    native.save(sys.argv[2] + ".again", d, loaded.config)
    print(json.dumps([peak() - memory, d.W_enc.nbytes]))
else:
    loaded = native.load(sys.argv[2])
    size = sum(p.numel() * p.itemsize for p in loaded.dictionary.parameters())
    print(json.dumps([peak() - memory, rchar() - before, size]))
"""


def _measured(what: str, folder: Path) -> list[int]:
    command = [sys.executable, "-c", READ_ROWS, what, str(folder)]
    return json.loads(subprocess.check_output(command, text=True))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """262,144 latents of 16 numbers; 36 MB."""
    F = 1 << 18
    W = torch.randn(F, 16)
    d = SAE(W.T, torch.zeros(F), W.clone(), torch.zeros(16), torch.ones(F))
    folder = tmp_path_factory.mktemp("wide") / "d"
    _saved(folder, d)
    return folder


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of the bytes a process reads")
def test_a_hundred_rows_touch_less_than_a_hundredth_of_the_file(wide: Path) -> None:
    by_system, counted, size = _measured("rows", wide)
    assert counted >= 100 * 16 * 4
    assert by_system < 0.01 * size
    assert counted <= by_system


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of a process's memory")
def test_loading_peaks_at_little_more_than_the_tensors(wide: Path) -> None:
    peak, read, size = _measured("load", wide)
    assert size <= read < 1.01 * size
    assert peak < 1.1 * size + (1 << 21)  # of which 2 MB are the interpreter's


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of a process's memory")
def test_saving_holds_the_encoder_once_more_and_nothing_else(wide: Path) -> None:
    peak, encoder = _measured("save", wide)
    assert peak < 1.1 * encoder + (1 << 21)


def test_a_streamed_encode_holds_few_slices_and_reads_the_encoder_once(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    most = 0
    read_slice = LazyDictionary._slice

    def counted(self: LazyDictionary, at: int, start: int, width: int) -> Slice:
        nonlocal most
        found = read_slice(self, at, start, width)
        alive.append(len(found.b_enc))
        most = max(most, sum(alive))
        weakref.finalize(found, alive.remove, len(found.b_enc))
        return found

    monkeypatch.setattr(LazyDictionary, "_slice", counted)
    lazy = native.open_lazy(wide)
    lazy.encode_streamed(torch.full((4, 16), 0.1), memory=1 << 20)
    assert 0 < most * 16 * 4 <= 1.5 * (1 << 20)  # one in use, one being read, one not yet let go
    table = (1 << 18) * 4
    assert (16 + 2) * table < lazy.bytes_read < (16 + 2) * table + 10_000  # W_enc, b_enc, threshold; no decoder


def test_a_stream_refuses_what_loading_refuses(tmp_path: Path) -> None:
    lazy = _saved(tmp_path / "d", random_dictionary("sae", dtype=torch.float32))
    path = tmp_path / "d" / native.WEIGHTS_FILE
    good = read_tensors(path)
    for name, bad, message in (("W_enc_T", float("nan"), "W_enc_T .*NaN"), ("threshold", -1.0, "negative threshold")):
        changed = good[name].clone()
        changed.view(-1)[3] = bad
        write_tensors(path, good | {name: changed})
        streamed = partial(native.open_lazy(tmp_path / "d").encode_streamed, torch.ones(2, 5))
        for read in (streamed, lazy.load, partial(inspect, tmp_path / "d")):
            with pytest.raises(FormatError, match=message):
                read()
