"""A dictionary on disk that may be larger than memory: rows by range, the encoder streamed in slices.

Nothing is read before it is needed: opening reads the header of the file, ``decoder_rows`` the bytes of those rows,
``encode_streamed`` the encoder once from its first byte to its last, a slice of latents at a time.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from gemscope.artifacts.config import MULTI, AnyDictionary, DictionaryConfig, Loaded
from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import FormatError, InputError
from gemscope.core.tensor_files import HeldTensors, TensorFile, is_finite
from gemscope.dictionaries.base import Latents, chosen, product
from gemscope.dictionaries.sparse import Slice, Support, decode_sparse, select

MEMORY = 1 << 27
"""Bytes of the encoder that are in memory at a time, by default."""


@dataclass(frozen=True)
class Table:
    """Where a tensor of a dictionary lies: row i is row ``first + i * step`` of a tensor seen as a matrix.

    An encoder is a table with one latent per row; ``transposed`` says that it is stored with one per column.
    """

    file: TensorFile
    name: str
    first: int = 0
    step: int = 1
    transposed: bool = False

    def rows(self, index: Tensor) -> Tensor:
        """Some rows, in their order."""
        if not self.transposed:
            return self.file.rows(self.name, index * self.step + self.first)
        return torch.stack([self.file.columns(self.name, i, i + 1)[:, 0] for i in index.tolist()])

    def block(self, start: int, stop: int) -> Tensor:
        """Neighbouring rows."""
        if self.transposed:
            return self.file.columns(self.name, start, stop).T
        if self.step != 1:
            return self.rows(torch.arange(start, stop))
        return self.file.block(self.name, self.first + start, self.first + stop)

    def pick(self, numbers: Tensor, count: int) -> Tensor:
        """Those of its ``count`` rows, of numbers for every row of the tensor (for every column if ``transposed``)."""
        return numbers[self.first :: self.step][:count]

    def whole(self) -> Tensor:
        """The tensor as it is stored."""
        return self.file.read(self.name, finite=True)


def norms(file: TensorFile, name: str, *, columns: bool = False) -> Float[Tensor, " vectors"]:
    """The length of every row of a tensor seen as a matrix, its last axis the width, or of every column; in float64.

    Reads it once from its first byte to its last, ``MEMORY`` bytes at a time. A NaN makes its vector's length NaN.
    """
    entry = file.entry(name)
    rows, width = math.prod(entry.shape[:-1]), entry.shape[-1]
    step = max(1, MEMORY // (8 * width * 2))  # a block as it is stored, and its squares
    found = torch.zeros(width, dtype=torch.float64) if columns else torch.empty(rows, dtype=torch.float64)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        squares = file.block(name, start, stop).double().square_()
        if columns:
            found += squares.sum(0)
        else:
            found[start:stop] = squares.sum(1)
    return found.sqrt_()


def held(loaded: Loaded, where: Path | str) -> "LazyDictionary":
    """A dictionary that is in memory already behind the same reading side."""
    dictionary, config = loaded.dictionary, loaded.config
    tensors = {name: parameter.detach() for name, parameter in dictionary.named_parameters()}
    file, tables, n = HeldTensors(tensors, where), dict[str, Table](), len(config.reads)
    for at in range(n):
        end = f".{at}" if config.kind in MULTI else ""
        for name in ("b_enc", "b_dec", "threshold", "W_skip"):
            if name + end in tensors:
                tables[f"{name}.{at}"] = Table(file, name + end)
        tables[f"W_enc.{at}"] = Table(file, f"W_enc{end}", transposed=True)
        tables |= {f"W_dec.{at}.{m}": Table(file, f"W_dec{end}", (m - at) * config.d_sae) for m in range(at, n)}
    return LazyDictionary(config, tables, lambda: dictionary, format=loaded.format, warnings=loaded.warnings)


class LazyDictionary:
    """The reading side of a dictionary whose weights stay on disk; the results are those of the loaded one."""

    def __init__(
        self,
        config: DictionaryConfig,
        tables: Mapping[str, Table],
        load: Callable[[], AnyDictionary],
        *,
        format: str = "gemscope",
        warnings: tuple[str, ...] = (),
    ) -> None:
        """``tables`` are ``W_enc.{l}``, ``b_enc.{l}``, ``b_dec.{m}``, ``W_dec.{l}.{m}`` for m >= l and, where there
        are any, ``threshold.{l}`` and ``W_skip.{m}``; single-layer kinds have l = m = 0.
        """
        self.config = config
        self.tables = dict(tables)
        self.load = load
        """Read the whole dictionary into memory."""
        self.format = format
        """Name of the format of its files."""
        self.warnings = warnings
        """What config and headers have of odd, and how it was understood; one sentence each."""
        self.n_positions = len(config.reads)
        self._small: dict[str, Tensor] = {}

    @property
    def bytes_read(self) -> int:
        """Bytes read so far from all its files."""
        return sum(file.bytes_read for file in {id(t.file): t.file for t in self.tables.values()}.values())

    @property
    def nbytes(self) -> int:
        """Size of all its files."""
        return sum(file.size for file in {id(t.file): t.file for t in self.tables.values()}.values())

    def decoder_rows(self, latents: Latents, layer: int = 0, out: int | None = None) -> Float[Tensor, "chosen d_out"]:
        """What latents of position ``layer`` write to position ``out`` (by default the same); reads only those rows.

        Raises InputError for a latent or position that is not there, or an ``out`` below ``layer``.
        """
        out = layer if out is None else out
        if (table := self.tables.get(f"W_dec.{layer}.{out}")) is None:
            raise InputError(f"latents of position {layer} do not write to {out} of {self.n_positions} positions.")
        return self._computed(table.rows(chosen(latents, self.config.d_sae)))

    def encoder_columns(self, latents: Latents, layer: int = 0) -> Float[Tensor, "chosen d_in"]:
        """What latents of position ``layer`` read, one per row; reads only those."""
        if (table := self.tables.get(f"W_enc.{layer}")) is None:
            raise InputError(f"there is no position {layer}; this dictionary has 0 to {self.n_positions - 1}.")
        return self._computed(table.rows(chosen(latents, self.config.d_sae)))

    def encode_streamed(
        self, x: Float[Tensor, "batch *positions d_in"], memory: int = MEMORY
    ) -> tuple[Support, Float[Tensor, " active"]]:
        """The active latents of ``x``, as ``encode_sparse`` gives them, with at most ``memory`` bytes of encoder in
        memory; one slice is read while another is multiplied. Raises FormatError at a NaN or an infinity.
        """
        rows = self._rows(x)
        with torch.no_grad():
            total = self.n_positions * self.config.d_sae
            return select(rows, self._slices(memory), total, self.config.activation.top)

    def decode_sparse(
        self, support: Support, values: Float[Tensor, " active"]
    ) -> Float[Tensor, "batch *positions d_out"]:
        """What the latents write, and b_dec; reads only the decoder rows of the latents that are there."""
        n, d_sae = self.n_positions, self.config.d_sae
        owner = torch.div(support.latents, d_sae, rounding_mode="floor")
        recon = torch.stack([self._vector(f"b_dec.{m}").expand(support.batch, -1) for m in range(n)], dim=1).clone()
        for at in range(n):
            mine = (owner == at).nonzero()[:, 0]
            used, local = (support.latents[mine] - at * d_sae).unique(return_inverse=True)
            part = Support(support.rows[mine], local, support.batch, len(used))
            for m in range(at, n) if len(used) else ():
                recon[:, m] += decode_sparse(part, values[mine], self.decoder_rows(used, at, m))
        return recon if self._is_multi else recon[:, 0]

    def reconstruct(
        self, x: Float[Tensor, "batch *positions d_in"], memory: int = MEMORY
    ) -> Float[Tensor, "batch *positions d_out"]:
        """Encode and decode, with the skip connection where there is one."""
        recon = self.decode_sparse(*self.encode_streamed(x, memory))
        if "W_skip.0" not in self.tables:
            return recon
        rows = self._rows(x)
        skip = [product(rows[:, m], self.tables[f"W_skip.{m}"].whole()) for m in range(self.n_positions)]
        return recon + (torch.stack(skip, dim=1) if self._is_multi else skip[0])

    @property
    def _is_multi(self) -> bool:
        return self.config.kind in MULTI

    def _rows(self, x: Tensor) -> Tensor:
        wanted = (self.n_positions, self.config.d_in) if self._is_multi else (self.config.d_in,)
        if tuple(x.shape[1:]) != wanted:
            raise InputError(f"x has shape {tuple(x.shape)}, but each row must be {wanted}.")
        return x.detach().float().reshape(-1, self.n_positions, self.config.d_in)

    def _slices(self, memory: int) -> Iterator[Slice]:
        """The encoder from its first latent to its last; the next slice is being read while one is used."""
        row = 4 * self.config.d_in
        width = max(1, min(self.config.d_sae, memory // (2 * row)))
        starts = [(at, s) for at in range(self.n_positions) for s in range(0, self.config.d_sae, width)]
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._slice, *starts[0], width)
            for following in [*starts[1:], None]:
                now = coming.result()
                if following is not None:
                    coming = pool.submit(self._slice, *following, width)
                yield now
                del now

    def _slice(self, at: int, start: int, width: int) -> Slice:
        stop = min(start + width, self.config.d_sae)
        table = self.tables[f"W_enc.{at}"]
        W_enc = table.block(start, stop).T
        if not is_finite(W_enc):
            raise FormatError(f"{table.name} in {table.file.path} has a NaN or an infinity; train or fetch it again.")
        floor = self._vector(f"threshold.{at}")[start:stop] if self.config.activation.has_threshold else None
        return Slice(at, at * self.config.d_sae + start, W_enc, self._vector(f"b_enc.{at}")[start:stop], floor)

    def _vector(self, name: str) -> Tensor:
        if name not in self._small:
            self._small[name] = self._computed(self.tables[name].whole())
            if name.startswith("threshold"):
                self._small[name] = self.floor(self._small[name], self.tables[name].file)
        return self._small[name]

    def floor(self, threshold: Tensor, file: TensorFile) -> Tensor:
        """Thresholds below 0 are refused in our own files; in others they act as 0, as when those are loaded."""
        if self.format == "gemscope" and bool((threshold < 0).any()):
            raise FormatError(f"{file.path} holds a negative threshold; save or fetch it again.")
        return threshold.clamp(min=0)

    @staticmethod
    def _computed(tensor: Tensor) -> Tensor:
        return tensor.float()
