"""The order in which torch's DataLoader visits the rows."""

import torch
from torch import Tensor


def orders(epochs: int, rows: int, generator: torch.Generator | None, shuffle: bool = True) -> Tensor:
    """The rows that passes of `DataLoader(..., shuffle=shuffle, generator=generator)` visit, by the same draws.

    int64 (epochs, rows), on the CPU. The generator, or torch's global one, is left as the passes leave it.
    """
    visited = torch.empty(epochs, rows, dtype=torch.int64)
    # A pass draws a seed for the loader's workers and, without a generator, one for the generator of its order.
    if generator is None or not shuffle:
        seeds = torch.empty(epochs, 1 + shuffle, dtype=torch.int64).random_(generator=generator)
    if not shuffle:
        return visited.copy_(torch.arange(rows))
    own = torch.Generator()
    for epoch, row in enumerate(visited.unbind()):
        if generator is None:
            torch.randperm(rows, generator=own.manual_seed(int(seeds[epoch, 1])), out=row)
        else:
            torch.empty((), dtype=torch.int64).random_(generator=generator)
            torch.randperm(rows, generator=generator, out=row)
            torch.randperm(rows, generator=generator)  # the sampler's remainder, of which it takes none
    return visited
