"""What every engine is to `fit`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fusedact import nn as ours
from fusedact.nn.hooks import is_plain


@dataclass(frozen=True)
class Job:
    """What is to be trained, on which rows, how many of them a step.

    precision: of products where the engine has a choice.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    x: Tensor
    y: Tensor
    batch_size: int
    precision: str | None = None


OURS: dict[Any, Any] = {
    getattr(nn, kind.__name__): kind
    for kind in (ours.Sequential, ours.CrossEntropyLoss, ours.NLLLoss, ours.BCELoss, ours.BCEWithLogitsLoss)
}


def fused(call: Any) -> Callable[..., Any]:
    """Ours in the place of torch's Sequential or loss, over the same layers and options; anything else as it is."""
    kind = OURS.get(type(call))
    if kind is None or not is_plain(call):
        return call
    module = kind()
    vars(module).update(vars(call))
    return module


def check_batches(x: Tensor, y: Tensor, batch_size: int, drop_last: bool) -> None:
    """ValueError for rows that do not pair, or make no batch."""
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} rows and y has {len(y)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(x) or (drop_last and batch_size > len(x)):
        raise ValueError(f"{len(x)} rows make no batch of {batch_size}")


class NotFinite(ArithmeticError):
    """A cost or a gradient is not finite. losses: of the steps before that one, since the call."""

    def __init__(self, what: str, losses: Tensor) -> None:
        super().__init__(what)
        self.what = what
        self.losses = losses


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
