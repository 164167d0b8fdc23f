"""The trainers' loop in several processes: each has its part of every batch, and torch's DDP their gradients' mean."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fusedact.distributed import processes
from fusedact.fitting.order import orders

if TYPE_CHECKING:
    from fusedact.trainers.loop import Trainer

DDP = "ddp"


class Parallel:
    """Steps that equal one process's on whole batches, whatever the number of processes, but for rounding.

    The parts are `tensor_split`'s, and DDP takes the mean of the processes' gradients. So each process weighs its
    cost's gradient by its share of the rows, times the processes; one that has no row takes the last with weight 0.

    Raises ValueError where there is no process group.
    """

    engine = DDP

    def __init__(self, trainer: Trainer) -> None:
        if not processes.started():
            raise ValueError(
                f"engine {DDP} needs processes, which torchrun starts: "
                f"torchrun --nproc-per-node 2 -m fusedact train {trainer.name}"
            )
        self.trainer = trainer
        self.reason = f"processes: {processes.world()}"
        size = trainer.settings.batch_size
        parts = torch.arange(size, device=trainer.x.device).tensor_split(processes.world())
        mine = parts[processes.rank()]
        self.mine = mine if len(mine) else mine.new_tensor([size - 1])  # positions in a batch
        self.share = len(mine) / size

    def slice(self, limit: int) -> Tensor:
        """An epoch; each step's cost of its whole batch, (1, steps), the same in every process."""
        x, y, size = self.trainer.x, self.trainer.y, self.trainer.settings.batch_size
        visited = orders(1, len(x), None)[0, : len(x) // size * size].to(x.device)
        costs = torch.stack([self._step(x[rows], y[rows]) for rows in visited.view(-1, size)[:, self.mine]])
        costs *= self.share
        dist.all_reduce(costs)
        return costs[None]

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        cost = self.trainer.criterion(self._model(x), y)
        self.trainer.optimizer.zero_grad()
        cost.backward(torch.full_like(cost, self.share * processes.world()))
        self.trainer.optimizer.step()
        return cost.detach()

    @cached_property
    def _model(self) -> DistributedDataParallel:
        """Made at the first step: a trainer that goes on from a checkpoint begins twice, and a module has one of it."""
        model = self.trainer.model
        return DistributedDataParallel(model, find_unused_parameters=self._unused(), gradient_as_bucket_view=True)

    def _unused(self) -> bool:
        """Whether a parameter has no part in the cost, as the convolution that S7 never calls."""
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        cost = self.trainer.criterion(self.trainer.model(self.trainer.x[:1]), self.trainer.y[:1])
        return None in torch.autograd.grad(cost, parameters, allow_unused=True)
