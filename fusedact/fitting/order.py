"""The order in which torch's DataLoader visits the rows."""

import torch
from torch import Tensor


def order(rows: int, generator: torch.Generator | None, shuffle: bool = True) -> Tensor:
    """The rows that one pass of `DataLoader(..., shuffle=shuffle, generator=generator)` visits, by the same draws.

    int64 (rows,), on the CPU. The generator, or torch's global one, is left as the pass leaves it.
    """
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # the loader's seed of its workers
    if not shuffle:
        return torch.arange(rows)
    if generator is None:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    visited = torch.randperm(rows, generator=generator)
    torch.randperm(rows, generator=generator)  # the sampler's remainder, of which it takes none
    return visited
