"""The linear layer with its activation."""

import torch.nn.functional as F
from torch import Tensor, nn

from fusedact import autograd, backend
from fusedact.activations import Activation, by_name, of_module
from fusedact.functional.checks import cast, on_triton


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
        return F.linear(input, weight, bias) if out is None else F.linear(input, weight, bias, out=out)  # type: ignore[call-arg]
    if out is not None:
        raise TypeError("linear() takes out= only without activation=")
    if isinstance(activation, nn.Module):
        if parameters or slope is not None:
            raise TypeError("linear() takes an activation's parameters from its module, or by keyword with its name")
        found = of_module(activation)
        if found is None:
            return activation(F.linear(input, weight, bias))
        act, values, slope = found
    else:
        act = by_name(activation)
        values = act.parameters(parameters) if parameters else act.default_values
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
    fused = on_triton(input, weight, bias, slope)
    low = backend.autocast_dtype(input) if fused else None
    if low is not None:
        fused = act.low_precision
        input, weight = cast(input, low), cast(weight, low)
        bias, slope = bias if bias is None else cast(bias, low), slope if slope is None else cast(slope, low)
    if fused and (not values or act.valid(*values)) and _linear_fits(input, weight, bias, slope):
        return autograd.linear_act(input, weight, bias, slope, act.name, values)
    z = F.linear(input, weight, bias)
    return act.reference(z, *values) if slope is None else act.reference(z, slope)


def _linear_fits(x: Tensor, weight: Tensor, bias: Tensor | None, slope: Tensor | None) -> bool:
    dtype = x.dtype
    if weight.dtype is not dtype or dtype not in backend.KERNEL_DTYPES or weight.dim() != 2 or x.dim() == 0:
        return False
    channels, features = weight.shape
    if x.shape[-1] != features:
        return False
    if bias is not None and (bias.dtype is not dtype or bias.shape != (channels,)):
        return False
    if slope is None:
        return True
    per_channel = x.dim() == 2 and slope.shape == weight.shape[:1]  # torch's channel is dim 1
    return slope.dtype is dtype and (per_channel or (slope.numel() == 1 and slope.dim() <= 1))
