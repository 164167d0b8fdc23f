"""What everything else here stands on."""

import torch
import torch.distributed as dist


def test_processes_add_up(rank, world, equal):
    x = torch.arange(5.0) + rank
    dist.all_reduce(x)
    truth = torch.arange(5.0, dtype=torch.float64) * world + sum(range(world))
    equal("a sum over processes", [x], [truth], [truth.float()])
