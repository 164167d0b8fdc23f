"""`fit`: a whole training run in as few launches as can be."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusedact import backend
from fusedact.fitting.engine import Engine, Job, NotFinite, check_batches
from fusedact.fitting.graph import Graph
from fusedact.fitting.loop import Loop
from fusedact.fitting.order import orders
from fusedact.fitting.persistent import Persistent
from fusedact.fitting.recipe import Unsupported
from fusedact.fitting.steps import Steps

ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (Persistent, Graph, Steps, Loop)}
FASTEST_FIRST = {"cpu": (Steps, Loop), "cuda": (Persistent, Graph, Loop)}
SLICE = 0.2  # seconds of training between looks at Ctrl-C; a display's watchdog allows two

Loss = Callable[[Tensor, Tensor], Tensor]
MakeOptimizer = Callable[..., torch.optim.Optimizer]


@dataclass
class Fitted:
    """A training run so far.

    costs: of each epoch, the mean of its steps' losses. engine: what trained, and reason: why not another.
    optimizer: whose state is that of its last step.
    """

    engine: str
    reason: str
    optimizer: torch.optim.Optimizer
    costs: list[float] = field(default_factory=list)


class Training:
    """A training run that goes on by epochs; see `fit` for what it takes."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Loss,
        optimizer: torch.optim.Optimizer | MakeOptimizer,
        lr: float | None = None,
        batch_size: int,
        drop_last: bool = False,
        shuffle: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        engine: str | None = None,
        precision: str | None = None,
    ) -> None:
        _check(x, y, batch_size, drop_last, engine, precision)
        if device is not None:
            model.to(device)
        device = next((p.device for p in model.parameters()), x.device)
        made = _optimizer(optimizer, model, lr)
        batch_size = min(batch_size, len(x))
        self._job = Job(model, loss, made, x.detach().to(device), y.detach().to(device), batch_size, precision)
        self._asked_for = engine
        self._refused: dict[str, str] = {}  # engines that could not be compiled, and why
        self.fitted = Fitted("", "", made)
        self._begin()
        self._left = _fingerprint(self._job)
        self._generator, self._shuffle = generator, shuffle
        self._rows = len(x)
        self._visited = len(x) // batch_size * batch_size if drop_last else len(x)
        self._epochs_per_slice = 1

    @property
    def engine(self) -> str:
        return self.fitted.engine

    @property
    def reason(self) -> str:
        """Why it is that engine."""
        return self.fitted.reason

    def train(self, epochs: int) -> None:
        """Trains so many epochs more."""
        until = len(self.fitted.costs) + epochs
        while len(self.fitted.costs) < until:
            self.slice(until - len(self.fitted.costs))

    def slice(self, limit: int) -> Tensor:
        """Trains at least one epoch and at most so many, for about 0.2 s; returns each step's loss, (epochs, steps).

        Parameters and optimizer are then as after the last step. Raises FloatingPointError where a cost or a gradient
        is not finite, with the parameters as before that step.
        """
        if _fingerprint(self._job) != self._left:  # a callback or a scheduler was there: engines keep copies
            self._begin()
        epochs = min(self._epochs_per_slice, limit)
        drawn_from = self._generator or torch.default_generator
        before = drawn_from.get_state()
        started = time.perf_counter()
        visited = orders(epochs, self._rows, self._generator, self._shuffle)[:, : self._visited]
        try:
            losses = self._trained(visited)
        except NotFinite as fault:
            raise self._stopped(fault) from None
        except BaseException:
            drawn_from.set_state(before)
            raise
        finally:
            self._write()
        self.fitted.costs += _means(losses)
        seconds = time.perf_counter() - started
        self._epochs_per_slice = max(1, min(4 * epochs, int(SLICE * epochs / seconds)))
        return losses

    def _trained(self, visited: Tensor) -> Tensor:
        """By the engine, or where its kernels cannot be compiled by the next one, from where that one began."""
        try:
            return self._engine.train(visited)
        except backend.launch_error() as error:
            if self._asked_for is not None:
                raise
            backend.give_up(error)
            self._refused[self._engine.name] = str(error)
            self._begin()
            return self._trained(visited)

    def _begin(self) -> None:
        self._engine, self.fitted.reason = _choose(self._job, self._asked_for, self._refused)
        self.fitted.engine = self._engine.name

    def _write(self) -> None:
        self._engine.write()
        if "step" in vars(self._job.optimizer):
            vars(self._job.optimizer)["_opt_called"] = True  # a scheduler asks whether there was a step
        self._left = _fingerprint(self._job)

    def _stopped(self, fault: NotFinite) -> FloatingPointError:
        steps = -(-self._visited // self._job.batch_size)
        epochs, step = divmod(len(fault.losses), steps)
        self.fitted.costs += _means(fault.losses[: epochs * steps].view(epochs, steps))
        return FloatingPointError(
            f"{fault.what} at epoch {len(self.fitted.costs) + 1}, step {step + 1}; "
            "the parameters are as before that step"
        )


def _means(losses: Tensor) -> list[float]:
    """Of each epoch's steps."""
    return losses.double().mean(1).tolist() if losses.numel() else []


def _fingerprint(job: Job) -> list[Any]:
    """Changes with the parameters, the optimizer's state, or its options."""
    optimizer = job.optimizer
    known = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    options = [
        (name, value.item() if isinstance(value, Tensor) else value)
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params"
    ]
    return [options, *((id(t), t._version) for t in (*job.model.parameters(), *known))]


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss,
    optimizer: torch.optim.Optimizer | MakeOptimizer,
    lr: float | None = None,
    epochs: int,
    batch_size: int,
    drop_last: bool = False,
    shuffle: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    callback: Callable[[Fitted], object] | None = None,
    every: int = 1,
    engine: str | None = None,
    precision: str | None = None,
) -> Fitted:
    """Trains the model on the rows of x and y, in place; its state_dict and the optimizer's are then as usual.

    It visits the batches, in the order, and takes the steps of

        for _ in range(epochs):
            for rows, targets in DataLoader(TensorDataset(x, y), batch_size, shuffle, drop_last, generator):
                optimizer.zero_grad()
                loss(model(rows), targets).backward()
                optimizer.step()

    by the fastest of these engines that can: `persistent` (GPU: all steps in one launch), `graph` (GPU: a CUDA graph
    of steps), `steps` (CPU: passes derived by hand), each to rounding, and `loop` (that loop, for any model).

    x, y: (rows, ...), a row each. loss: of torch's losses or any function of (output, target) -> ().
    optimizer: one that holds the model's parameters, or what makes one from them, `torch.optim.Adam` or a partial of
    it; lr is then passed on. device: where to train, the model's by default. callback: called after each `every`
    epochs with the run so far, when model and optimizer are up to date, and may be changed; where it returns True,
    training ends. Gradients, `p.grad`, are the loop's alone.
    engine: one of these by name. precision: of products in `persistent`: None for float32's own, "tf32" or "bf16".

    Raises ValueError for what does not fit together, and where the engine asked for cannot train this, naming what
    is not supported and what is; FloatingPointError where a cost or gradient is not finite, naming epoch and step,
    with the parameters as before that step.
    """
    if epochs < 0 or every < 1:
        raise ValueError(f"epochs must be at least 0 and every at least 1, got {epochs} and {every}")
    training = Training(
        model, x, y, loss=loss, optimizer=optimizer, lr=lr, batch_size=batch_size, drop_last=drop_last,
        shuffle=shuffle, generator=generator, device=device, engine=engine, precision=precision,
    )  # fmt: skip
    fitted = training.fitted
    while len(fitted.costs) < epochs:
        left = epochs - len(fitted.costs)
        training.train(min(every, left) if callback else left)
        if callback and callback(fitted) is True:
            break
    return fitted


def _check(x: Tensor, y: Tensor, batch_size: int, drop_last: bool, engine: str | None, precision: str | None) -> None:
    for name, tensor in (("x", x), ("y", y)):
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            raise ValueError(f"{name} must be a tensor of rows, got {tensor!r}")
    check_batches(x, y, batch_size, drop_last)
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}, expected one of {', '.join(ENGINES)}")
    if precision not in (None, "tf32", "bf16"):
        raise ValueError(f"unknown precision {precision!r}, expected None, 'tf32' or 'bf16'")


def _optimizer(
    optimizer: torch.optim.Optimizer | MakeOptimizer, model: nn.Module, lr: float | None
) -> torch.optim.Optimizer:
    if not isinstance(optimizer, torch.optim.Optimizer):
        return optimizer(model.parameters(), **({} if lr is None else {"lr": lr}))
    if lr is not None:
        raise ValueError("lr is the optimizer's own where an optimizer is given")
    return optimizer


def _choose(job: Job, asked_for: str | None, known: dict[str, str]) -> tuple[Engine, str]:
    """The engine, and why it is that one."""
    if asked_for is not None:
        return ENGINES[asked_for](job), "it was asked for"
    refused: list[str] = []
    for candidate in FASTEST_FIRST.get(job.x.device.type, (Loop,)):
        if candidate.name in known:
            refused.append(f"{candidate.name}: {known[candidate.name]}")
            continue
        try:
            return candidate(job), "; ".join(refused) or f"the fastest on {job.x.device.type}"
        except Unsupported as reason:
            refused.append(f"{candidate.name}: {reason}")
    raise ValueError("; ".join(refused))
