"""act(x), alone. Saves x by reference, or y where stock saves that; and whose device functions an activation runs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedact import backend
from fusedact.activations import Activation, Registered, by_name, difference, sample
from fusedact.autograd.doors import Op, differentiate


def value_function(activation: str, device: torch.device) -> Any:
    """f(z, *parameters) on loaded tiles: found by its name in the kernels, or the user's own, checked once a device."""
    from fusedact.kernels import activations

    entry = by_name(activation)
    return _own_pair(entry, device)[0] if isinstance(entry, Registered) else getattr(activations, activation)


def gradient_function(activation: str, device: torch.device, from_output: bool) -> Any:
    """f_grad(dy, saved, *parameters), where saved is y or z."""
    from fusedact.kernels import activations

    entry = by_name(activation)
    if isinstance(entry, Registered):
        return _own_pair(entry, device)[1]
    gradient = getattr(activations, f"{activation}_grad")
    return getattr(activations, f"{activation}_grad_from_output", gradient) if from_output else gradient


def _own_pair(entry: Registered, device: torch.device) -> tuple[Any, Any]:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _pair(entry)  # the check would synchronise
    return _checked_pair(entry, device)


@functools.cache
def _pair(entry: Registered) -> tuple[Any, Any]:
    pair = entry.device if isinstance(entry.device, tuple) else entry.device()
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"device of activation {entry.name!r} must return a pair of functions, got {pair!r}")
    return pair


@functools.cache
def _checked_pair(entry: Registered, device: torch.device) -> tuple[Any, Any]:
    """The user's pair, once it gives what the reference and the derivative give. RuntimeError where it does not."""
    from fusedact.kernels import elementwise

    value, gradient = _pair(entry)
    parameters = entry.parameters({})
    x, dy = sample(torch.float32, device)
    config = elementwise.tile(x.element_size())
    with torch.no_grad(), backend.on_device(x):
        y = elementwise.forward(x, value, parameters, None, config)
        dx, _ = elementwise.backward(dy, x, gradient, parameters, None, True, False, config)
        truths = entry.reference(x, *parameters), entry.derivative(dy, x, *parameters)
    for what, ours, truth in zip(("value", "gradient"), (y, dx), truths, strict=True):
        found = difference(x, ours, truth, 1e-4)
        if found:
            raise RuntimeError(f"{what} of activation {entry.name!r} on {device} is {found}, as in torch's operations")
    return value, gradient


class _Plan(NamedTuple):
    """What a launch needs and its tensors' shapes do not tell."""

    elementwise: Any
    value: Any
    gradient: Any


@functools.lru_cache(4096)
def _plan_of(entry: Activation, device: torch.device) -> _Plan:
    from fusedact.kernels import elementwise

    from_output = entry.derivative_from_output is not None
    gradient = gradient_function(entry.name, device, from_output)
    return _Plan(elementwise, value_function(entry.name, device), gradient)


class _Elementwise(Op):
    """An op that saves its input or its result, whichever stock saves, so that the other may be changed or freed."""

    def _save(self, ctx: Any, args: tuple, output: tuple[Tensor, ...]) -> None:
        x, slope, activation, _ = args
        ctx.options = args[self.tensors :]
        ctx.save_for_backward(x if by_name(activation).derivative_from_output is None else output[0], slope)

    def _gradients(
        self, ctx: Any, dys: tuple[Tensor | None, ...], backward: Callable[..., Any]
    ) -> tuple[Tensor | None, ...]:
        derivative, dy = by_name(ctx.options[0]).derivative_from_output, dys[0]
        if (
            derivative is None
            or dy is None
            or not (torch.is_grad_enabled() or backend.transforming() or backend.unreadable(dy))
        ):
            return super()._gradients(ctx, dys, backward)
        return derivative(dy, ctx.saved_tensors[0]), None, *(None for _ in ctx.options)


def _launch(
    x: Tensor, slope: Tensor | None, activation: str, parameters: list[float], save: bool
) -> tuple[Tensor, None]:
    plan = _plan_of(by_name(activation), x.device)
    config = plan.elementwise.tile(x.element_size())
    return plan.elementwise.forward(x, plan.value, tuple(parameters), slope, config), None


def _fake(x, slope, activation, parameters, save):
    return torch.empty_like(x), None


def _backward(
    dy: Tensor,
    saved: Tensor,
    slope: Tensor | None,
    activation: str,
    parameters: list[float],
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    plan = _plan_of(by_name(activation), saved.device)
    config = plan.elementwise.tile(saved.element_size())
    return plan.elementwise.backward(dy, saved, plan.gradient, tuple(parameters), slope, *wanted, config)


def _backward_fake(dy, saved, slope, activation, parameters, wanted):
    want_x, want_slope = wanted
    return torch.empty_like(saved) if want_x else None, slope.new_empty(slope.shape) if want_slope else None


def _backward_formula(dy, saved, slope, activation, parameters, wanted):
    derivative = by_name(activation).derivative_from_output
    if derivative is not None:
        return derivative(dy, saved), None
    return differentiate(lambda *xs: _composite(*xs, activation, parameters), (saved, slope), wanted, (dy,))


def _composite(x, slope, activation, parameters):
    return by_name(activation).reference(x, *(parameters if slope is None else (slope,)))


_OPTIONS = "str activation, float[] parameters"

activation = _Elementwise(
    name="activation",
    tensors=2,
    schema=f"(Tensor x, Tensor? slope, {_OPTIONS}, bool save) -> (Tensor, Tensor)",
    launch=_launch,
    fake=_fake,
    extras=lambda output, options: (),
    backward_schema=f"(Tensor dy, Tensor saved, Tensor? slope, {_OPTIONS}, bool[] wanted) -> (Tensor, Tensor)",
    backward=_backward,
    backward_fake=_backward_fake,
    backward_formula=_backward_formula,
    composite=_composite,
).register()
