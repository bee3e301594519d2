"""From checked tensors to a dictionary, and from a dictionary to sentences about what a format has no place for."""

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from gemscope.artifacts.config import DictionaryConfig
from gemscope.core.arrays import Tensor
from gemscope.core.errors import FormatError, InputError
from gemscope.dictionaries.activation import JUMPRELU, Activation
from gemscope.dictionaries.base import Dictionary
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.transcoder import SkipTranscoder, Transcoder

FILES = ("gemma-scope-2", "gemma-scope-1", "saelens", "circuit-tracer")
"""Formats that keep, under their name in ``extra``, how their own files said what the other fields hold."""

_Made = TypeVar("_Made", bound=Dictionary | Activation)


def make(where: object, build: Callable[[], _Made]) -> _Made:
    """What ``build`` returns; raises FormatError, naming the file, when what it holds makes no dictionary."""
    try:
        return build()
    except InputError as error:
        raise FormatError(f"{where} holds what makes no dictionary: {error}") from error


def single(
    weights: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    skip: Tensor | None,
    *,
    is_sae: bool,
    activation: Activation = JUMPRELU,
    prefixes: Sequence[int] = (),
) -> SAE | Transcoder | SkipTranscoder:
    """The single-layer kind of W_enc, b_enc, W_dec, b_dec, threshold and perhaps W_skip [d_in, d_out]."""
    if skip is not None:
        return SkipTranscoder(*weights, W_skip=skip, activation=activation, prefixes=prefixes)
    return (SAE if is_sae else Transcoder)(*weights, activation=activation, prefixes=prefixes)


def lost_fields(config: DictionaryConfig, format: str, absent: Collection[str]) -> tuple[str, ...]:
    """The fields among ``absent`` (those that ``format`` cannot hold) in which ``config`` says something."""
    k = config.activation.k if config.activation.kind == "batchtopk" else None
    beside = {name: value for name, value in config.extra.items() if name != format}
    worded = sorted(name for name in beside if name in FILES and beside[name].get("config"))
    others = sorted(name for name in beside if name not in FILES)
    said = {
        "model": f"the model ({config.model})",
        "site": f"the site ({config.site})",
        "revision": f"the model's revision ({config.revision})" if config.revision else None,
        "l0": f"the L0 target ({config.l0:g})" if config.l0 is not None else None,
        "prefixes": f"the Matryoshka prefixes {list(config.prefixes)}" if config.prefixes else None,
        "k": f"BatchTopK's k ({k:g}), of which the threshold is kept," if k is not None else None,
        "provenance": "the provenance" if config.provenance else None,
        "extra": f"what was kept beside it ({', '.join(others)})" if others else None,
        "wording": f"the config of the {' and '.join(worded)} files, word for word," if worded else None,
    }
    absent = [*absent, *(["wording"] if "extra" in absent else [])]
    return tuple(f"{said[name]} is not written." for name in absent if said.get(name) is not None)
