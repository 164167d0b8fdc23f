"""act(x Wᵀ + b). Saves x, W and b by reference, and one of y (which the next layer holds anyway) and z."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import backend
from fusedact.activations import Activation, by_name
from fusedact.autograd.activation import gradient_function, value_function
from fusedact.autograd.doors import Op


class _Plan(NamedTuple):
    """What a call needs and its shapes do not tell."""

    linear: Any
    bias_activation: Any
    value: Any
    gradient: Any
    from_output: bool
    shared_memory: int


def _plan(activation: str, parameters: Sequence[float], x: Tensor) -> _Plan:
    return _plan_of(by_name(activation), tuple(parameters), x.dtype, x.device)


@lru_cache(4096)
def _plan_of(entry: Activation, parameters: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> _Plan:
    from fusedact.kernels import bias_activation, linear

    from_output = entry.from_output(dtype, *parameters)
    return _Plan(
        linear,
        bias_activation,
        value_function(entry.name, device),
        gradient_function(entry.name, device, from_output),
        from_output,
        backend.chip(device)[0],
    )


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    activation: str,
    parameters: Sequence[float],
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    dtype = x.dtype
    plan = _plan_of(by_name(activation), tuple(parameters), dtype, x.device)
    N, K = weight.shape
    config = plan.linear.tile(x.numel() // K if K else 1, N, K, dtype.itemsize, plan.shared_memory)
    precision = backend.dot_precision(dtype)
    save_z = save and not plan.from_output
    return plan.linear.forward(x, weight, bias, plan.value, parameters, slope, precision, config, save_z)


def _saves_z(activation: str, parameters: Sequence[float], dtype: torch.dtype) -> bool:
    return not by_name(activation).from_output(dtype, *parameters)


def _fake(x, weight, bias, slope, activation, parameters, save):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty(y.shape) if save and _saves_z(activation, parameters, x.dtype) else None


def _extras(output: tuple[Tensor, ...], options: tuple) -> tuple[Tensor, ...]:
    activation, parameters = options
    y, z = output
    return (z if _saves_z(activation, parameters, y.dtype) else y,)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    saved: Tensor,
    activation: str,
    parameters: Sequence[float],
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    plan = _plan(activation, parameters, x)
    linear, bias_activation = plan.linear, plan.bias_activation
    precision = backend.dot_precision(x.dtype)
    itemsize = x.element_size()
    N, K = weight.shape
    rows = x if x.dim() == 2 else linear.as_rows(x)
    M = rows.shape[0]
    if dy.dim() != 2:
        dy, saved = dy.reshape(M, N), saved.reshape(M, N)
    want_x, want_weight, want_bias, want_slope = wanted
    dz, db, dslope = bias_activation.backward(
        dy,
        saved.contiguous(),  # a hook may have brought it back in another layout
        plan.gradient,
        tuple(parameters),
        slope,
        want_bias,
        want_slope,
        bias_activation.tile(M, N, itemsize),
    )
    dx = dw = None
    if want_x:
        dx = linear.product(dz, weight, precision, linear.tile(M, K, N, itemsize, plan.shared_memory))
        dx = dx if x.dim() == 2 else dx.view(x.shape)
    if want_weight:
        dw = linear.product(dz.t(), rows, precision, linear.tile(N, K, M, itemsize, plan.shared_memory))
    return dx, dw, db, dslope


def _backward_fake(dy, x, weight, bias, slope, saved, activation, parameters, wanted):
    likes = (x, weight, bias, slope)
    return tuple(x.new_empty(like.shape) if want else None for like, want in zip(likes, wanted, strict=True))


def _composite(x, weight, bias, slope, activation, parameters):
    z = F.linear(x, weight, bias)
    return by_name(activation).reference(z, *(parameters if slope is None else (slope,)))


_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor? slope"
_OPTIONS = "str activation, float[] parameters"

linear_act = Op(
    name="linear_act",
    tensors=4,
    schema=f"({_TENSORS}, {_OPTIONS}, bool save) -> (Tensor, Tensor)",
    launch=_launch,
    fake=_fake,
    extras=_extras,
    backward_schema=f"(Tensor dy, {_TENSORS}, Tensor saved, {_OPTIONS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    backward=_backward,
    backward_fake=_backward_fake,
    composite=_composite,
).register()
