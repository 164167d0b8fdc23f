"""act(x * W + b) along one to three dimensions, or by the transposed convolution.

Saves x, W and b by reference, and one of y and the product, to which backward adds b. The products are torch's, forward
and backward; its product's memory becomes y's where only y is saved.

Between the tensors and the activation an op's arguments are the geometry, as torch.convolution takes it: stride,
padding, dilation, transposed, output_padding, groups.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedact.activations import Activation, by_name
from fusedact.autograd.activation import gradient_function, value_function
from fusedact.autograd.doors import Op


class _Plan(NamedTuple):
    """What a launch needs and its tensors' shapes do not tell."""

    bias_activation: Any
    config: Any
    value: Any
    gradient: Any
    from_output: bool


def _plan(activation: str, parameters: Sequence[float], x: Tensor) -> _Plan:
    return _plan_of(by_name(activation), tuple(parameters), x.dtype, x.device)


@lru_cache(4096)
def _plan_of(entry: Activation, parameters: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> _Plan:
    from fusedact.kernels import bias_activation, elementwise

    from_output = entry.from_output(dtype, *parameters)
    return _Plan(
        bias_activation,
        elementwise.tile(dtype.itemsize),
        value_function(entry.name, device),
        gradient_function(entry.name, device, from_output),
        from_output,
    )


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, slope: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor | None]:
    *geometry, activation, parameters, save = options
    plan = _plan(activation, parameters, x)
    product = torch.convolution(x, weight, None, *geometry)
    kept = product if save and not plan.from_output else None
    y = plan.bias_activation.forward_channels(
        product, bias, plan.value, parameters, slope, plan.config, in_place=kept is None
    )
    return y, kept


def _fake(x, weight, bias, slope, *options):
    *geometry, activation, parameters, save = options
    y = torch.convolution(x, weight, None, *geometry)
    kept = save and not by_name(activation).from_output(x.dtype, *parameters)
    return y, torch.empty_like(y) if kept else None


def _extras(output: tuple[Tensor, ...], options: tuple) -> tuple[Tensor, ...]:
    *_, activation, parameters = options
    y, product = output
    return (y if by_name(activation).from_output(y.dtype, *parameters) else product,)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    saved: Tensor,
    *options: Any,
) -> tuple[Tensor | None, ...]:
    *geometry, activation, parameters, wanted = options
    plan = _plan(activation, parameters, x)
    want_x, want_weight, want_bias, want_slope = wanted
    dz, db, dslope = plan.bias_activation.backward_channels(
        dy,
        saved,
        bias,
        plan.gradient,
        tuple(parameters),
        slope,
        plan.from_output,
        (want_x or want_weight, want_bias, want_slope),
        plan.config,
    )
    return *_product_gradients(dz, x, weight, geometry, want_x, want_weight), db, dslope


def _product_gradients(
    dz: Tensor | None, x: Tensor, weight: Tensor, geometry: list[Any], want_x: bool, want_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    if dz is None:
        return None, None
    dx, dw, _ = torch.ops.aten.convolution_backward(dz, x, weight, None, *geometry, [want_x, want_weight, False])
    return dx, dw


def _backward_fake(dy, x, weight, bias, slope, saved, *options):
    *geometry, _, _, (want_x, want_weight, want_bias, want_slope) = options
    dz = torch.empty_like(saved) if want_x or want_weight else None
    return (
        *_product_gradients(dz, x, weight, geometry, want_x, want_weight),
        bias.new_empty(bias.shape) if want_bias else None,
        slope.new_empty(slope.shape) if want_slope else None,
    )


def _composite(x, weight, bias, slope, *options):
    *geometry, activation, parameters = options
    z = torch.convolution(x, weight, bias, *geometry)
    return by_name(activation).reference(z, *(parameters if slope is None else (slope,)))


_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor? slope"
_GEOMETRY = (
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups"
)
_OPTIONS = f"{_GEOMETRY}, str activation, float[] parameters"

convolution_act = Op(
    name="convolution_act",
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
