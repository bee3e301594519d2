"""Loading from folders, built-in names and the hub, and one sentence for everything that can go wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import errors as hub
from transformers import LlamaConfig, LlamaForCausalLM

from gemscope.core.errors import (
    FormatError,
    GatedModelError,
    GemscopeError,
    HubUnreachableError,
    InputError,
    ModelError,
    ModelNotFoundError,
    StorageError,
    UnsupportedModelError,
)
from gemscope.models import loading
from gemscope.models.gemma import Gemma
from unit.models.tiny_gemma import KINDS, TEXTS, Kind, build, tokenizer

HUB_ID = "google/gemma-3-270m"


def _save(folder: Path, kind: Kind = "gemma3") -> Path:
    build(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_of_every_class_comes_back_bit_by_bit(kind: Kind, tmp_path: Path) -> None:
    g = Gemma.load(_save(tmp_path, kind))
    assert type(g.model) is type(build(kind))
    original = Gemma.wrap(build(kind), tokenizer(), name="original")
    tokens = original.tokens(TEXTS[0])
    assert g.tokens(TEXTS[0]).ids.tolist() == tokens.ids.tolist()
    assert torch.equal(g.logits(tokens), original.logits(tokens))
    assert (g.revision, g.dtype, g.device.type) == (None, torch.float32, "cpu")
    assert not any(p.requires_grad for p in g.model.parameters())
    assert g.shape == original.shape
    assert str(tmp_path) in repr(g)


def test_a_multimodal_checkpoint_with_the_old_names_of_the_hub_loads(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _save(tmp_path, "gemma3mm")
    weights = load_file(tmp_path / "model.safetensors")
    old = {name.replace("model.language_model.", "language_model.model."): value for name, value in weights.items()}
    old = {name.removeprefix("model."): value for name, value in old.items()}
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    g = Gemma.load(tmp_path)
    original = Gemma.wrap(build("gemma3mm"), tokenizer(), name="original")
    tokens = g.tokens(TEXTS[0])
    assert torch.equal(g.logits(tokens), original.logits(tokens))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp64", torch.float64), (None, torch.float32)])
def test_number_types(name: str | None, dtype: torch.dtype, saved: Path) -> None:
    g = Gemma.load(str(saved), dtype=name)
    assert g.dtype == g.logits(g.tokens("hello")).dtype == dtype


def test_a_device_map_spreads_the_model(saved: Path) -> None:
    g = Gemma.load(saved, device_map={"": "cpu"})
    plain = Gemma.load(saved, device="cpu")
    tokens = g.tokens(TEXTS[0])
    assert torch.equal(g.logits(tokens), plain.logits(tokens))
    with pytest.raises(InputError, match="not both"):
        Gemma.load(saved, device="cpu", device_map="auto")
    with pytest.raises(InputError, match="float16"):
        Gemma.load(saved, dtype=torch.float16)
    with pytest.raises(InputError, match="unknown dtype"):
        Gemma.load(saved, dtype="int8")


def test_weights_in_several_files_load_and_a_missing_one_is_named(tmp_path: Path) -> None:
    build("gemma3").save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer().save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    Gemma.load(tmp_path)
    files[1].unlink()
    with pytest.raises(FormatError, match=files[1].name):
        Gemma.load(tmp_path)


def test_built_in_models_are_found_by_name_and_their_absence_is_said(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_DATA", tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"'microworld-pt' is missing .* reinstall"):
        Gemma.load("microworld-pt")
    shutil.copytree(saved, tmp_path / "microworld-it")
    assert Gemma.load("microworld-it").name == "microworld-it"


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _change(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def _only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (_truncate, FormatError, r"model\.safetensors is truncated or damaged"),
        (_write("model.safetensors", "not tensors"), FormatError, "truncated or damaged"),
        (_write("config.json", '{"model_type": "gem'), FormatError, "not valid JSON"),
        (_write("config.json", "[1, 2]"), UnsupportedModelError, "family None"),
        (_change(model_type="llama"), UnsupportedModelError, "family 'llama'.*Gemma 2 and Gemma 3"),
        (_change(hidden_size=32), FormatError, "cannot be read|lack"),
        (_change(num_hidden_layers="many"), FormatError, "cannot be read"),
        (_change(num_hidden_layers=5), FormatError, "cannot be read|lack"),
        (_without("config.json"), ModelNotFoundError, "no config.json"),
        (_without("model.safetensors"), FormatError, "lacks the weights"),
        (_only_pickles, FormatError, "only safetensors"),
        (_without("tokenizer.json"), FormatError, "no tokenizer.json"),
        (_write("tokenizer.json", "{}"), FormatError, "tokenizer in .* cannot be read"),
        (_write("tokenizer.json", "{"), FormatError, "tokenizer in .* cannot be read"),
        (_write("model.safetensors.index.json", "{}"), FormatError, "no index"),
    ],
)
def test_a_damaged_folder_gives_one_sentence(
    damage: Callable[[Path], None], error: type[GemscopeError], words: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(error, match=words) as caught:
        Gemma.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")


def test_names_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in (
        tmp_path / "empty",
        tmp_path / "none",
        str(tmp_path / "file"),
        "./none",
        "gemma",
        "a/b/c",
        "",
    ):
        with pytest.raises(ModelNotFoundError, match="hub id such as"):
            Gemma.load(name)


def test_another_family_that_transformers_can_load_is_refused_by_wrap() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM, not a Gemma"):
        Gemma.wrap(llama, tokenizer(), name="llama")


def _response(status: int) -> hub.Response:
    import importlib

    request = importlib.import_module(hub.Response.__module__.split(".")[0]).Request("GET", "https://huggingface.co")
    return hub.Response(status, request=request)


HUB_FAILURES = [
    (
        lambda: hub.GatedRepoError("x", response=_response(403)),
        GatedModelError,
        f"huggingface.co/{HUB_ID}.*hf auth login",
    ),
    (lambda: hub.HfHubHTTPError("x", response=_response(401)), GatedModelError, "401.*hf auth login"),
    (lambda: hub.HfHubHTTPError("x", response=_response(403)), GatedModelError, "403.*licence"),
    (
        lambda: hub.RepositoryNotFoundError("x", response=_response(404)),
        ModelNotFoundError,
        "no model .* on the hub",
    ),
    (lambda: hub.HfHubHTTPError("x", response=_response(404)), ModelNotFoundError, "no model .* on the hub"),
    (lambda: hub.HFValidationError("x"), ModelNotFoundError, "no model"),
    (lambda: hub.RevisionNotFoundError("x", response=_response(404)), ModelNotFoundError, "no revision 'v9'"),
    (
        lambda: hub.RemoteEntryNotFoundError("x", response=_response(404)),
        UnsupportedModelError,
        "no config.json",
    ),
    (lambda: hub.HfHubHTTPError("x", response=_response(503)), HubUnreachableError, "503.*try again"),
    (lambda: hub.LocalEntryNotFoundError("x"), HubUnreachableError, "cannot be reached.*microworld-it"),
    (lambda: hub.OfflineModeIsEnabled("x"), HubUnreachableError, "cannot be reached"),
    (lambda: hub.HTTPError("connection refused"), HubUnreachableError, "cannot be reached"),
    (lambda: ConnectionResetError(104, "reset"), HubUnreachableError, "cannot be reached"),
    (lambda: OSError(28, "No space left on device"), StorageError, "No space left.*HF_HOME"),
]


@pytest.mark.parametrize(("make", "error", "words"), HUB_FAILURES)
@pytest.mark.parametrize("when", ["hf_hub_download", "snapshot_download"])
def test_what_the_hub_refuses_gives_one_sentence(
    make: Callable[[], Exception],
    error: type[ModelError],
    words: str,
    when: str,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **options: object) -> str:
        raise make()

    monkeypatch.setattr(loading, "hf_hub_download", lambda *args, **options: str(saved / "config.json"))
    monkeypatch.setattr(loading, when, fail)
    with pytest.raises(error, match=words) as caught:
        Gemma.load(HUB_ID, revision="v9")
    assert HUB_ID in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_and_not_cached_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubUnreachableError, match="gemma-3-270m"):
        Gemma.load(HUB_ID)


def test_a_hub_model_is_fetched_as_safetensors_at_a_pinned_revision(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = shutil.copytree(saved, tmp_path / commit)
    asked: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def download(*args: object, **options: object) -> str:
        asked.append((args, options))
        return str(snapshot)

    monkeypatch.setattr(loading, "hf_hub_download", lambda *args, **options: str(snapshot / "config.json"))
    monkeypatch.setattr(loading, "snapshot_download", download)
    g = Gemma.load(HUB_ID, revision="main")
    assert (g.name, g.revision) == (HUB_ID, commit)
    assert repr(g).startswith(f"Gemma({HUB_ID}@01234567:")
    ((args, options),) = asked
    assert (args, options["revision"]) == ((HUB_ID,), "main")
    assert not any("bin" in pattern or "pt" in pattern for pattern in options["allow_patterns"])


def test_another_family_on_the_hub_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    def download(*args: object, **options: object) -> str:
        raise AssertionError("the weights were fetched")

    monkeypatch.setattr(loading, "hf_hub_download", lambda *args, **options: str(tmp_path / "config.json"))
    monkeypatch.setattr(loading, "snapshot_download", download)
    with pytest.raises(UnsupportedModelError, match="'llama'"):
        Gemma.load("meta/llama")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_names_the_remedy(
    error: BaseException, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(ModelError, match="device_map='auto'"):
        Gemma.load(saved)
