"""From a name to a loaded model: built-in names, folders and hub ids, and one sentence for everything that
can go wrong.

Notable: a hub model is first fetched as files and then loaded like any folder, so the revision is pinned and
both are one case. The family is checked from config.json before any weight is fetched. Only safetensors are
read, never pickles, never remote code; a single missing weight is an error (transformers would fill it with
random numbers).
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from gemscope.core.errors import (
    FormatError,
    GatedModelError,
    GemscopeError,
    HubUnreachableError,
    ModelError,
    ModelNotFoundError,
    StorageError,
    UnsupportedModelError,
    reason,
)
from gemscope.core.files import read_json

BUILT_IN = ("microworld-pt", "microworld-it")
FAMILIES = ("gemma2", "gemma3", "gemma3_text")

_UNREADABLE = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
"""What transformers raises for a config or weights that make no model."""

_DATA = Path(__file__).parent.parent / "data"
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_NAMES = (
    "give a built-in name (microworld-pt, microworld-it), a model folder, or a hub id such as 'google/gemma-3-270m'"
)


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, on this machine."""

    folder: Path
    revision: str | None
    """The hub's commit hash; None for a folder."""


def locate(name: str | Path, revision: str | None) -> Checkpoint:
    """The folder of ``name``, fetched from the hub if need be, of a supported family.

    Raises ModelNotFoundError, GatedModelError, HubUnreachableError, UnsupportedModelError, FormatError,
    StorageError.
    """
    if name in BUILT_IN:
        folder = _DATA / str(name)
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(
                f"the built-in model {str(name)!r} is missing from this installation ({folder}); reinstall gemscope."
            )
        return Checkpoint(_checked(folder, str(name)), None)
    path = Path(name).expanduser()
    if path.is_dir():
        return Checkpoint(_checked(path, str(name)), None)
    text = str(name)
    if isinstance(name, Path) or path.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        what = "is a file, not a model folder" if path.exists() else "is not a model folder on this machine"
        raise ModelNotFoundError(f"{text!r} {what}; {_NAMES}.")
    with _hub_errors(text, revision):
        config = Path(hf_hub_download(text, "config.json", revision=revision))
        _check_family(config, text)
        folder = Path(snapshot_download(text, revision=revision, allow_patterns=_FILES))
    return Checkpoint(_checked(folder, text), folder.name)


def load_model(
    checkpoint: Checkpoint,
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device | None,
    device_map: str | dict[str, Any] | None,
) -> PreTrainedModel:
    """The model, in evaluation mode and with frozen parameters.

    Raises FormatError for truncated, damaged or incomplete weights, ModelError when it does not fit into
    memory.
    """
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                dtype=dtype,
                device_map=device_map,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
        if device is not None:
            nn.Module.to(model, device)
    except (MemoryError, OSError, *_UNREADABLE) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise ModelError(
                f"{name!r} does not fit into the device's memory; use dtype='bf16' or device_map='auto'."
            ) from error
        raise FormatError(
            f"the model in {checkpoint.folder} cannot be read ({reason(error)}); fetch it again."
        ) from error
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if missing:
        raise FormatError(
            f"the weights in {checkpoint.folder} lack {len(missing)} tensors of the model, e.g."
            f" {missing[0]!r};"
            " they belong to another configuration: fetch the model again."
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer; raises FormatError when its files are missing or damaged."""
    if not any((checkpoint.folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        raise FormatError(f"{checkpoint.folder} holds no tokenizer.json; fetch the model with its tokenizer.")
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise FormatError(
            f"the tokenizer in {checkpoint.folder} cannot be read ({reason(error)}); fetch it again,"
            f" with its"
            " tokenizer.json (a tokenizer.model needs: pip install 'gemscope[hub]')."
        ) from error


def _checked(folder: Path, name: str) -> Path:
    """``folder`` if it holds a config of a supported family and whole safetensors files."""
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{folder} is no model folder (it has no config.json); {_NAMES}.")
    _check_family(folder / "config.json", name)
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise FormatError(f"{index} is no index of weights; fetch the model again.")
        files = {str(file) for file in weight_map.values()}
    for file in sorted(files):
        path = folder / file
        if not path.is_file():
            raise FormatError(
                f"{folder} lacks the weights file {file}; fetch the model again (only safetensors are read)."
            )
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} is truncated or damaged ({reason(error)}); fetch it again.") from error
    return folder


def _check_family(config: Path, name: str) -> None:
    value = read_json(config)
    family = value.get("model_type") if isinstance(value, dict) else None
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"{name!r} is of the family {family!r}; gemscope reads Gemma 2 and Gemma 3, for example"
            f" 'google/gemma-3-270m'."
        )


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Generator[None]:
    """Say in one sentence what the hub, the network or the disk refused."""
    page = f"https://huggingface.co/{name}"
    try:
        yield
    except GemscopeError:
        raise
    except GatedRepoError as error:
        raise GatedModelError(
            f"{name!r} is gated; accept its licence at {page}, then run 'hf auth login' once."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{name!r} has no revision {revision!r}; see {page}/commits/main.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFoundError(
            f"there is no model {name!r} on the hub (a private one needs 'hf auth login'); {_NAMES}."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _unreachable(name) from error
    except EntryNotFoundError as error:
        raise UnsupportedModelError(f"{name!r} on the hub has no config.json, so it is no model; {_NAMES}.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise GatedModelError(
                f"the hub refuses {name!r} ({status}); accept its licence at {page}, then run 'hf auth login' once."
            ) from error
        if status == 404:
            raise ModelNotFoundError(f"there is no model {name!r} on the hub; {_NAMES}.") from error
        raise HubUnreachableError(f"the hub answered {status} for {name!r}; try again later.") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise _unreachable(name) from error
    except OSError as error:
        raise StorageError(
            f"{name!r} cannot be stored ({error.strerror or reason(error)}); free some space or set"
            f" HF_HOME to another disk."
        ) from error


def _unreachable(name: str) -> HubUnreachableError:
    return HubUnreachableError(
        f"{name!r} is not on this machine and the hub cannot be reached; connect once to fetch it, or use"
        f" 'microworld-it'."
    )


@contextmanager
def _quiet() -> Generator[None]:
    """No progress bar for reading weights that are already on this machine."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
