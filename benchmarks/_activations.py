"""The rows that training benchmarks run on: sparse mixtures of known directions, of norm sqrt(d) like a stream's."""

import torch


def rows(count: int, d_in: int) -> torch.Tensor:
    """[count, d_in], always the same: 24 of 2048 directions each, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2048, d_in, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    which = torch.randint(0, 2048, (count, 24), generator=generator)
    sizes = torch.rand(count, 24, generator=generator) + 0.2
    x = torch.nn.functional.embedding_bag(which, directions, per_sample_weights=sizes, mode="sum")
    x += 0.02 * torch.randn(x.shape, generator=generator)
    return x * (d_in**0.5 / x.norm(dim=1).mean())
