"""`steps`: forward and backward derived by hand, into buffers made once, on a CPU.

A step is a list of bound torch calls with `out=`: no autograd, no data loader, nothing allocated. Batches are gathered
and losses taken block by block.
"""

import torch
from torch import Tensor

from fusedact.fitting.engine import Job
from fusedact.fitting.flat import FlatEngine
from fusedact.fitting.passes import Network, Passes
from fusedact.fitting.recipe import Unsupported
from fusedact.fitting.state import State

BLOCK_BYTES = 2**20  # of a block's rows: they stay in the cache
MOST_STEPS = 128  # of a block


class Steps(FlatEngine):
    name = "steps"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        recipe = self.recipe
        if recipe.device.type != "cpu":
            raise Unsupported(f"engine 'steps' runs on a CPU, the model is on {recipe.device}")
        if recipe.dtype not in (torch.float32, torch.float64):
            raise Unsupported(f"engine 'steps' computes in float32 and float64, not {recipe.dtype}")
        if job.precision is not None:
            raise Unsupported(
                f"engine 'steps' computes in {recipe.dtype}, precision={job.precision!r} is not supported"
            )
        self.network = Network(recipe, job.optimizer)
        self._blocks: dict[int, Passes] = {}
        ones = job.x.new_ones(len(job.x), recipe.layers[0].bias is not None)
        self.x = torch.cat([job.x, ones], 1)

    @property
    def state(self) -> State:
        return self.network.state

    def advance(self, order: Tensor) -> Tensor:
        size = self.job.batch_size
        epochs, rows = order.shape
        full = rows // size * size
        if full == rows:
            return self._run(order.reshape(-1), size).view(epochs, -1)
        parts = [(self._run(visited[:full], size), self._run(visited[full:], rows - full)) for visited in order]
        return torch.stack([torch.cat(pair) for pair in parts])

    def _run(self, visited: Tensor, size: int) -> Tensor:
        """Steps on batches of that size; returns each one's loss."""
        steps = len(visited) // size
        most = max(1, min(MOST_STEPS, BLOCK_BYTES // (size * self.recipe.row_bytes)))
        if size not in self._blocks or self._blocks[size].steps < min(steps, most):
            self._blocks[size] = Passes(self.network, size, min(steps, most))
        passes = self._blocks[size]
        parts = visited.split(passes.steps * size)
        losses = [passes.run(self.x, self.job.y, part) for part in parts if len(part)]
        return torch.cat(losses) if losses else self.x.new_empty(0)
