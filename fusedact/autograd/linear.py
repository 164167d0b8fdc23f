"""act(x Wᵀ + b). Saves x, W and b by reference, and one of y (which the next layer holds anyway) and z."""

import torch.nn.functional as F
from torch import Tensor

from fusedact import backend
from fusedact.activations import ACTIVATIONS
from fusedact.autograd.doors import Op


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    activation: str,
    parameters: list[float],
    save: bool,
) -> tuple[Tensor, Tensor]:
    from fusedact.kernels import activations, linear

    M, K = linear.as_rows(x).shape
    config = linear.tile(M, len(weight), K, x.element_size(), backend.chip(x.device)[0])
    with backend.on_device(x):
        y, z = linear.forward(
            x,
            weight,
            bias,
            getattr(activations, activation),
            tuple(parameters),
            slope,
            backend.dot_precision(x.dtype),
            config,
            save and not ACTIVATIONS[activation].from_output(x.dtype, *parameters),
        )
    return y, y.new_empty(0) if z is None else z


def _fake(x, weight, bias, slope, activation, parameters, save):
    shape = (*x.shape[:-1], weight.shape[0])
    save_z = save and not ACTIVATIONS[activation].from_output(x.dtype, *parameters)
    return x.new_empty(shape), x.new_empty(shape if save_z else 0)


def _extras(output: tuple[Tensor, ...], options: tuple) -> tuple[Tensor, ...]:
    activation, parameters = options
    y, z = output
    return (y if ACTIVATIONS[activation].from_output(y.dtype, *parameters) else z,)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    saved: Tensor,
    activation: str,
    parameters: list[float],
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    from fusedact.kernels import activations, bias_activation, linear

    act_grad = getattr(activations, f"{activation}_grad")
    if ACTIVATIONS[activation].from_output(x.dtype, *parameters):
        act_grad = getattr(activations, f"{activation}_grad_from_output", act_grad)
    rows = linear.as_rows(x)
    M, N = len(rows), len(weight)
    precision = backend.dot_precision(x.dtype)

    def product(a: Tensor, b: Tensor) -> Tensor:
        (rows, depth), cols = a.shape, b.shape[1]
        config = linear.tile(rows, cols, depth, x.element_size(), backend.chip(x.device)[0])
        return linear.product(a, b, precision, config)

    want_x, want_weight, want_bias, want_slope = wanted
    with backend.on_device(x):
        dz, db, dslope = bias_activation.backward(
            dy.reshape(M, N),
            saved.reshape(M, N).contiguous(),  # a hook may have brought it back in another layout
            act_grad,
            tuple(parameters),
            slope,
            want_bias,
            want_slope,
            bias_activation.tile(M, N, saved.element_size()),
        )
        dx = product(dz, weight).view(x.shape) if want_x else None
        dw = product(dz.t(), rows) if want_weight else None
    return tuple(x.new_empty(0) if grad is None else grad for grad in (dx, dw, db, dslope))


def _backward_fake(dy, x, weight, bias, slope, saved, activation, parameters, wanted):
    likes = (x, weight, bias, slope)
    return tuple(x.new_empty(like.shape if want else 0) for like, want in zip(likes, wanted, strict=True))


def _composite(x, weight, bias, slope, activation, parameters):
    z = F.linear(x, weight, bias)
    return ACTIVATIONS[activation].reference(z, *(parameters if slope is None else (slope,)))


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
