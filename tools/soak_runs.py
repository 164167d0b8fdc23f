"""What tools/soak.py repeats: each function trains something new from start to end, of a shape drawn anew.

A leak shows where nothing is used twice: models, sizes, batch sizes, rates, activations and optimizers all change.
"""

import contextlib
import io
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

import fusedact
from fusedact import nn as fused
from fusedact.__main__ import main as command
from fusedact.fitting import fit, fit_many
from fusedact.trainers import LAYERS, TRAINERS
from fusedact.trainers.loop import PLAIN, TUTORIAL

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU)


def _model(draw: random.Random, widths: list[int], layers=nn) -> nn.Sequential:
    """Linear layers of these widths, an activation after each but the last."""
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        parts += [layers.Linear(inputs, outputs), getattr(layers, draw.choice(ACTIVATIONS).__name__)()]
    return layers.Sequential(*parts[:-1])


def _task(draw: random.Random, widths: list[int], rows: int) -> tuple:
    """x, y and a loss that takes them."""
    x = torch.randn(rows, widths[0])
    if widths[-1] == 1:
        return x, torch.rand(rows, 1).round(), nn.BCEWithLogitsLoss()
    return x, torch.randint(widths[-1], (rows,)), nn.CrossEntropyLoss()


def _optimizer(draw: random.Random, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    kind, options = draw.choice(
        [(torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {}), (torch.optim.AdamW, {})]
    )
    return kind(parameters, lr=draw.uniform(1e-4, 1e-1), **options)


def _fit(engine: str, depth: int, wide: tuple[int, int], rows: int, epochs: int) -> Callable[[random.Random], None]:
    """`fit` of networks so deep, of layers between so many units wide."""

    def run(draw: random.Random) -> None:
        widths = [draw.randint(*wide) for _ in range(depth)] + [draw.choice([1, draw.randint(2, 8)])]
        x, y, loss = _task(draw, widths, draw.randint(4, rows))
        model = _model(draw, widths)
        size = draw.randint(1, len(x))
        fit(
            model, x, y, loss=loss, optimizer=_optimizer(draw, model.parameters()), epochs=epochs,
            batch_size=size, engine=engine,
        )  # fmt: skip

    return run


def _many(draw: random.Random) -> None:
    widths = [draw.randint(1, 4), draw.randint(1, 4), 1]
    x, y, loss = _task(draw, widths, draw.randint(4, 16))
    fit_many(
        _model(draw, widths), x, y, loss=loss, optimizer=torch.optim.SGD, epochs=draw.randint(1, 4), batch_size=8,
        lrs=[draw.uniform(0.01, 1.0) for _ in range(draw.randint(1, 8))],
    )  # fmt: skip


def _steps_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor, loss: nn.Module, draw: random.Random) -> None:
    """Three steps as a user writes them."""
    optimizer = _optimizer(draw, model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()


def _modules(layers) -> Callable[[random.Random], None]:
    """Layers, convolution and loss with options that change."""

    def run(draw: random.Random) -> None:
        widths = [draw.randint(1, 24) for _ in range(3)] + [draw.randint(2, 12)]
        x, y, _ = _task(draw, widths, draw.randint(1, 24))
        loss = layers.CrossEntropyLoss(label_smoothing=draw.random(), reduction=draw.choice(["mean", "sum"]))
        model = _model(draw, widths, layers)
        curved = [layers.LeakyReLU(draw.random()), layers.Softplus(draw.uniform(0.5, 2)), layers.ELU(draw.random())]
        model.append(draw.choice([*curved, layers.Threshold(draw.random(), draw.random()), layers.PReLU()]))
        _steps_of(model, x, y, loss, draw)
        channels, side = draw.randint(1, 3), draw.randint(4, 8)
        picture = torch.randn(draw.randint(1, 4), channels, side, side)
        seen = layers.Sequential(layers.Conv2d(channels, 2, 3), layers.ReLU(), nn.Flatten())
        logits = seen.append(layers.Linear(2 * (side - 2) ** 2, 1))
        _steps_of(logits, picture, torch.rand(len(picture), 1), layers.BCEWithLogitsLoss(), draw)

    return run


def _fused_models(draw: random.Random) -> None:
    """`fuse` and `unfuse` of a class that is made anew each time, as notebooks do."""

    class Network(nn.Module):
        def __init__(self, inputs: int, hidden: int, slope: float) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, 3)
            self.act = nn.LeakyReLU(slope)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.act(self.first(x)))

    inputs = draw.randint(1, 16)
    model, x = Network(inputs, draw.randint(1, 16), draw.random()), torch.randn(draw.randint(1, 16), inputs)
    y = torch.randint(3, (len(x),))
    fusedact.fuse(model)
    _steps_of(model, x, y, nn.CrossEntropyLoss(), draw)
    fusedact.unfuse(model)


def _trainer(layers: str, engine: str) -> Callable[[random.Random], None]:
    def run(draw: random.Random) -> None:
        kind = TRAINERS[draw.choice(["binary", "perceptron", "xor", "mnist-softmax"])]
        few = {"rows": 128} if kind.name.startswith("mnist") else {}
        settings = replace(
            kind.defaults, epochs=2, batch_size=draw.randint(1, 64), lr=draw.uniform(1e-4, 1e-2), engine=engine, **few
        )
        trainer = kind(LAYERS[layers], settings)
        for _ in trainer.epochs():
            pass
        trainer.evaluate()

    return run


def _command(draw: random.Random) -> None:
    """`fusedact train` with checkpoints, and again from the last of them."""
    name, said = draw.choice(["xor", "perceptron", "binary"]), io.StringIO()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(said):
        common = ["train", name, "--out", out, "--checkpoint-every", "5", "--lr", str(draw.uniform(1e-3, 1e-1))]
        first = command([*common, "--epochs", "10"])
        then = command([*common, "--epochs", "20", "--resume"])
    if first or then:
        raise RuntimeError(f"fusedact train {name} ended with {first} and {then}")


# By name: the backend, and what is repeated. Stock is the control: what torch and the allocator do by themselves.
RUNS: dict[str, tuple[str, Callable[[random.Random], None]]] = {
    "stock modules": ("torch", _modules(nn)),
    "modules": ("torch", _modules(fused)),
    "modules, kernels": ("triton", _modules(fused)),
    "fuse, kernels": ("triton", _fused_models),
    "fit steps": ("auto", _fit("steps", 3, (1, 64), 256, 20)),
    "fit loop": ("auto", _fit("loop", 3, (1, 64), 256, 5)),
    "fit tiny, kernels": ("triton", _fit("persistent", 2, (1, 3), 16, 1)),
    "fit single, kernels": ("triton", _fit("persistent", 1, (49, 64), 64, 1)),
    "fit layers, kernels": ("triton", _fit("persistent", 3, (17, 33), 16, 1)),
    "fit_many": ("torch", _many),
    "fit_many, kernels": ("triton", _many),
    "trainers, tutorial": ("auto", _trainer("fused", TUTORIAL)),
    "trainers, plain": ("auto", _trainer("fused", PLAIN)),
    "command line": ("auto", _command),
}
