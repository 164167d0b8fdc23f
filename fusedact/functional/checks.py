"""What every op asks of its input before it takes the kernels' way."""

import torch
from torch import Tensor

from fusedact import backend

REDUCTIONS = ("mean", "sum", "none")


def on_triton(input: Tensor, *others: Tensor | None) -> bool:
    """All are plain strided tensors of one device on which Triton runs, and jit.trace is not recording."""
    if not isinstance(input, Tensor) or not backend.uses_triton(input) or torch.jit.is_tracing():
        return False
    return all(
        isinstance(t, Tensor) and t.device == input.device and t.layout == torch.strided and not backend.overrides(t)
        for t in (input, *others)
        if t is not None
    )


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: every floating tensor but float64."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
