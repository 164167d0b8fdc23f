"""Models of fusedact's layers, or fused by it, for tests of several processes, and their training in one."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fusedact
from fusedact import nn as fnn

ROWS, FEATURES, CLASSES, TOKENS, STEPS = 24, 7, 5, 2, 3
Batch = tuple[Tensor, ...]


class Stock(nn.Module):
    """What someone else wrote: a gated block and a row of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(FEATURES, 6), nn.Linear(FEATURES, 6), nn.Linear(6, FEATURES)
        self.first, self.act, self.last = nn.Linear(FEATURES, 6), nn.GELU(), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.last(self.act(self.first(x)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = fnn.Linear(width, 3 * width, bias=False)
        self.out = fnn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(fnn.functional.softmax(q @ k.mT, -1) @ v)


class Block(nn.Module):
    """A language model of one block, whose head is its loss; tied: one weight embeds and tells apart."""

    def __init__(self, tied: bool = False, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, width)
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)
        self.mlp = fnn.Sequential(fnn.Linear(width, 8, activation="gelu"), fnn.Linear(8, width))
        self.head = fnn.LinearCrossEntropyLoss(width, CLASSES)
        if tied:
            self.head.linear.weight = self.embed.weight

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x)
        x = x + self.mlp(self.norm(x))
        return self.head(x.flatten(0, 1), target.flatten())


def _mlp() -> nn.Module:
    layers = fnn.Linear(FEATURES, 8), fnn.ReLU(), fnn.Linear(8, 6), fnn.GELU(), fnn.Linear(6, CLASSES)
    return fnn.Sequential(*layers)


def _slopes() -> nn.Module:
    return fnn.Sequential(
        fnn.Linear(FEATURES, 8), fnn.PReLU(8), fnn.Linear(8, 6, activation="prelu"), fnn.Linear(6, CLASSES)
    )


def _cnn() -> nn.Module:
    return fnn.Sequential(
        fnn.Conv2d(1, 3, 3), fnn.ReLU(), fnn.Conv2d(3, 4, 2, activation="silu"), fnn.Flatten(), fnn.Linear(16, CLASSES)
    )


def _frozen() -> nn.Module:
    model = _mlp()
    model[0].requires_grad_(False)
    return model


class Example(NamedTuple):
    """A model, the shape of its input's row, whether it takes the targets and gives the loss itself, and what its
    forward is called within.
    """

    make: Callable[[], nn.Module]
    row: tuple[int, ...] = (FEATURES,)
    with_loss: bool = False
    within: Callable[[], AbstractContextManager] = nullcontext

    def under(self, within: Callable[[], AbstractContextManager]) -> "Example":
        return self._replace(within=within)

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same weights in every process and every dtype."""
        torch.manual_seed(5)
        return self.make().to(dtype)

    def batches(self, dtype: torch.dtype = torch.float32, steps: int = STEPS) -> list[Batch]:
        torch.manual_seed(6)
        return [self._batch(dtype) for _ in range(steps)]

    def _batch(self, dtype: torch.dtype) -> Batch:
        if self.with_loss:
            return torch.randint(CLASSES, (ROWS, *self.row)), torch.randint(CLASSES, (ROWS, *self.row))
        return torch.randn(ROWS, *self.row).to(dtype), torch.randint(CLASSES, (ROWS,))

    def loss(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        with self.within() if batch[0].dtype is not torch.float64 else nullcontext():
            if self.with_loss:
                return model(*batch)
            x, target = batch
            return fnn.functional.cross_entropy(model(x), target)


EXAMPLES = {
    "mlp": Example(_mlp),
    "slopes": Example(_slopes),
    "cnn": Example(_cnn, (1, 5, 5)),
    "fused": Example(lambda: fusedact.fuse(Stock())),
    "block": Example(Block, (TOKENS,), with_loss=True),
    "tied": Example(lambda: Block(tied=True), (TOKENS,), with_loss=True),
    "frozen": Example(_frozen),
}

# What is launched is the same in every model: `make test` takes kernels in two.
in_each = pytest.mark.parametrize(
    ("name", "kernels"),
    [
        pytest.param(name, way, marks=[] if way == "auto" or name in ("fused", "block") else pytest.mark.exhaustive)
        for name in EXAMPLES
        for way in ("auto", "triton")
    ],
    indirect=["kernels"],
)


def part(batch: Batch, rank: int, world: int) -> Batch:
    return tuple(t.tensor_split(world)[rank] for t in batch)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class Trained(NamedTuple):
    """Gradients of the first step, and all weights after the last, in the order of `parameters`."""

    gradients: list[Tensor]
    weights: list[Tensor]


def trained(model: nn.Module, steps: Iterable[Callable[[], Any]]) -> Trained:
    """Each step leaves gradients, from which the optimizer goes on."""
    optimizer, gradients = optimizer_of(model), None
    for step in steps:
        optimizer.zero_grad()
        step()
        if gradients is None:
            gradients = [whole(p.grad).clone() for p in model.parameters() if p.requires_grad]
        optimizer.step()
    return Trained(gradients or [], [whole(p).detach().clone() for p in model.parameters()])


def backward_of(example: Example, model: Callable[..., Any], batches: Sequence[Batch]) -> list[Callable[[], None]]:
    return [lambda batch=batch: example.loss(model, batch).backward() for batch in batches]  # type: ignore[misc]


def in_one_process(
    example: Example,
    dtype: torch.dtype,
    wrap: Callable[[nn.Module], Callable[..., Any]] = lambda model: model,
    pieces: int = 1,
    takes_part: Callable[[int, int], bool] = lambda step, piece: True,
) -> Trained:
    """In torch's own operations; `wrap` gives what is called in place of the model.

    Each batch in so many pieces, whose gradients are averaged over all though some take no part.
    """
    with fusedact.use_backend("torch"):
        model = example.model(dtype)
        called = wrap(model)

        def step(at: int, batch: Batch) -> None:
            for piece in range(pieces):
                if takes_part(at, piece):
                    (example.loss(called, part(batch, piece, pieces)) / pieces).backward()

        batches = enumerate(example.batches(dtype))
        return trained(model, [lambda at=at, batch=batch: step(at, batch) for at, batch in batches])  # type: ignore[misc]
