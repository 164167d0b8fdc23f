"""torch.nn.functional with the fused ops in it. Every other name of torch's falls through.

What a kernel does not take (another dtype, a broadcast bias, an option not fused yet) goes to torch's own
operations, which answer, or raise torch's own error, before anything is launched.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedact import autograd, backend
from fusedact.activations import Activation, by_name, of_module

_REDUCTIONS = ("mean", "sum", "none")


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | nn.Module | None = None,
    slope: Tensor | None = None,
    **parameters: float,
) -> Tensor:
    """activation(input weightᵀ + bias), in one launch where Triton runs.

    input (*, K), weight (N, K), bias (N,) -> (*, N), of one floating dtype. `activation` is a name of the table
    (its parameters by torch's own names: `negative_slope=0.2`; prelu's tensor as `slope`), or a module: one of
    torch.nn's activations is fused with its own parameters, any other runs after the product.

    Raises ValueError for an unknown name, TypeError for a parameter that the activation does not have, and
    torch.nn.functional.linear's errors. Source: torch.nn.functional.linear.
    """
    if activation is None:
        if parameters or slope is not None:
            raise TypeError("linear() takes an activation's parameters only together with activation=")
        return F.linear(input, weight, bias)
    if isinstance(activation, nn.Module):
        if parameters or slope is not None:
            raise TypeError("linear() takes an activation's parameters from its module, or by keyword with its name")
        found = of_module(activation)
        if found is None:
            return activation(F.linear(input, weight, bias))
        act, values, slope = found
    else:
        act = by_name(activation)
        values = act.parameters(parameters)
        if act.learned != (slope is not None):
            raise TypeError(f"activation {act.name!r} takes {'a' if act.learned else 'no'} slope= tensor")
    return _linear_act(input, weight, bias, act, values, slope)


def _linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: Activation,
    values: tuple[float, ...],
    slope: Tensor | None,
) -> Tensor:
    fused = _on_triton(input, weight, bias, slope)
    low = backend.autocast_dtype(input) if fused else None
    if low is not None:
        fused = act.low_precision
        input, weight = _cast(input, low), _cast(weight, low)
        bias, slope = bias if bias is None else _cast(bias, low), slope if slope is None else _cast(slope, low)
    if fused and act.valid(*values) and _linear_fits(input, weight, bias, slope):
        return autograd.linear_act(input, weight, bias, slope, act.name, list(values))
    z = F.linear(input, weight, bias)
    return act.reference(z, *values) if slope is None else act.reference(z, slope)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log softmax(input)[target], in one launch where Triton runs.

    input (N, C) logits, target (N,) int64 class indices -> () for 'mean' (over the rows whose target is not
    `ignore_index`) and 'sum', (N,) for 'none'. Fused for these shapes without weight and label_smoothing; torch's
    own operations take the rest. A class index outside [0, C) is an IndexError on a CPU; on a GPU nothing is read
    out of bounds and that row's loss and gradient are NaN.

    Raises torch.nn.functional.cross_entropy's errors. Source: torch.nn.functional.cross_entropy.
    """
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    plain = plain and type(ignore_index) is int and -(2**63) <= ignore_index < 2**63
    if plain and _on_triton(input, target) and _cross_entropy_fits(input, target, reduction):
        if input.device.type == "cpu":
            _check_classes(target, ignore_index, input.shape[1])
        elif backend.autocast_dtype(input) is not None:
            input = _cast(input, torch.float32)
        return autograd.cross_entropy(input, target, ignore_index, reduction)
    return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """(1 - target) input - log σ(input), in one launch where Triton runs.

    input and target of one shape and floating dtype -> () for 'mean' and 'sum', that shape for 'none'. Fused
    without weight and pos_weight, for a target that wants no gradient; torch's own operations take the rest.

    Raises torch.nn.functional.binary_cross_entropy_with_logits's errors, and is a drop-in for it.
    """
    plain = weight is None and pos_weight is None and size_average is None and reduce is None
    if plain and _on_triton(input, target) and not target.requires_grad:
        if backend.autocast_dtype(input) is not None:
            input, target = _cast(input, torch.float32), _cast(target, torch.float32)
        if _bce_fits(input, target, reduction):
            return autograd.bce_with_logits(input, target, reduction)
    return F.binary_cross_entropy_with_logits(input, target, weight, size_average, reduce, reduction, pos_weight)


def _on_triton(input: Tensor, *others: Tensor | None) -> bool:
    """All are plain strided tensors of one device on which Triton runs, and jit.trace is not recording."""
    if not isinstance(input, Tensor) or not backend.uses_triton(input) or torch.jit.is_tracing():
        return False
    return all(
        isinstance(t, Tensor) and t.device == input.device and t.layout == torch.strided and not backend.overrides(t)
        for t in (input, *others)
        if t is not None
    )


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: every floating tensor but float64."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def _linear_fits(x: Tensor, weight: Tensor, bias: Tensor | None, slope: Tensor | None) -> bool:
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return False
    if x.dtype not in backend.KERNEL_DTYPES:
        return False
    per_channel = x.dim() == 2 and slope is not None and slope.shape == weight.shape[:1]  # torch's channel is dim 1
    return (
        all(t is None or t.dtype == x.dtype for t in (weight, bias, slope))
        and (bias is None or bias.shape == weight.shape[:1])
        and (slope is None or (slope.numel() == 1 and slope.dim() <= 1) or per_channel)
    )


def _cross_entropy_fits(logits: Tensor, target: Tensor, reduction: str) -> bool:
    return (
        logits.dim() == 2
        and target.shape == logits.shape[:1]
        and logits.shape[1] > 0
        and target.dtype == torch.int64
        and logits.dtype in backend.KERNEL_DTYPES
        and reduction in _REDUCTIONS
    )


def _bce_fits(logits: Tensor, target: Tensor, reduction: str) -> bool:
    return (
        logits.shape == target.shape
        and logits.dtype == target.dtype
        and logits.dtype in backend.KERNEL_DTYPES
        and reduction in _REDUCTIONS
    )


def _check_classes(target: Tensor, ignore_index: int, classes: int) -> None:
    """torch's own IndexError; on a CPU looking at the labels costs no synchronisation."""
    if torch.compiler.is_compiling() or backend.transforming() or backend.dispatching((target,)):
        return
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise IndexError(f"Target {wrong[0].item()} is out of bounds.")


__all__ = sorted(
    {
        *(name for name in dir(F) if not name.startswith("_")),
        "binary_cross_entropy_with_logits",
        "cross_entropy",
        "linear",
    }
)


def __getattr__(name: str):
    if name.startswith("__") or not hasattr(F, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(F, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for name in dir(F) if not name.startswith("__"))})
