"""The training loop that every trainer shares: what goes in, one epoch, what comes out."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Settings:
    """What a run can be told. Each trainer's `defaults` are its tutorial's.

    seed: of torch's global generator, or of the split that reseeds it (binary)
    data: a CSV file (binary, perceptron, xor) or a folder of IDX files (MNIST); None: made, or embedded
    start: every parameter, flattened in the model's order, in place of the drawn ones
    raw_pixels: evaluate MNIST on 0..255 as the tutorial does, though it trains on 0..1
    """

    epochs: int
    batch_size: int
    lr: float
    seed: int
    device: str = "cpu"
    data: Path | None = None
    download: bool = False
    start: tuple[float, ...] | None = None
    raw_pixels: bool = False


@dataclass(frozen=True)
class Epoch:
    """One pass over the training rows: its number from 1, mean cost of its steps, and seconds a step took."""

    number: int
    cost: float
    step_seconds: float


@dataclass(frozen=True)
class Evaluation:
    """The share of right answers, and what the tutorial prints after training."""

    accuracy: float
    text: str


class Trainer(ABC):
    """A tutorial's program on the layers of `nn`, `torch.nn` or `fusedact.nn`.

    It draws from torch's global generator what the tutorial's program draws, but on a state of its own: two
    trainers with one seed visit the same batches however their epochs interleave.

    Raises ValueError where `settings` do not fit the data or the model.
    """

    name: ClassVar[str]
    defaults: ClassVar[Settings]
    cost_dtype: ClassVar[torch.dtype] = torch.float32  # the tutorial adds up tensors

    source: str  # of the data, in words
    x: Tensor  # (rows, ...), the training rows
    y: Tensor  # (rows, ...)
    model: torch.nn.Module
    criterion: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, nn: ModuleType, settings: Settings) -> None:
        self.settings = settings
        with torch.random.fork_rng(devices=[]):
            self.build(nn)
            self._random_state = torch.get_rng_state()
        if settings.start is not None:
            _set_parameters(self.model, settings.start)
        if settings.batch_size > len(self.x):
            raise ValueError(f"batch size {settings.batch_size} exceeds the {len(self.x)} training rows")

    @abstractmethod
    def build(self, nn: ModuleType) -> None:
        """Sets the attributes above, drawing at random in the tutorial's order."""

    @abstractmethod
    def report(self, epoch: Epoch) -> str | None:
        """What the tutorial prints after this epoch."""

    @abstractmethod
    def evaluate(self) -> Evaluation:
        """Tests the model as the tutorial does after its last epoch."""

    def epochs(self) -> Iterator[Epoch]:
        """Trains, one epoch for each record taken."""
        for number in range(1, self.settings.epochs + 1):
            yield self._epoch(number, *self.shuffled(self.x, self.y, self.settings.batch_size))

    def shuffled(self, x: Tensor, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """The rows that `DataLoader(shuffle=True, drop_last=True)` visits, in its order, by its draws."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random_state)
            [order] = DataLoader(range(len(x)), len(x), shuffle=True)  # type: ignore[arg-type]
            self._random_state = torch.get_rng_state()
        order = order[: len(x) // batch_size * batch_size].to(x.device)
        return x[order], y[order]

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Trains on one batch; returns its cost, ()."""
        cost = self.criterion(self.model(x), y)
        self.optimizer.zero_grad()
        cost.backward()
        self.optimizer.step()
        return cost.detach()

    def _epoch(self, number: int, x: Tensor, y: Tensor) -> Epoch:
        batches = list(zip(x.split(self.settings.batch_size), y.split(self.settings.batch_size), strict=True))
        self.model.train()
        started = _clock(x.device)
        cost = torch.zeros((), dtype=self.cost_dtype, device=x.device)
        for batch in batches:
            cost += self.step(*batch)
        seconds = _clock(x.device) - started
        return Epoch(number, (cost / len(batches)).item(), seconds / len(batches))


def _clock(device: torch.device) -> float:
    """Seconds: of CPU where this thread does all the work, else on the wall, the device's work done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()


@torch.no_grad()
def _set_parameters(model: torch.nn.Module, values: tuple[float, ...]) -> None:
    parameters = list(model.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    if len(values) != sum(sizes):
        raise ValueError(f"the model starts from {sum(sizes)} numbers, received {len(values)}")
    parts = torch.tensor(values, dtype=torch.float64).split(sizes)
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view_as(parameter))
