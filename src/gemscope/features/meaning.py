"""Labels by meaning: an embedding of each, and one matrix product for a question.

Any text model of transformers serves as the embedding model, from a folder or the local cache: the mean over tokens of
its last hidden state, of length one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import AutoModel, AutoTokenizer

from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError, ModelNotFoundError, reason
from gemscope.core.files import read_tensors, write_tensors
from gemscope.core.tensor_files import TensorFile
from gemscope.features.index import FeatureIndex
from gemscope.features.search import Hit, hits_of

_BATCH = 64


@runtime_checkable
class Embedder(Protocol):
    """Texts to vectors."""

    name: str

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """One row a text, of length one."""
        ...


class TextModel:
    """A model of transformers, as an embedder."""

    def __init__(self, name: str, *, device: torch.device | None = None) -> None:
        """``name`` is a folder or a hub id; raises ModelNotFoundError when it cannot be loaded."""
        self.name = name
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
            self._model: Any = AutoModel.from_pretrained(name).to(device or "cpu").eval()
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(
                f"{name!r} cannot be loaded as an embedding model ({reason(error)}); give a folder."
            ) from error

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """Mean of the last hidden state over tokens."""
        found: list[Tensor] = []
        for start in range(0, len(texts), _BATCH):
            some = list(texts[start : start + _BATCH])
            batch = self._tokenizer(some, return_tensors="pt", padding=True, truncation=True, max_length=256)
            batch = batch.to(self._model.device)
            hidden = self._model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            found.append((mean / mean.norm(dim=1, keepdim=True).clamp(min=1e-30)).cpu())
        return torch.cat(found)


def embed_labels(index: FeatureIndex, embedder: Embedder, source: str | None = None) -> Path:
    """Write ``meaning.safetensors`` beside the index: a vector in bf16 for every label, or those of one source; and
    which model made them of which state of the labels.
    """
    state = str(index.database.changes)  # before the labels are read: what comes later is not among them
    labels = list(index.database.every_label(source))
    if not labels:
        raise InputError(f"there are no labels in {index.folder} to embed; label its features first.")
    path = _path(index)
    vectors = embedder([label.text for label in labels]).bfloat16()
    features = torch.tensor([label.feature for label in labels])
    write_tensors(path, {"vectors": vectors, "features": features}, {"model": embedder.name, "labels": state})
    return path


def _path(index: FeatureIndex) -> Path:
    return index.folder / "meaning.safetensors"


def missing(index: FeatureIndex, embedder: Embedder) -> str | None:
    """Why this model's vectors of the labels as they are now are not there; None when they are."""
    if not _path(index).is_file():
        return "have no vectors"
    with TensorFile(_path(index)) as file:
        made = file.metadata
    if made.get("model") != embedder.name:
        return f"have vectors of {made.get('model')}, not of {embedder.name}"
    return None if made.get("labels") == str(index.database.changes) else "have changed since they got vectors"


def by_meaning(index: FeatureIndex, embedder: Embedder, question: str, top: int = 20) -> list[Hit]:
    """Features with the label nearest to the question, by cosine; raises InputError when the labels were not embedded,
    or by another model, or before some of them changed.
    """
    if (why := missing(index, embedder)) is not None:
        raise InputError(
            f"the labels in {index.folder} {why}; make them with:"
            f" gemscope find --index {index.folder} --meaning WORDS --embed {embedder.name}"
        )
    stored = read_tensors(_path(index))
    scores = (stored["vectors"] @ embedder([question])[0].bfloat16()).float()
    best: dict[int, float] = {}
    for place in scores.argsort(descending=True).tolist():
        best.setdefault(int(stored["features"][place]), float(scores[place]))
        if len(best) == top:
            break
    return hits_of(index, list(best.items()))
