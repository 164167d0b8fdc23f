"""The training loop that every trainer shares: what goes in, some epochs, what comes out."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fusedact.distributed import processes
from fusedact.fitting import Training
from fusedact.fitting.order import orders
from fusedact.trainers.parallel import DDP, Parallel

TUTORIAL = "tutorial"  # an engine of trainers' own: the tutorial's loop and its data loader, which makes each row
PLAIN = "plain"  # another: the same loop on rows that are on the device


@dataclass(frozen=True)
class Settings:
    """What a run can be told. Each trainer's `defaults` are its tutorial's.

    seed: of torch's global generator, or of the split that reseeds it (binary)
    data: a CSV file (binary, perceptron, xor) or a folder of IDX files (MNIST); None: made, or embedded
    start: every parameter, flattened in the model's order, in place of the drawn ones
    rows: of MNIST's training images, the first so many; None: all
    raw_pixels: evaluate MNIST on 0..255 as the tutorial does, though it trains on 0..1
    standardize, logits: of binary: inputs of mean 0 and deviation 1; BCE on logits in place of Sigmoid and BCELoss
    engine: of `fusedact.fit` by name, "auto" for the fastest that can, or "tutorial", or "plain" for that loop
        on rows that are on the device, or "ddp" for it with each batch split over the processes of torch.distributed's
        group, which "auto" is where there is one
    """

    epochs: int
    batch_size: int
    lr: float
    seed: int
    device: str = "cpu"
    data: Path | None = None
    download: bool = False
    start: tuple[float, ...] | None = None
    rows: int | None = None
    raw_pixels: bool = False
    standardize: bool = False
    logits: bool = False
    engine: str = "auto"


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
    report_every: ClassVar[int] = 1  # epochs after which the tutorial prints

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
        self.done = 0  # epochs
        if settings.start is not None:
            _set_parameters(self.model, settings.start)
        if settings.batch_size > len(self.x):
            raise ValueError(f"batch size {settings.batch_size} exceeds the {len(self.x)} training rows")
        self._passes = self._begun()
        self.engine, self.reason = self._passes.engine, self._passes.reason

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
        """Trains; the records of the epochs, some of which may be done before the first of them is taken."""
        for some in self.slices():
            yield from some

    def slices(self, every: int | None = None) -> Iterator[list[Epoch]]:
        """Trains, some epochs for each list of records taken, after the last of which the model then is.

        A list ends where the tutorial prints, and at multiples of `every`.
        """
        stops = [self.report_every, every or self.settings.epochs, self.settings.epochs]
        while self.done < self.settings.epochs:
            yield self._slice(min(stop - self.done % stop for stop in stops))

    def visited(self, rows: int) -> Tensor:
        """The rows that a DataLoader visits next, in its order, by its draws."""
        with self._drawing():
            return orders(1, rows, None)[0]

    def row(self, x: Any, y: Any) -> tuple[Any, Any]:
        """What the tutorial's data set makes of a row's numbers in numpy."""
        return torch.FloatTensor([*x]), torch.FloatTensor([*y])

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Trains on one batch as the tutorial does; returns its cost, ()."""
        cost = self.criterion(self.model(x), y)
        self.optimizer.zero_grad()
        cost.backward()
        self.optimizer.step()
        return cost.detach()

    def state(self) -> dict[str, Any]:
        """What `resume` needs to go on as if nothing had happened."""
        return {
            "epochs": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self._random_state,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from another run's state. ValueError, RuntimeError or KeyError where it is of another model."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self._random_state = state["epochs"], state["random"]
        self._passes = self._begun()

    def _begun(self) -> "Training | _Plain | Parallel":
        if self.settings.engine == DDP or (self.settings.engine == "auto" and processes.started()):
            return Parallel(self)
        if self.settings.engine in (TUTORIAL, PLAIN):
            return _Tutorial(self) if self.settings.engine == TUTORIAL else _Plain(self)
        engine = None if self.settings.engine == "auto" else self.settings.engine
        return Training(
            self.model, self.x, self.y, loss=self.criterion, optimizer=self.optimizer,
            batch_size=self.settings.batch_size, drop_last=True, engine=engine,
        )  # fmt: skip

    def _slice(self, limit: int) -> list[Epoch]:
        self.model.train()
        clock = partial(_clock, self.x.device, alone=not isinstance(self._passes, Parallel))
        started = clock()
        with self._drawing():
            losses = self._passes.slice(limit)  # (epochs, steps)
        seconds = (clock() - started) / losses.numel()
        costs = torch.zeros(len(losses), dtype=self.cost_dtype, device=losses.device)
        for step in losses.unbind(1):  # one by one, as the tutorial adds them
            costs += step
        first, self.done = self.done + 1, self.done + len(losses)
        means = (costs / losses.shape[1]).tolist()
        return [Epoch(number, cost, seconds) for number, cost in enumerate(means, first)]

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Torch's global generator in this trainer's state."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random_state)
            yield
            self._random_state = torch.get_rng_state()


class _Rows(Dataset):
    """A row made when it is asked for, as the tutorials' data sets do."""

    def __init__(self, trainer: Trainer) -> None:
        self.x, self.y, self.row = trainer.x.cpu().numpy(), trainer.y.cpu().numpy(), trainer.row

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.row(self.x[index], self.y[index])

    def __len__(self) -> int:
        return len(self.x)


class _Plain:
    """The tutorial's loop on rows that are on the device."""

    engine, reason = PLAIN, "it was asked for"

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def slice(self, limit: int) -> Tensor:
        x, y, size = self.trainer.x, self.trainer.y, self.trainer.settings.batch_size
        visited = orders(1, len(x), None)[0, : len(x) // size * size].to(x.device)
        return torch.stack([self.trainer.step(x[rows], y[rows]) for rows in visited.split(size)])[None]


class _Tutorial(_Plain):
    """The tutorial's own loop."""

    engine = TUTORIAL

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.batches = DataLoader(_Rows(trainer), trainer.settings.batch_size, shuffle=True, drop_last=True)

    def slice(self, limit: int) -> Tensor:
        device = self.trainer.x.device
        return torch.stack([self.trainer.step(x.to(device), y.to(device)) for x, y in self.batches])[None]


def _clock(device: torch.device, alone: bool) -> float:
    """Seconds: of CPU where this thread does all the work, else on the wall, the device's work done.

    alone: no other process is waited for.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    elif alone and torch.get_num_threads() == 1:
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
