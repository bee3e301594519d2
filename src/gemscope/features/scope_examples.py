"""Gemma Scope 2's ``examples.safetensors``: an index's dictionary written as one, and one read as an index."""

from pathlib import Path

import numpy as np
import torch

from gemscope.artifacts.examples import FILE, Examples
from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.files import write_tensors
from gemscope.features import layout
from gemscope.features.importing import FoundContexts, FoundExample, FoundLatent, write_index
from gemscope.features.index import FeatureIndex
from gemscope.models.gemma import Gemma


def export_examples(index: FeatureIndex, dictionary: str, folder: Path | str, *, pad: int = 0) -> Path:
    """Write ``examples.safetensors`` with the strongest examples, promoted tokens and densities of a dictionary.

    A row of ``tokens`` is a context, filled up with ``pad``; ``logit_effects`` of single examples are not known to an
    index and are NaN. Raises InputError for a dictionary that does not exist, and where tokens are strings.
    """
    if index.about["spelling"] != "pieces":
        raise InputError(f"the tokens of {index.folder} are strings, not a model's; write it in Neuronpedia's layout.")
    index.find_id(f"{dictionary}/0")
    parts = index.latents(dictionary)
    records = parts.records
    layout.prefetch(index.contexts.tokens, np.zeros(1, np.int64), len(index.contexts.tokens))
    starts = np.append(np.load(index.folder / "starts.npy"), len(index.contexts.tokens))
    first, count = records["examples"].astype(np.int64), records["n_top"].astype(np.int64)
    kept = max(1, int(count.max(initial=0)))
    column = np.arange(kept)
    there = column < count[:, None]
    example = parts.examples[np.where(there, first[:, None] + column, 0)] if len(parts.examples) else None
    token = np.zeros(there.shape, np.int64) if example is None else example["token"].astype(np.int64)
    context = np.searchsorted(starts, token, side="right") - 1
    used, row = np.unique(context[there], return_inverse=True)
    sequences = torch.full(
        (max(1, len(used)), int((starts[used + 1] - starts[used]).max(initial=1))), pad, dtype=torch.int32
    )
    for number, one in enumerate(used.tolist()):
        ids = np.array(index.contexts.tokens[starts[one] : starts[one + 1]])
        sequences[number, : len(ids)] = torch.from_numpy(ids)
    seq_ids = np.full(there.shape, -1, np.int64)
    seq_ids[there] = row
    activations = np.zeros(there.shape, np.float32)
    positions = np.zeros(there.shape, np.int32)
    if example is not None:
        activations[there], positions[there] = example["value"][there], (token - starts[context])[there]
    path = Path(folder) / FILE
    write_tensors(
        path,
        {
            "activations": torch.from_numpy(activations),
            "seq_ids": torch.from_numpy(seq_ids),
            "positions": torch.from_numpy(positions),
            "logit_effects": torch.full(there.shape, float("nan")),
            "top_logits": _column(records["promoted_by"]),
            "bottom_logits": _column(records["suppressed_by"]),
            "top_tokens": torch.from_numpy(np.ascontiguousarray(records["promoted"])),
            "bottom_tokens": torch.from_numpy(np.ascontiguousarray(records["suppressed"])),
            "feature_frequencies": torch.from_numpy(np.ascontiguousarray(records["density"])),
            "tokens": sequences,
        },
    )
    return path


def _column(values: np.ndarray) -> Float[Tensor, "latents k"]:
    return torch.from_numpy(np.ascontiguousarray(values))


def import_examples(
    evidence: Path | str, folder: Path | str, gemma: Gemma, *, name: str, top: int = 20, latents: int | None = None
) -> FeatureIndex:
    """Read the ``examples.safetensors`` beside a dictionary into an index in ``folder``; ``name`` is the dictionary's.

    The ``top`` strongest examples of the first ``latents`` latents (None: all); ``gemma`` gives the spellings. Raises
    FormatError when the file is missing or damaged, InputError when ``folder`` is not empty.
    """
    opened, contexts = Examples.open(evidence), FoundContexts()
    if not 0 < top <= 255:
        raise InputError(f"{top} examples a latent cannot be kept; ask for 1 to 255.")
    found: dict[int, FoundLatent] = {}
    for latent in range(min(latents or opened.d_sae, opened.d_sae)):
        one = opened.of(latent, top)
        places = [contexts.add(row) + at for row, at in zip(one.tokens.tolist(), one.positions.tolist(), strict=True)]
        values = one.activations.tolist()
        found[latent] = FoundLatent(
            density=one.density,
            peak=max(values, default=0.0),
            promoted=[pair for pair in one.promoted if pair[0] >= 0],
            suppressed=[pair for pair in one.suppressed if pair[0] >= 0],
            top=[FoundExample(place, value) for place, value in zip(places, values, strict=True)],
        )
    shifts = {token for one in found.values() for token, _ in (*one.promoted, *one.suppressed)}
    ids = sorted({*contexts.tokens, *shifts})
    texts = gemma.tokenizer.convert_ids_to_tokens(ids)
    pieces = dict(zip(ids, map(str, texts), strict=True))
    write_index(
        Path(folder),
        gemma.name,
        {name: found},
        contexts,
        pieces,
        about={"rows": {"kind": "examples", "sequences": opened.sequences}},
        kinds={name: {"kind": "sae", "reads": [], "writes": []}},
        sizes={name: len(found)},
        spelling="pieces",
    )
    return FeatureIndex.open(folder)
