"""What the engines share that train a recipe with all its numbers in one tensor."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from fusedact.fitting.engine import Engine, Job, NotFinite
from fusedact.fitting.recipe import Recipe, Unsupported, read
from fusedact.fitting.state import State


class FlatEngine(Engine):
    """A run of many steps is looked at once, at its end; only where something is not finite, it is searched."""

    @property
    @abstractmethod
    def state(self) -> State:
        """What it trains."""

    def __init__(self, job: Job) -> None:
        self.job, self.recipe = job, read(job.model, job.loss, job.optimizer)
        check_rows(job.x, job.y, self.recipe)
        if torch.is_autocast_enabled(job.x.device.type):
            raise Unsupported(f"engine {self.name!r} computes in {self.recipe.dtype}, autocast is not supported")

    @abstractmethod
    def advance(self, order: Tensor) -> Tensor:
        """As `train`, whatever the numbers are."""

    def train(self, order: Tensor) -> Tensor:
        before = self.state.snapshot()
        try:
            losses = self.advance(order)
        except BaseException:  # KeyboardInterrupt too: what is left is a whole number of passes
            self.state.restore(before)
            raise
        if not self._is_finite(losses):
            self.state.restore(before)
            self._stop_before_the_fault(order)
        return losses

    def write(self) -> None:
        self.state.write()

    def _is_finite(self, losses: Tensor) -> bool:
        return bool(losses.isfinite().all()) and self.state.is_finite()

    def _stop_before_the_fault(self, order: Tensor) -> None:
        """Takes the steps before the first one that leaves something not finite, and raises NotFinite."""
        size, taken = self.job.batch_size, []
        for visited in order:
            before = self.state.snapshot()
            steps = -(-len(visited) // size)
            losses = self.advance(visited[None])
            if self._is_finite(losses):
                taken.append(losses[0])
                continue
            good, bad = 0, steps  # so many steps leave all finite; so many do not
            while bad - good > 1:
                middle = (good + bad) // 2
                self.state.restore(before)
                fine = self._is_finite(self.advance(visited[None, : middle * size]))
                good, bad = (middle, bad) if fine else (good, middle)
            self.state.restore(before)
            if good:
                taken.append(self.advance(visited[None, : good * size])[0])
            last = self.state.snapshot()
            cost = self.advance(visited[None, good * size : bad * size]).item()
            self.state.restore(last)
            what = "a gradient, or its step, is not finite" if math.isfinite(cost) else f"the cost is {cost}"
            raise NotFinite(what, torch.cat([losses.new_empty(0), *taken]))


def check_rows(x: Tensor, y: Tensor, recipe: Recipe) -> None:
    """Raises Unsupported where torch would answer for itself: other shapes, dtypes, devices, labels."""
    name, outputs = recipe.objective.name, recipe.widths[-1]
    if x.dim() != 2 or x.shape[1] != recipe.widths[0] or x.dtype != recipe.dtype:
        expected = f"({len(x)}, {recipe.widths[0]}) {recipe.dtype}"
        raise Unsupported(f"x of shape {tuple(x.shape)} and {x.dtype} is not supported, expected {expected}")
    shape, dtype = ((len(x),), torch.int64) if recipe.objective.labels else ((len(x), outputs), recipe.dtype)
    if y.shape != shape or y.dtype != dtype:
        raise Unsupported(
            f"y of shape {tuple(y.shape)} and {y.dtype} is not supported with {name}, expected {shape} {dtype}"
        )
    if {x.device, y.device} != {recipe.device}:
        raise Unsupported(f"x is on {x.device} and y on {y.device}, the model is on {recipe.device}")
    highest = {"cross_entropy": outputs - 1, "binary_cross_entropy": 1}.get(name)
    if highest is not None and len(y) and not (y.min() >= 0 and y.max() <= highest):
        raise Unsupported(f"y has values outside 0 to {highest}, which {name} does not take")
