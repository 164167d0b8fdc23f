"""Convolutions along one to three dimensions, and their transposes, with their activation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fusedact import autograd, backend
from fusedact.activations import Activation
from fusedact.functional import sharded
from fusedact.functional.checks import cast, on_triton, refuse_meta, resolved

Numbers = int | Sequence[int]  # one for all dimensions, or one for each


class _Kind(NamedTuple):
    """torch's function, along how many dimensions it goes, and which way."""

    stock: Callable[..., Tensor]
    dims: int
    transposed: bool

    @property
    def name(self) -> str:
        return f"conv{'_transpose' * self.transposed}{self.dims}d"


_CONV = {dims: _Kind(stock, dims, False) for dims, stock in enumerate((F.conv1d, F.conv2d, F.conv3d), 1)}
_CONV_TRANSPOSE = {
    dims: _Kind(stock, dims, True)
    for dims, stock in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1)
}


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    activation: str | nn.Module | None = None,
    slope: Tensor | None = None,
    **parameters: float,
) -> Tensor:
    """activation(input * weight + bias), as in `conv2d`.

    input (N, C_in, L), weight (C_out, C_in / groups, k), bias (C_out,) -> (N, C_out, L_out).
    Source: torch.nn.functional.conv1d.
    """
    options = stride, padding, dilation, groups
    return _convolution(_CONV[1], input, weight, bias, options, activation, slope, parameters)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    activation: str | nn.Module | None = None,
    slope: Tensor | None = None,
    **parameters: float,
) -> Tensor:
    """activation(input * weight + bias): torch's convolution, then bias and activation in one launch, in its memory.

    input (N, C_in, H, W), weight (C_out, C_in / groups, kH, kW), bias (C_out,) -> (N, C_out, H_out, W_out), of one
    floating dtype. `activation` and its parameters as in `linear`.

    Raises ValueError for an unknown name, TypeError for a parameter that the activation does not have, and
    torch.nn.functional.conv2d's errors. Source: torch.nn.functional.conv2d.
    """
    options = stride, padding, dilation, groups
    return _convolution(_CONV[2], input, weight, bias, options, activation, slope, parameters)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    activation: str | nn.Module | None = None,
    slope: Tensor | None = None,
    **parameters: float,
) -> Tensor:
    """activation(input * weight + bias), as in `conv2d`.

    input (N, C_in, D, H, W), weight (C_out, C_in / groups, kD, kH, kW), bias (C_out,) -> (N, C_out, D_out, H_out,
    W_out). Source: torch.nn.functional.conv3d.
    """
    options = stride, padding, dilation, groups
    return _convolution(_CONV[3], input, weight, bias, options, activation, slope, parameters)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    activation: str | nn.Module | None = None,
    slope: Tensor | None = None,
    **parameters: float,
) -> Tensor:
    """activation(the transposed convolution of input and weight, + bias), as in `conv2d`.

    input (N, C_in, L), weight (C_in, C_out / groups, k), bias (C_out,) -> (N, C_out, L_out).
    Source: torch.nn.functional.conv_transpose1d.
    """
    options = stride, padding, output_padding, groups, dilation
    return _convolution(_CONV_TRANSPOSE[1], input, weight, bias, options, activation, slope, parameters)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    activation: str | nn.Module | None = None,
    slope: Tensor | None = None,
    **parameters: float,
) -> Tensor:
    """activation(the transposed convolution of input and weight, + bias), as in `conv2d`.

    input (N, C_in, H, W), weight (C_in, C_out / groups, kH, kW), bias (C_out,) -> (N, C_out, H_out, W_out).
    Source: torch.nn.functional.conv_transpose2d.
    """
    options = stride, padding, output_padding, groups, dilation
    return _convolution(_CONV_TRANSPOSE[2], input, weight, bias, options, activation, slope, parameters)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    activation: str | nn.Module | None = None,
    slope: Tensor | None = None,
    **parameters: float,
) -> Tensor:
    """activation(the transposed convolution of input and weight, + bias), as in `conv2d`.

    input (N, C_in, D, H, W), weight (C_in, C_out / groups, kD, kH, kW), bias (C_out,) -> (N, C_out, D_out, H_out,
    W_out). Source: torch.nn.functional.conv_transpose3d.
    """
    options = stride, padding, output_padding, groups, dilation
    return _convolution(_CONV_TRANSPOSE[3], input, weight, bias, options, activation, slope, parameters)


def _convolution(
    kind: _Kind,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
    activation: str | nn.Module | None,
    slope: Tensor | None,
    parameters: dict[str, float],
) -> Tensor:
    """`options` are what follows the bias, in the order of torch's function."""
    if activation is None:
        if parameters or slope is not None:
            raise TypeError(f"{kind.name}() takes an activation's parameters only together with activation=")
        refuse_meta(input, weight, bias)
        return kind.stock(input, weight, bias, *options)
    found = resolved(kind.name, activation, slope, parameters)
    if isinstance(found, nn.Module):
        refuse_meta(input, weight, bias)
        return found(kind.stock(input, weight, bias, *options))
    return _convolution_act(kind, input, weight, bias, options, *found)


def _convolution_act(
    kind: _Kind,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
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
    if fused and (not values or act.valid(*values)):
        geometry = _geometry(kind, weight, options)
        if geometry is not None and _fits(kind, input, weight, bias, slope, geometry.groups):
            return autograd.convolution_act(input, weight, bias, slope, *geometry, act.name, values)
    if weight is not None and backend.is_sharded(input):
        y = _sharded(kind, (input, weight, bias, slope), options, act, values)
        if y is not NotImplemented:
            return y
    refuse_meta(input, weight, bias)
    z = kind.stock(input, weight, bias, *options)
    return act.reference(z, *values) if slope is None else act.reference(z, slope)


def _sharded(
    kind: _Kind,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    options: tuple[Any, ...],
    act: Activation,
    values: tuple[float, ...],
) -> Tensor:
    def run(x: Tensor, w: Tensor, b: Tensor | None, a: Tensor | None) -> Tensor:
        return _convolution_act(kind, x, w, b, options, act, values, a)

    groups = options[3]  # of either kind
    return sharded.convolution(run, tensors, kind.dims, kind.transposed, groups)


class _Geometry(NamedTuple):
    """A number for each dimension, in the order of torch.convolution."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def _geometry(kind: _Kind, weight: Tensor, options: tuple[Any, ...]) -> _Geometry | None:
    """None where the two sides are padded differently, and where torch is to say what is wrong."""
    output_padding: Numbers = 0
    if kind.transposed:
        stride, padding, output_padding, groups, dilation = options
    else:
        stride, padding, dilation, groups = options
    steps, gaps, ends = _each(stride, kind), _each(dilation, kind), _each(output_padding, kind)
    if isinstance(padding, str) and not kind.transposed:
        border = _border(padding, steps, gaps, weight.shape[2:])
    else:
        border = _each(padding, kind)
    if not (steps and border and gaps and ends and isinstance(groups, int)):
        return None
    return _Geometry(steps, border, gaps, kind.transposed, ends, groups)


def _each(numbers: Numbers, kind: _Kind) -> list[int]:
    """A number for each dimension; none where there are others."""
    if isinstance(numbers, int):
        return [numbers] * kind.dims
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or len(numbers) != kind.dims:
        return []
    return list(numbers)


def _border(padding: str, steps: list[int], gaps: list[int], kernel: Sequence[int]) -> list[int]:
    """What both sides get by the name; none where they get different numbers."""
    if padding == "valid":
        return [0] * len(steps)
    reach = [gap * (size - 1) for gap, size in zip(gaps, kernel, strict=False)]
    if padding != "same" or any(step != 1 for step in steps) or any(n % 2 for n in reach):
        return []
    return [n // 2 for n in reach]


def _fits(kind: _Kind, x: Tensor, weight: Tensor, bias: Tensor | None, slope: Tensor | None, groups: int) -> bool:
    """A batch, and what the kernel reads of each channel; the rest is for torch's convolution to check."""
    dtype, dim = x.dtype, kind.dims + 2
    if weight.dtype is not dtype or dtype not in backend.KERNEL_DTYPES or x.dim() != dim or weight.dim() != dim:
        return False
    channels = (weight.shape[1] * groups if kind.transposed else weight.shape[0],)
    if bias is not None and (bias.dtype is not dtype or bias.shape != channels):
        return False
    if slope is None:
        return True
    return slope.dtype is dtype and slope.dim() <= 1 and (slope.numel() == 1 or slope.shape == channels)
