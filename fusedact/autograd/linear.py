"""act(x Wᵀ + b). Saves x, W and b by reference, and one of y (which the next layer holds anyway) and z."""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import backend, tuning
from fusedact.activations import Activation, by_name
from fusedact.autograd.activation import gradient_function, value_function
from fusedact.autograd.doors import Op
from fusedact.tuning import LEAST_ALIGNED, choose

TILED = 256  # rows and columns of no tile are more


class Plan(NamedTuple):
    """What a call needs and its shapes do not tell."""

    linear: Any
    chain: Any
    bias_activation: Any
    value: Any
    gradient: Any
    from_output: bool


def plan_of(activation: str, parameters: Sequence[float], x: Tensor) -> Plan:
    return _plan(by_name(activation), tuple(parameters), x.dtype, x.device)


@lru_cache(4096)
def _plan(entry: Activation, parameters: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Plan:
    from fusedact.kernels import bias_activation, chain, linear

    from_output = entry.from_output(dtype, *parameters)
    value, gradient = value_function(entry.name, device), gradient_function(entry.name, device, from_output)
    return Plan(linear, chain, bias_activation, value, gradient, from_output)


@cache
def _kernels() -> Any:
    from fusedact.kernels import linear

    return linear


def tile_for(task: str, a: Tensor, b: Tensor, library: bool = True) -> Any:
    """What takes the product of a (M, K) and bᵀ, b (N, K), for such a task; the library only where that may be."""
    (M, K), N, dtype = a.shape, b.shape[0], a.dtype
    aligned = M * N * K >= LEAST_ALIGNED and _kernels().is_aligned(a) and _kernels().is_aligned(b)
    if M > TILED:  # up to whole tiles, so that sizes which change from step to step are not all looked at
        M = -(-M // TILED) * TILED
    if K > TILED:
        K = -(-K // TILED) * TILED
    library = library and backend.get_backend() == "auto"  # kernels asked for by name are all our own
    chip = backend.chip(a.device, library)
    return choose(task, M, N, K, dtype, backend.dot_precision(dtype), aligned, chip)


def in_rows(x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """x (*, K) as rows (M, K), and the shape (*, N) of what comes of them, None where that is (M, N)."""
    if x.dim() == 2:
        return x, None
    return _kernels().as_rows(x), (*x.shape[:-1], len(weight))


def prefers_stock(x: Tensor, weight: Tensor) -> bool:
    """Whether stock was measured to be faster at a layer of this weight, for as many rows as x; never if forced."""
    if backend.get_backend() != "auto":
        return False
    (N, K), dtype, rows = weight.shape, x.dtype, x.shape[:-1].numel()
    return tuning.prefers_stock("op", rows, N, K, dtype, backend.dot_precision(dtype), False, backend.chip(x.device))


def bare(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b without an activation, by what is fastest."""
    rows, shape = in_rows(x, weight)
    return _kernels().bare(rows, weight, bias, tile_for("dx", rows, weight), shape)


def product(task: str, a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) b (K, N) for dx or dw, by what is fastest."""
    return _kernels().product(a, b, tile_for(task, a, b.t()))


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    activation: str,
    parameters: Sequence[float],
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    plan = plan_of(activation, parameters, x)
    rows, shape = in_rows(x, weight)
    tile, save_z = tile_for("forward", rows, weight), save and not plan.from_output
    return plan.linear.forward(rows, weight, bias, plan.value, parameters, slope, tile, save_z, shape)


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
    plan = plan_of(activation, parameters, x)
    rows = x if x.dim() == 2 else plan.linear.as_rows(x)
    M, N = rows.shape[0], weight.shape[0]
    if dy.dim() != 2:
        dy, saved = dy.reshape(M, N), saved.reshape(M, N)
    want_x, want_weight, want_bias, want_slope = wanted
    dz, db, dslope = plan.bias_activation.backward(
        dy,
        saved.contiguous(),  # a hook may have brought it back in another layout
        plan.gradient,
        tuple(parameters),
        slope,
        want_bias,
        want_slope,
        plan.bias_activation.tile(M, N, x.element_size()),
    )
    dx = dw = None
    if want_x:
        dx = product("dx", dz, weight)
        dx = dx if x.dim() == 2 else dx.view(x.shape)
    if want_weight:
        dw = product("dw", dz.t(), rows)
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
