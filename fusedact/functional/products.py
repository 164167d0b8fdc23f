"""Linear layers with their activation, alone and in a row."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedact import autograd, backend
from fusedact.activations import Activation
from fusedact.functional import sharded
from fusedact.functional.activations import activate_with
from fusedact.functional.checks import cast, on_triton, refuse_meta, resolved


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | nn.Module | None = None,
    slope: Tensor | None = None,
    out: Tensor | None = None,
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
        refuse_meta(input, weight)
        return F.linear(input, weight, bias) if out is None else F.linear(input, weight, bias, out=out)  # type: ignore[call-arg]
    if out is not None:
        raise TypeError("linear() takes out= only without activation=")
    found = resolved("linear", activation, slope, parameters)
    if isinstance(found, nn.Module):
        refuse_meta(input, weight)
        return found(F.linear(input, weight, bias))
    return _linear_act(input, weight, bias, *found)


Layer = tuple[Tensor, Tensor | None, str | nn.Module | None]  # weight, bias, activation
Resolved = tuple[Activation, tuple[float, ...], Tensor | None]  # with its parameters and slope


def linear_chain(input: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Linear layers in a row, each a weight, a bias or None, and an activation or None, as `linear` takes them.

    input (*, K), weights (N, K), biases (N,) -> (*, N of the last). In training where Triton runs, the derivative of
    each activation is taken inside the product that makes its gradient, and beside the input each activated layer
    keeps one tensor of its output's size.

    Raises what `linear` raises.
    """
    first = 0  # of those that a gradient goes through: nothing of a frozen one before it need be kept
    if torch.is_grad_enabled():
        while first < len(layers) and not any(_wants_gradient(part) for part in (input, *layers[first])):
            first += 1
        chained = _chained(input, layers) if not first and len(layers) > 1 else None
        if chained is not None:
            return autograd.linear_chain(*chained)
    found = _fitting(input, layers)
    if found is None:
        return functools.reduce(_stock_layer, layers, input)
    for at, (layer, known) in enumerate(zip(layers, found, strict=False)):
        chained = _chained(input, layers[at:]) if 0 < at == first < len(layers) - 1 else None
        if chained is not None:
            return autograd.linear_chain(*chained)
        input = _fitting_layer(input, layer, known)
    return functools.reduce(_layer, layers[len(found) :], input)


def _layer(input: Tensor, layer: Layer) -> Tensor:
    weight, bias, activation = layer
    return linear(input, weight, bias, activation=activation)


def _stock_layer(input: Tensor, layer: Layer) -> Tensor:
    weight, bias, activation = layer
    found = None if activation is None else resolved("linear", activation, None, {})
    if found is None or isinstance(found, nn.Module):
        return linear(input, weight, bias, activation=activation)
    return _stock_act(input, weight, bias, *found)


def _fitting_layer(input: Tensor, layer: Layer, found: Resolved | None) -> Tensor:
    weight, bias, _ = layer
    if found is None:
        return F.linear(input, weight, bias)
    act, values, slope = found
    if autograd.prefers_stock(input, weight):
        return _stock_act(input, weight, bias, act, values, slope)
    return autograd.linear_act(input, weight, bias, slope, act.name, values)


def _fitting(x: Tensor, layers: Sequence[Layer]) -> list[Resolved | None] | None:
    """The activations, up to a layer of which that cannot be known; None where one is not for the kernels.

    Then all are torch's, which raises its own error with nothing launched. Nothing is known where no kernel runs, and
    under autocast, which casts layer by layer.
    """
    found: list[Resolved | None] = []
    if len(layers) < 2 or not on_triton(x) or backend.autocast_dtype(x) is not None:
        return found
    features = _features(x)
    for weight, bias, activation in layers:
        act = None if activation is None else resolved("linear", activation, None, {})
        ours = None if isinstance(act, nn.Module) else act
        slope = ours[2] if ours else None
        if weight is None or not on_triton(x, weight, bias, slope) or (ours and not _fuses(ours, None)):
            return None
        if not _linear_fits(x, features, weight, bias, slope):
            return None
        if isinstance(act, nn.Module):
            return found
        found.append(ours)
        features = len(weight)
    return found


def _wants_gradient(part: Tensor | nn.Module | str | None) -> bool:
    parts = part.parameters() if isinstance(part, nn.Module) else (part,)
    return any(isinstance(t, Tensor) and t.requires_grad for t in parts)


def _chained(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, tuple, list[Tensor | None]] | None:
    """What the op takes, cast as autocast asks; None where each layer is to find its own way. The last may be bare."""
    found: list[Any] = [None if act is None else resolved("linear", act, None, {}) for _, _, act in layers]
    if any(f is None for f in found[:-1]) or any(isinstance(f, nn.Module) for f in found):
        return None
    tensors: list[Any] = [t for (w, b, _), f in zip(layers, found, strict=True) for t in (w, b, f[2] if f else None)]
    if not on_triton(x, *tensors):
        return None
    low = backend.autocast_dtype(x)
    if low is not None:
        x, tensors = cast(x, low), [t if t is None else cast(t, low) for t in tensors]
    if not autograd.can_be_chained(x, tensors):
        return None
    features = _features(x)
    for at, activation in enumerate(found):
        weight, bias, slope = tensors[3 * at : 3 * at + 3]
        if not _linear_fits(x, features, weight, bias, slope) or (activation and not _fuses(activation, low)):
            return None
        if autograd.prefers_stock(x, weight):
            return None
        features = len(weight)
    return x, tuple(None if f is None else (f[0].name, f[1]) for f in found), tensors


def _fuses(found: Resolved, low: torch.dtype | None) -> bool:
    act, values, _ = found
    return (low is None or act.low_precision) and (not values or act.valid(*values))


def _linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: Activation,
    values: tuple[float, ...],
    slope: Tensor | None,
) -> Tensor:
    fused = weight is not None and on_triton(input, weight, bias, slope)
    low = backend.autocast_dtype(input) if fused else None
    if low is not None:
        fused = act.low_precision
        input, weight = cast(input, low), cast(weight, low)
        bias, slope = bias if bias is None else cast(bias, low), slope if slope is None else cast(slope, low)
    fused = fused and (not values or act.valid(*values))
    if (
        fused
        and _linear_fits(input, _features(input), weight, bias, slope)
        and not autograd.prefers_stock(input, weight)
    ):
        return autograd.linear_act(input, weight, bias, slope, act.name, values)
    if backend.is_sharded(input) and weight is not None:
        y = _sharded(input, weight, bias, act, values, slope)
        if y is not NotImplemented:
            return y
    return _stock_act(input, weight, bias, act, values, slope)


def _sharded(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: Activation,
    values: tuple[float, ...],
    slope: Tensor | None,
) -> Tensor:
    if sharded.is_row_parallel(input, weight):
        return activate_with(act, F.linear(input, *sharded.with_whole_gradients(weight, bias)), values, slope)
    return sharded.linear(lambda x, w, b, a: _linear_act(x, w, b, act, values, a), input, weight, bias, slope)


def _stock_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: Activation,
    values: tuple[float, ...],
    slope: Tensor | None,
) -> Tensor:
    refuse_meta(input, weight)
    z = F.linear(input, weight, bias)
    return act.reference(z, *values) if slope is None else act.reference(z, slope)


def _features(x: Tensor) -> int:
    return x.shape[-1] if x.dim() else -1


def _linear_fits(x: Tensor, features: int, weight: Tensor, bias: Tensor | None, slope: Tensor | None) -> bool:
    """What the kernel asks of a layer that is given so many features, with the other dimensions and the dtype of x."""
    dtype = x.dtype
    if weight.dtype is not dtype or dtype not in backend.KERNEL_DTYPES or weight.dim() != 2:
        return False
    channels, wanted = weight.shape
    if features != wanted:
        return False
    if bias is not None and (bias.dtype is not dtype or bias.shape != (channels,)):
        return False
    if slope is None:
        return True
    per_channel = x.dim() == 2 and slope.shape == weight.shape[:1]  # torch's channel is dim 1
    return slope.dtype is dtype and (per_channel or (slope.numel() == 1 and slope.dim() <= 1))
