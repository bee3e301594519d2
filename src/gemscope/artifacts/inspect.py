"""What a dictionary on disk is, without a model: kind, place, sizes, memory, norms, thresholds, and what is odd."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gemscope.artifacts import formats, native
from gemscope.artifacts.config import DTYPES
from gemscope.artifacts.examples import FILE as EXAMPLES_FILE
from gemscope.artifacts.lazy import LazyDictionary, Table, norms
from gemscope.artifacts.reading import clamp_threshold
from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import FormatError
from gemscope.core.sites import Site


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
    """Say what a dictionary is; ``site`` and ``model`` as in ``formats.load``. Raises FormatError.

    Native and Gemma Scope 2 files are read once, a slice at a time; what stays in memory are a few numbers per latent.
    """
    return describe(formats.open_lazy(path, site=site, model=model), path)


def describe(lazy: LazyDictionary, path: Path | str) -> Inspection:
    """The same of a dictionary that is open already."""
    config, n = lazy.config, lazy.n_positions
    reading = torch.cat([_lengths(lazy, [lazy.tables[f"W_enc.{at}"]])[0] for at in range(n)])
    written = [_lengths(lazy, [lazy.tables[f"W_dec.{at}.{out}"] for out in range(at, n)]) for at in range(n)]
    writing = torch.cat([outs[0] for outs in written])
    zero = sum(int((torch.stack(outs).sum(0) == 0).sum()) for outs in written)
    thresholds, clamped = _thresholds(lazy)
    for name in lazy.tables:
        if name.startswith(("b_enc", "b_dec", "W_skip")):
            lazy.tables[name].whole()  # refuses a NaN
    shapes = native.tensor_shapes(config, skip="W_skip.0" in lazy.tables)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return Inspection(
        path=str(path),
        format=lazy.format,
        kind=config.kind,
        activation=config.activation.kind,
        k=config.activation.k,
        model=config.model,
        reads=tuple(map(str, config.reads)),
        writes=tuple(map(str, config.writes)),
        read_gain=config.read_gain,
        d_in=config.d_in,
        d_out=config.d_out,
        d_sae=config.d_sae,
        n_latents=n * config.d_sae,
        l0=config.l0,
        prefixes=config.prefixes,
        tensors=tuple(_shape(name, shape, config.dtype) for name, shape in shapes.items()),
        bytes=DTYPES[config.dtype].itemsize * sum(map(math.prod, shapes.values())),
        encode_bytes=1024 * n * config.d_sae * 4,
        encoder_norms=Spread.of(reading),
        decoder_norms=Spread.of(writing),
        thresholds=None if thresholds is None else Spread.of(thresholds),
        zero_rows=zero,
        examples=(folder / EXAMPLES_FILE).is_file(),
        warnings=(*lazy.warnings, *clamped, *_odd(reading, writing, zero)),
    )


def _lengths(lazy: LazyDictionary, tables: Sequence[Table]) -> list[Tensor]:
    """The length of every vector of tables that lie in one tensor, each [d_sae]; raises FormatError at a NaN."""
    first = tables[0]
    every = norms(first.file, first.name, columns=first.transposed)
    found = [table.pick(every, lazy.config.d_sae) for table in tables]
    if not all(bool(lengths.isfinite().all()) for lengths in found):
        raise FormatError(f"{first.name} in {first.file.path} has a NaN or an infinity; train or fetch it again.")
    return found


def _thresholds(lazy: LazyDictionary) -> tuple[Tensor | None, tuple[str, ...]]:
    """Those of all positions, and what is odd about them."""
    if not lazy.config.activation.has_threshold:
        return None, ()
    tables = [lazy.tables[f"threshold.{at}"] for at in range(lazy.n_positions)]
    given = [table.whole().float() for table in tables]
    odd = [clamp_threshold(values, table.file.path)[1] for values, table in zip(given, tables, strict=True)]
    floors = [lazy.floor(values, table.file) for values, table in zip(given, tables, strict=True)]
    return torch.cat(floors), tuple(note for notes in odd for note in notes)


def _shape(name: str, shape: tuple[int, ...], dtype: str) -> TensorShape:
    """A tensor as gemscope computes with it: the encoder is [d_in, d_sae], however it is stored."""
    return TensorShape(name.replace("W_enc_T", "W_enc"), shape[::-1] if "W_enc_T" in name else shape, dtype)


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
