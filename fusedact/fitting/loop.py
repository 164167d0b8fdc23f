"""`loop`: the plain training loop, for any model, loss and optimizer, on rows that are on the device already.

The layers of a Sequential of torch's, and torch's losses, run fused.

It looks at each step's cost and gradients, which on a GPU is a synchronisation, before it takes the step.
"""

import torch
from torch import Tensor

from fusedact.fitting.engine import Engine, Job, NotFinite, fused
from fusedact.fitting.recipe import Unsupported


class Loop(Engine):
    name = "loop"

    def __init__(self, job: Job) -> None:
        if job.precision is not None:
            raise Unsupported(f"engine 'loop' computes as the model does, not with precision={job.precision!r}")
        self.job = job
        self.model, self.loss = fused(job.model), fused(job.loss)
        self.parameters = [p for group in job.optimizer.param_groups for p in group["params"]]

    def train(self, order: Tensor) -> Tensor:
        batches = [rows for visited in order.to(self.job.x.device) for rows in visited.split(self.job.batch_size)]
        costs: list[Tensor] = []
        for rows in batches:
            cost = self._backward(self.job.x[rows], self.job.y[rows])
            if not torch.stack([cost.double(), *self._gradient_sums(cost.device)]).isfinite().all():
                self._check(cost, costs)
            self.job.optimizer.step()
            costs.append(cost)
        return torch.stack(costs).view(len(order), -1)

    def _backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Leaves the gradients of the batch; returns its cost, ()."""
        cost = self.loss(self.model(x), y)
        self.job.optimizer.zero_grad()
        cost.backward()
        return cost.detach().reshape(())

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None and p.grad.layout == torch.strided]

    def _gradient_sums(self, device: torch.device) -> list[Tensor]:
        """Finite only where each gradient is; where one is not, a sum may also have overflowed."""
        sums = [g.sum(dtype=None if g.dtype.itemsize > 2 else torch.float32) for g in self._gradients()]
        return [total.to(device, torch.float64) for total in sums]

    def _check(self, cost: Tensor, costs: list[Tensor]) -> None:
        losses = torch.stack(costs) if costs else cost.new_empty(0)
        if not cost.isfinite():
            raise NotFinite(f"the cost is {cost.item()}", losses)
        if not all(gradient.isfinite().all() for gradient in self._gradients()):
            raise NotFinite("a gradient is not finite", losses)

    def write(self) -> None:
        """Torch's own tensors are what it trains."""
