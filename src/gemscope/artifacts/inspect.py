"""What a dictionary on disk is, without a model: kind, place, sizes, memory, norms, thresholds, and what is odd."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gemscope.artifacts import formats
from gemscope.artifacts.config import AnyDictionary, Loaded
from gemscope.artifacts.examples import FILE as EXAMPLES_FILE
from gemscope.core.arrays import Float, Tensor
from gemscope.core.sites import Site
from gemscope.dictionaries.multilayer import MultiLayer

_CHUNK = 1 << 12


@dataclass(frozen=True)
class Spread:
    """A distribution in five numbers."""

    minimum: float
    quarter: float
    median: float
    three_quarters: float
    maximum: float

    @classmethod
    def of(cls, values: Float[Tensor, " count"]) -> "Spread":
        """The quantiles 0, 1/4, 1/2, 3/4, 1, each a value that occurs."""
        ordered = values.double().sort().values
        last = len(ordered) - 1
        return cls(*(float(ordered[round(q * last / 4)]) for q in range(5)))


@dataclass(frozen=True)
class TensorShape:
    """One parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` found."""

    path: str
    format: str
    kind: str
    activation: str
    k: float | None
    model: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    read_gain: bool
    d_in: int
    d_out: int
    d_sae: int
    """Per position."""
    n_latents: int
    """Over all positions."""
    l0: float | None
    """The target, where the files say it."""
    prefixes: tuple[int, ...]
    tensors: tuple[TensorShape, ...]
    bytes: int
    """Memory of the weights as they are stored."""
    encode_bytes: int
    """Memory on top for the activations of 1,024 tokens, dense, in fp32."""
    encoder_norms: Spread
    """Of what each latent reads."""
    decoder_norms: Spread
    """Of what each latent writes to its own position."""
    thresholds: Spread | None
    zero_rows: int
    """Latents that write nothing to any position."""
    examples: bool
    """Whether evidence lies beside the weights."""
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def inspect(path: Path | str, *, site: Site | str | None = None, model: str | None = None) -> Inspection:
    """Read a dictionary and say what it is; ``site`` and ``model`` as in ``formats.load``. Raises FormatError."""
    return describe(formats.load(path, site=site, model=model), path)


def describe(loaded: Loaded, path: Path | str) -> Inspection:
    """The same of a dictionary that is loaded already."""
    dictionary, config = loaded.dictionary, loaded.config
    reading = torch.cat([_norms(W.T) for W in _list(dictionary.W_enc)])
    writing = torch.cat([_norms(table) for table in _own(dictionary)])
    zero = _silent(dictionary)
    thresholds = None if dictionary.threshold is None else torch.cat([t.float() for t in _list(dictionary.threshold)])
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    parameters = list(dictionary.named_parameters())
    return Inspection(
        path=str(path),
        format=loaded.format,
        kind=config.kind,
        activation=config.activation.kind,
        k=config.activation.k,
        model=config.model,
        reads=tuple(map(str, config.reads)),
        writes=tuple(map(str, config.writes)),
        read_gain=config.read_gain,
        d_in=dictionary.d_in,
        d_out=dictionary.d_out,
        d_sae=dictionary.d_sae,
        n_latents=dictionary.n_latents,
        l0=config.l0,
        prefixes=config.prefixes,
        tensors=tuple(TensorShape(n, tuple(p.shape), str(p.dtype).removeprefix("torch.")) for n, p in parameters),
        bytes=sum(p.numel() * p.element_size() for _, p in parameters),
        encode_bytes=1024 * dictionary.n_latents * 4,
        encoder_norms=Spread.of(reading),
        decoder_norms=Spread.of(writing),
        thresholds=None if thresholds is None else Spread.of(thresholds),
        zero_rows=zero,
        examples=(folder / EXAMPLES_FILE).is_file(),
        warnings=(*loaded.warnings, *_odd(reading, writing, zero)),
    )


def _odd(reading: Tensor, writing: Tensor, zero: int) -> tuple[str, ...]:
    found: list[str] = []
    if zero:
        found.append(f"{zero} latents write nothing: their decoder rows are zero.")
    if blind := int((reading == 0).sum()):
        found.append(f"{blind} latents read nothing: their encoder columns are zero.")
    kept = writing[writing > 0]
    if len(kept) and float(kept.max() / kept.median()) > 100:
        found.append("some decoder rows are over 100 times longer than the median; activations are not comparable.")
    return tuple(found)


def _own(dictionary: AnyDictionary) -> list[Tensor]:
    return [t[0] for t in dictionary.W_dec] if isinstance(dictionary, MultiLayer) else [dictionary.W_dec]


def _silent(dictionary: AnyDictionary) -> int:
    if not isinstance(dictionary, MultiLayer):
        return int((_norms(dictionary.W_dec) == 0).sum())
    return sum(int((torch.stack([_norms(t) for t in tables]).sum(0) == 0).sum()) for tables in dictionary.W_dec)


def _list(given: "Tensor | Sequence[Tensor] | torch.nn.ParameterList") -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else list(given)


def _norms(rows: Float[Tensor, "count d"]) -> Float[Tensor, " count"]:
    """Length of each row, in fp32, some rows at a time."""
    return torch.cat([part.detach().float().norm(dim=1) for part in rows.split(_CHUNK)])
