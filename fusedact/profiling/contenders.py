"""Who runs an op: stock, fused and compiled, over the same inputs and parameters."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fusedact
from fusedact.profiling.cases import Case
from fusedact.profiling.ops import OPS


@dataclass(frozen=True)
class Contender:
    """A function, the arguments it is called with, and those of them that want a gradient."""

    function: Callable[..., Tensor]
    args: tuple[Tensor, ...]
    wanted: tuple[Tensor, ...]

    def forward(self) -> Tensor:
        return self.function(*self.args)

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        return self.forward()

    def gradients(self, y: Tensor, dy: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.wanted, dy, retain_graph=retain_graph)

    def call(self, phase: str, dy: Tensor) -> Callable[[], object]:
        """The phase as a call without arguments; for the backward alone, forward runs here."""
        if phase == "forward":
            return self.forward
        if phase == "no_grad":
            return self.evaluate
        if phase == "both":
            return lambda: self.gradients(self.forward(), dy)
        y = self.forward()
        return lambda: self.gradients(y, dy, retain_graph=True)


def contenders(case: Case, seed: int, compiled: Callable[..., Tensor] | None = None) -> dict[str, Contender]:
    """Stock and fused modules, and the compiled formula, over the same fresh inputs and parameters.

    Everything lands on torch's default device.
    """
    torch.manual_seed(seed)
    op = OPS[case.op]
    x, *others = op.inputs(case)
    inputs = (x.requires_grad_(op.input_gradient), *others)
    stock, fused = (op.module(nn, case).to(case.torch_dtype) for nn in (torch.nn, fusedact.nn))
    fused.load_state_dict(stock.state_dict(), assign=True)
    parameters = tuple(stock.parameters())
    learned = (x,) if op.input_gradient else ()
    runs = {
        "stock": Contender(stock, inputs, (*learned, *parameters)),
        "fusedact": Contender(fused, inputs, (*learned, *fused.parameters())),
    }
    if compiled is not None:
        runs["compile"] = Contender(compiled, (*inputs, *parameters), (*learned, *parameters))
    return runs


def output_gradient(y: Tensor) -> Tensor:
    """dy: 1 for a loss, as training has it, else random."""
    return torch.randn_like(y) if y.dim() else torch.ones_like(y)
