"""`loop`: the plain training loop, for any model, loss and optimizer, on rows that are on the device already."""

import torch
from torch import Tensor

from fusedact.fitting.engine import Engine, Job, NotFinite


class Loop(Engine):
    name = "loop"

    def __init__(self, job: Job) -> None:
        self.job = job
        self.parameters = [p for group in job.optimizer.param_groups for p in group["params"]]

    def train(self, order: Tensor) -> Tensor:
        batches = [rows for visited in order.to(self.job.x.device) for rows in visited.split(self.job.batch_size)]
        costs = []
        for taken, rows in enumerate(batches):
            cost = self._backward(self.job.x[rows], self.job.y[rows])
            if not torch.stack([cost, *self._largest_gradients()]).isfinite().all():
                finite = cost.isfinite().item()
                raise NotFinite("a gradient is not finite" if finite else f"the cost is {cost.item()}", taken)
            self.job.optimizer.step()
            costs.append(cost)
        return torch.stack(costs).view(len(order), -1)

    def _backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Leaves the gradients of the batch; returns its cost, ()."""
        cost = self.job.loss(self.job.model(x), y)
        self.job.optimizer.zero_grad()
        cost.backward()
        return cost.detach()

    def _largest_gradients(self) -> list[Tensor]:
        """A number of each parameter's gradient, which is finite where all of them are."""
        gradients = [p.grad for p in self.parameters if p.grad is not None and p.grad.layout == torch.strided]
        return [norm.to(torch.float32) for norm in torch._foreach_norm(gradients, torch.inf)] if gradients else []

    def write(self) -> None:
        """Torch's own tensors are what it trains."""
