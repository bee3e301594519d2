"""Latents sharded over processes, rows over others: the collectives that one dictionary on many devices needs.

``torchrun --nproc-per-node 8`` starts the processes; of every eight, ``latents`` share one dictionary and 8 /
``latents`` share the batch. Latent ``i`` of a layer lives on shard ``i % latents``, so that every Matryoshka prefix is
spread evenly. Plain process groups: DTensor has no sharding rule for TopK and would gather the whole width.

Notable:
- one all-reduce of the reconstruction a step and target: [batch, d_out], whatever the width (Gao et al. 2024,
  appendix D);
- TopK is exact: the k best of each shard are compared, ties go to the lower index, as in a single process;
- what is saved is the whole dictionary and whole moments, so a run goes on at another number of processes.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gemscope.core.arrays import Float, Int, Tensor
from gemscope.core.errors import InputError


@dataclass(frozen=True)
class Mesh:
    """Where this process stands; the default is a single process, for which every collective is the identity."""

    latents: int = 1
    """Shards of the latents."""
    data: int = 1
    """Shards of the batch."""
    rank: int = 0
    latent_group: Any = None
    data_group: Any = None

    @property
    def shard(self) -> int:
        """Which of the latents are here: ``shard``, ``shard + latents``, ``shard + 2 latents`` ..."""
        return self.rank % self.latents

    @property
    def part(self) -> int:
        """Which rows of a batch are here."""
        return self.rank // self.latents

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum_over_latents(self, x: Tensor) -> Tensor:
        """The sum over the shards of the latents, in place."""
        if self.latents > 1:
            dist.all_reduce(x, group=self.latent_group)
        return x

    def sum_over_data(self, x: Tensor) -> Tensor:
        """The sum over the shards of the batch, in place."""
        if self.data > 1:
            x = x.contiguous()
            dist.all_reduce(x, group=self.data_group)
        return x

    def rows(self, x: Float[Tensor, "batch _"]) -> Float[Tensor, "part _"]:
        """This process's rows of a batch."""
        return x if self.data == 1 else x.tensor_split(self.data)[self.part]

    def own(self, x: Tensor) -> Tensor:
        """This shard's part of a tensor whose first axis counts latents."""
        return x if self.latents == 1 else x[self.shard :: self.latents].contiguous()

    def whole(self, x: Tensor) -> Tensor:
        """The tensor of which every shard has its part."""
        return x if self.latents == 1 else torch.stack(self.gather(x), dim=1).flatten(0, 1)

    def gather(self, x: Tensor) -> list[Tensor]:
        """The same-shaped tensor of every latent shard."""
        if self.latents == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.latents)]
        dist.all_gather(parts, x.contiguous(), group=self.latent_group)
        return parts

    def mean_over_latents(self, number: float) -> float:
        """The mean of a number over the shards of the latents."""
        if self.latents == 1:
            return number
        return float(self.sum_over_latents(torch.tensor(number, dtype=torch.float64, device=_device()))) / self.latents

    def highest(self, number: int) -> int:
        """The largest of a number over all processes."""
        if self.latents * self.data == 1:
            return number
        found = torch.tensor(number, device=_device())
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Until every process is here."""
        if self.latents * self.data > 1:
            dist.barrier()

    def best(
        self, values: Float[Tensor, "batch candidates"], index: Int[Tensor, "batch candidates"], k: int
    ) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
        """(value, index) of the last of the ``k`` largest over all shards, ties to the lower index; ``values`` are the
        best of this shard, ``index`` counts latents over all shards. An entry is kept when its value is above, or equal
        with an index not above.
        """
        values, index = torch.cat(self.gather(values), dim=1), torch.cat(self.gather(index), dim=1)
        k = min(k, values.shape[1])
        by_index = index.argsort(dim=1)
        values, index = values.gather(1, by_index), index.gather(1, by_index)
        order = values.sort(dim=1, descending=True, stable=True)[1][:, k - 1 : k]
        return values.gather(1, order)[:, 0], index.gather(1, order)[:, 0]

    def kth_of_batch(self, values: Float[Tensor, " entries"], k: int) -> Float[Tensor, ""]:
        """The k-th largest of the entries of all shards and all parts of the batch; 0 when there are fewer."""
        kept = values.new_zeros(k)
        best = values.topk(min(k, len(values)))[0]
        kept[: len(best)] = best
        if self.latents > 1 or self.data > 1:
            parts = [torch.empty_like(kept) for _ in range(self.latents * self.data)]
            dist.all_gather(parts, kept)
            kept = torch.cat(parts).topk(k)[0]
        return kept[-1]


def _device() -> str:
    """Where the processes exchange numbers."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


ALONE = Mesh()
"""A single process."""


def start(latents: int | None = None, device: str = "cpu") -> Mesh:
    """Join the processes that torchrun started; ``ALONE`` when it started none.

    ``latents`` is the number of shards of a dictionary, all processes unless given; they must divide the number of
    processes. Raises InputError when they do not.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return ALONE
    shards = world if latents is None else latents
    if shards < 1 or world % shards:
        raise InputError(f"{world} processes cannot be split into groups of {shards}; use a divisor of {world}.")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    rank = dist.get_rank()
    latent_group = data_group = None
    for first in range(0, world, shards):
        group = dist.new_group(list(range(first, first + shards)))
        latent_group = group if first <= rank < first + shards else latent_group
    for shard in range(shards):
        group = dist.new_group(list(range(shard, world, shards)))
        data_group = group if rank % shards == shard else data_group
    return Mesh(shards, world // shards, rank, latent_group, data_group)


def stop() -> None:
    """Leave the processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
