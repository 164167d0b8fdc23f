"""What every op asks of its input before it takes the kernels' way."""

import torch
from torch import Tensor, nn
from torch.nn import _reduction as _Reduction

from fusedact import backend
from fusedact.activations import Activation, by_name, of_module

PLAIN, STRIDED = backend.PLAIN, torch.strided
REDUCTIONS = ("mean", "sum", "none")


def on_triton(input: Tensor, *others: Tensor | None) -> bool:
    """All are plain strided tensors of one device on which Triton runs, and jit.trace is not recording."""
    if not isinstance(input, Tensor) or not backend.uses_triton(input) or torch.jit.is_tracing():
        return False
    device = input.device
    for t in others:
        if t is not None and (not _readable(t) or t.device != device):
            return False
    return _readable(input)


def _readable(t: Tensor) -> bool:
    """Its memory is a strided tensor's, as a kernel reads it."""
    if type(t) not in PLAIN and not (isinstance(t, Tensor) and backend.is_transparent(t)):
        return False
    return t.layout is STRIDED and not t.is_nested


def refuse_meta(input: Tensor, *parameters: Tensor | None) -> None:
    """RuntimeError where torch would take meta ones for an input with values, and answer with unwritten memory."""
    for t in parameters:
        if isinstance(t, Tensor) and t.is_meta and isinstance(input, Tensor) and not input.is_meta:
            devices = f"{input.device} and meta"
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {devices}"
            )


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: every floating tensor but float64."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def resolved(
    caller: str, activation: str | nn.Module, slope: Tensor | None, parameters: dict[str, float]
) -> nn.Module | tuple[Activation, tuple[float, ...], Tensor | None]:
    """The activation with its parameters and slope, or the module itself where the table does not have it."""
    if isinstance(activation, nn.Module):
        if parameters or slope is not None:
            raise TypeError(f"{caller}() takes an activation's parameters from its module, or by keyword with its name")
        return of_module(activation) or activation
    act = by_name(activation)
    values = act.parameters(parameters) if parameters else act.default_values
    if act.learned != (slope is not None):
        raise TypeError(f"activation {act.name!r} takes {'a' if act.learned else 'no'} slope= tensor")
    return act, values, slope


def class_dim(input: Tensor) -> int:
    """Where a loss finds the classes: (C) or (N, C, ...)."""
    return min(1, input.dim() - 1)


def resolved_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction; what the deprecated arguments mean, with torch's warning, where they are given."""
    if size_average is None and reduce is None:
        return reduction
    return _Reduction.legacy_get_string(size_average, reduce)


def checked_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The resolved reduction, which is one of torch's. ValueError otherwise."""
    reduction = resolved_reduction(size_average, reduce, reduction)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return reduction
