"""`fit_many` over processes: each trains some of the networks, and all have what became of every one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusedact.fitting.many import FittedMany, Inits, prepared

ALIGNED = 64  # networks, or a multiple, are a part where that costs little: vectors of them are as full as among all
LITTLE = 1.1  # times the networks of an even part


def fit_many(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer],
    epochs: int,
    batch_size: int,
    drop_last: bool = False,
    shuffle: bool = True,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    inits: Inits | None = None,
    lrs: Sequence[float] | Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> FittedMany:
    """`fusedact.fit_many`, the networks shared among the processes of a group, by default of all.

    Every process gives the same arguments, and has all networks' costs and parameters, in order. All see the batches
    that the group's first process draws: its generator's state is everyone's before, and as one process's after.

    Each process trains a run of neighbours, and one exchange follows. On a GPU, where each network is a program, all
    numbers are bitwise one process's; on a CPU to rounding, since there torch's sums go over many networks at once.

    Raises as `fusedact.fit_many` does, in every process and before any exchange; RuntimeError where there is no group,
    ValueError in a process that is not in it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("fit_many over processes needs a group: torch.distributed.init_process_group()")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not in the group whose processes share the networks")
    asked = prepared(
        model, x, y, loss=loss, optimizer=optimizer, epochs=epochs, batch_size=batch_size, drop_last=drop_last,
        shuffle=shuffle, generator=generator, seeds=seeds, inits=inits, lrs=lrs,
    )  # fmt: skip
    drawn_from = generator or torch.default_generator
    state = [drawn_from.get_state()]
    dist.broadcast_object_list(state, group=group, group_src=0)
    drawn_from.set_state(state[0])

    parts = _parts(len(asked.rates), dist.get_world_size(group))
    mine = parts[dist.get_rank(group)]
    fitted = asked.some(mine or slice(0, 1)).train()  # one more, so that the generator is left as everyone's
    own = [fitted.costs.cpu(), {name: value.cpu() for name, value in fitted.parameters.items()}] if mine else None
    found: list[Any] = [None] * len(parts)
    dist.all_gather_object(found, own, group=group)

    costs, parameters = zip(*filter(None, found), strict=True)
    together = {name: torch.cat([each[name] for each in parameters]).to(asked.x.device) for name in asked.parameters}
    return FittedMany(torch.cat(costs).to(fitted.costs.device), together, fitted.engine, fitted.reason)


def _parts(networks: int, world: int) -> list[slice | None]:
    """Which networks each process trains; None only where there are fewer than processes."""
    even, vectors = -(-networks // world), -(-networks // ALIGNED)
    aligned = vectors >= world and -(-vectors // world) * ALIGNED < LITTLE * even
    unit, units = (ALIGNED, vectors) if aligned else (1, networks)
    ends = [min(units * rank // world * unit, networks) for rank in range(world + 1)]
    return [slice(first, end) if first < end else None for first, end in pairwise(ends)]
