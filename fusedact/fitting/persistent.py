"""`persistent`: many steps in one launch, by the kernel that the network's size asks for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedact import backend
from fusedact.fitting.engine import Job
from fusedact.fitting.flat import FlatEngine
from fusedact.fitting.network import batches, network, rates
from fusedact.fitting.recipe import Unsupported
from fusedact.fitting.state import State

PRECISIONS = {None: "ieee", "tf32": "tf32", "bf16": "bf16"}
TINY_STEPS = 2**19  # of a launch, a tenth of a second; of a larger network a step takes some tens as long
MOST_STEPS = 2**13

Launch = Callable[[Tensor, Tensor, Tensor], None]  # order (steps, batch), rates, losses (steps,)


class Persistent(FlatEngine):
    name = "persistent"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        recipe = self.recipe
        if not backend.uses_triton(job.x):
            raise Unsupported(f"engine 'persistent' needs Triton, which does not run on {recipe.device}")
        if recipe.dtype != torch.float32:
            raise Unsupported(f"engine 'persistent' trains float32 parameters, not {recipe.dtype}")
        self.network = network(recipe)
        self._x, self._y = job.x.contiguous(), job.y.contiguous()
        self._failed = torch.zeros(1, dtype=torch.int32, device=recipe.device)
        self._state = State(recipe, job.optimizer, self.network.size, self.network.views)
        self._launch, self._most_steps = self._kernel()

    @property
    def state(self) -> State:
        return self._state

    def advance(self, order: Tensor) -> Tensor:
        visited = batches(order, self.job.batch_size).to(self._x.device)
        losses = self._x.new_empty(len(visited))
        with torch.no_grad(), backend.on_device(self._x):
            for part, to in zip(visited.split(self._most_steps), losses.split(self._most_steps), strict=True):
                numbers = rates(self.recipe.rule, self.state.steps)
                self._launch(part, torch.tensor(numbers, dtype=torch.float64, device=self._x.device), to)
                self.state.steps += len(part)
        if self._failed.item():
            self._failed.zero_()
            raise RuntimeError("the programs of a launch waited for each other in vain: not all of them ran at once")
        return losses.view(len(order), -1)

    def _kernel(self) -> tuple[Launch, int]:
        """What launches the kernel for this network, and for how many steps at most."""
        from fusedact.kernels import training_layers, training_single, training_tiny

        layers, objective, rule, _ = self.network
        size, precision = self.job.batch_size, PRECISIONS[self.job.precision]
        flat, moments = self.state.numbers[0], self.state.numbers[1:]
        if training_tiny.fits(layers, size, rule):
            config = training_tiny.tile(size)

            def tiny(order: Tensor, rates: Tensor, losses: Tensor) -> None:
                numbers = flat[None], moments[None], rates[None], losses[None]
                training_tiny.train(self._x, self._y, order, *numbers, layers, objective, rule, config)

            return tiny, TINY_STEPS
        chip = backend.multiprocessors(self._x.device), backend.chip(self._x.device).warp_size
        kernel: Any = training_layers
        if len(layers) == 1:
            kernel = training_single
            config = kernel.tile(layers[0].inputs, layers[0].outputs, size, *chip)
            fits = kernel.fits(config)
        else:
            config = kernel.tile(layers, size, precision, *chip, backend.is_ampere(self._x.device))
            fits = kernel.fits(layers)
        if not fits:
            widths = "-".join(map(str, self.recipe.widths))
            raise Unsupported(f"engine 'persistent' does not hold a network of widths {widths} at batch {size}")

        def grid(order: Tensor, rates: Tensor, losses: Tensor) -> None:
            tensors = self._x, self._y, order, flat, moments, rates, losses, self._failed
            kernel.train(*tensors, layers, objective, rule, precision, config)

        return grid, MOST_STEPS
