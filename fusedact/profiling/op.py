"""What an op is: its module, its formula, its least bytes and FLOPs; and what several of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from fusedact.profiling.cases import Case

PHASES = ("forward", "backward", "both")
EARLY = ("no_grad", "both")  # where gradients are made with the value, a backward alone does what no training does


@dataclass(frozen=True)
class Work:
    """The least a phase can do: every input read once, every output written once; one FLOP per operation."""

    bytes: int
    flops: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Op:
    """module(nn, case) on `torch.nn` or `fusedact.nn`; inputs(case), the first of which wants a gradient where
    input_gradient says so, as the parameters do; formula(case)(*inputs, *parameters) is the same in torch's functions,
    for the compiler and for the truth.
    """

    module: Callable[[ModuleType, Case], torch.nn.Module]
    inputs: Callable[[Case], tuple[Tensor, ...]]
    formula: Callable[[Case], Callable[..., Tensor]]
    forward: Callable[[Case], Work]
    backward: Callable[[Case], Work]
    phases: tuple[str, ...] = PHASES
    input_gradient: bool = True


def passes_over(reads: int, writes: int, flops: int, label_bytes: int = 0) -> Callable[[Case], Work]:
    """Passes over the logits' shape and operations on each element, with a label a row."""

    def work(case: Case) -> Work:
        elements = prod(case.shape)
        moved = (reads + writes) * elements * case.torch_dtype.itemsize
        return Work(moved + label_bytes * (elements // case.shape[1] if label_bytes else 0), flops * elements)

    return work


def logits(case: Case) -> Tensor:
    return torch.randn(case.shape, dtype=case.torch_dtype)
