"""A small network trained by each pairing, right or wrong, from the same start on the same made data."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedact import nn as fused
from fusedact.backend import use_backend
from fusedact.catalogue.pairings import TASKS, Pairing, Task

HIDDEN, FEATURES = 16, 4
ROWS, HELD_OUT = 500, 4000
LR, STEPS, LOOK_EVERY = 1.0, 300, 10
SMALLEST_LOG = -100.0  # as BCELoss has it


class Look(NamedTuple):
    """After some steps: the cost, and on held-out rows -log of the probability given to the truth and the share right.

    The share right of a multi-label task is that of rows whose labels are all right.
    """

    step: int
    cost: float
    log_loss: float
    accuracy: float


class Outcome(NamedTuple):
    """What became of a pairing: looks while it trained, or the error with which it was refused.

    farthest: on held-out rows the largest difference of its probabilities from the task's first pairing's.
    """

    pairing: Pairing
    looks: list[Look]
    farthest: float
    error: str = ""


class Comparison(NamedTuple):
    """A task's outcomes, and what the chances that its labels were drawn with reach on the held-out rows."""

    task: Task
    outcomes: list[Outcome]
    best_log_loss: float
    best_accuracy: float

    def records(self) -> list[dict[str, Any]]:
        """A line for each look; one with the error for a pairing that was refused."""
        return [
            {
                "task": self.task.name,
                "pairing": outcome.pairing.name,
                "right": outcome.pairing.right,
                **look._asdict(),
                "farthest": outcome.farthest,
                "error": outcome.error,
            }
            for outcome in self.outcomes
            for look in outcome.looks or [Look(0, math.nan, math.nan, math.nan)]
        ]


class _Data(NamedTuple):
    """Rows to train on, x (ROWS, FEATURES), and held-out ones with the chances their labels were drawn with."""

    x: Tensor
    y: Tensor
    held_out: Tensor
    answers: Tensor
    chances: Tensor


def compare(
    seed: int = 0, device: str = "cpu", steps: int = STEPS, progress: Callable[[int], None] | None = None
) -> list[Comparison]:
    """Trains one small network by each pairing of each task, on fusedact.nn, from the same start on the same data.

    Full batches, SGD. progress: called after each pairing with the number of those that are done.
    """
    compared, done = [], 0
    for task in TASKS:
        data = _data(task, seed, device)
        outcomes: list[Outcome] = []
        first = None
        for pairing in task.pairings:
            outcome, first = _train(task, pairing, data, seed, steps, first)
            outcomes.append(outcome)
            done += 1
            if progress:
                progress(done)
        compared.append(Comparison(task, outcomes, *_score(task, data.chances, data.answers)))
    return compared


def _data(task: Task, seed: int, device: str) -> _Data:
    """Normal inputs, a linear rule, and labels drawn with the chances that it gives, so that the best is known."""
    generator = torch.Generator().manual_seed(seed)
    rule = torch.randn(FEATURES, task.outputs, generator=generator)
    x = torch.randn(ROWS + HELD_OUT, FEATURES, generator=generator)
    logits = 1.5 * x @ rule
    if task.exclusive:
        chances = logits.softmax(1)
        y = torch.multinomial(chances, 1, generator=generator)[:, 0]
    else:
        chances = logits.sigmoid()
        y = torch.bernoulli(chances, generator=generator)
    x, y, chances = x.to(device), y.to(device), chances.to(device)
    return _Data(x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:], chances[ROWS:])


def _train(
    task: Task, pairing: Pairing, data: _Data, seed: int, steps: int, first: Tensor | None
) -> tuple[Outcome, Tensor | None]:
    """The outcome, and the probabilities of the task's first pairing, which are these where there is none yet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [fused.Linear(FEATURES, HIDDEN), fused.Tanh(), fused.Linear(HIDDEN, task.outputs)]
    model, loss = fused.Sequential(*layers, *pairing.layers(fused)), getattr(fused, pairing.loss)()
    targets = pairing.encode(data.y)
    if error := "" if pairing.right else _refusal(model, loss, data.x, targets):
        return Outcome(pairing, [], math.nan, error), first
    model.to(data.x.device)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    looks = []
    for step in range(steps + 1):
        cost = loss(model(data.x), targets)
        if step % LOOK_EVERY == 0 or step == steps:
            with torch.no_grad():
                p = _probabilities(task, pairing.output, model(data.held_out))
            looks.append(Look(step, cost.item(), *_score(task, p, data.answers)))
        if step < steps:
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()
    first = p if first is None else first
    return Outcome(pairing, looks, (p - first).abs().max().item()), first


def _refusal(model: torch.nn.Module, loss: Any, x: Tensor, targets: Tensor) -> str:
    """The error of the first step, in one line; on a CPU, where looking at values costs no synchronisation."""
    with use_backend("auto") if x.is_cuda else nullcontext():
        try:
            loss(model(x.cpu()), targets.cpu())
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def _probabilities(task: Task, output: str, y: Tensor) -> Tensor:
    """What the model's output says of each class: itself where it is a probability, else what its logits mean."""
    if output == "LogSoftmax":
        return y.exp()
    if output:
        return y
    return y.softmax(1) if task.exclusive else y.sigmoid()


def _score(task: Task, p: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean -log of the probability given to what was true, and the share of rows decided rightly."""
    p = p.double()
    if task.exclusive:
        given, right = p.gather(1, y[:, None]), p.argmax(1) == y
    else:
        given, right = torch.where(y == 1, p, 1 - p), ((p >= 0.5) == (y == 1)).all(1)
    return -given.log().clamp(min=SMALLEST_LOG).mean().item(), right.double().mean().item()
