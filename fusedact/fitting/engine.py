"""What every engine is to `fit`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fusedact.fitting.recipe import Recipe, Unsupported


@dataclass(frozen=True)
class Job:
    """What is to be trained, on which rows, how many of them a step.

    recipe: of what the model, the loss and the optimizer are, or why they are none that it could be read off.
    precision: of products where the engine has a choice.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    x: Tensor
    y: Tensor
    batch_size: int
    recipe: Recipe | Unsupported
    precision: str | None = None


class NotFinite(ArithmeticError):
    """A cost or a gradient is not finite. steps: how many were taken before that one, since the call."""

    def __init__(self, what: str, steps: int) -> None:
        super().__init__(what)
        self.what = what
        self.steps = steps


class Engine(ABC):
    """A way to train. It raises Unsupported, with the reason, where it cannot train the job."""

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, job: Job) -> None: ...

    @abstractmethod
    def train(self, order: Tensor) -> Tensor:
        """A pass over each row of order (epochs, rows), in batches, the last of which may be shorter.

        Returns each step's loss, (epochs, steps). Raises NotFinite, with the parameters as before that step.
        """

    @abstractmethod
    def write(self) -> None:
        """Leaves parameters and the optimizer's state where torch keeps them."""
