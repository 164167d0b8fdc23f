"""act(gate) * up. Saves the two by reference, and takes the derivative from gate."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedact.activations import Activation, by_name
from fusedact.autograd.activation import gradient_function, value_function
from fusedact.autograd.doors import Op


class _Plan(NamedTuple):
    """What a launch needs and its tensors' shapes do not tell."""

    kernels: Any
    value: Any
    gradient: Any
    config: Any


@lru_cache(4096)
def _plan_of(entry: Activation, device: torch.device, itemsize: int) -> _Plan:
    from fusedact.kernels import elementwise, gated

    value = value_function(entry.name, device)
    gradient = gradient_function(entry.name, device, from_output=False)
    return _Plan(gated, value, gradient, elementwise.tile(itemsize))


def _launch(gate: Tensor, up: Tensor, activation: str, parameters: list[float], save: bool) -> tuple[Tensor, None]:
    plan = _plan_of(by_name(activation), gate.device, gate.element_size())
    return plan.kernels.forward(gate, up, plan.value, tuple(parameters), plan.config), None


def _fake(gate, up, activation, parameters, save):
    return torch.empty_like(gate), None


def _backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, parameters: list[float], wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    plan = _plan_of(by_name(activation), gate.device, gate.element_size())
    functions = plan.value, plan.gradient, tuple(parameters)
    return plan.kernels.backward(dy, gate, up, *functions, *wanted, plan.config)


def _backward_fake(dy, gate, up, activation, parameters, wanted):
    return tuple(torch.empty_like(gate) if want else None for want in wanted)


def _composite(gate, up, activation, parameters):
    return by_name(activation).reference(gate, *parameters) * up


_ARGUMENTS = "Tensor gate, Tensor up, str activation, float[] parameters"

gated = Op(
    name="gated",
    tensors=2,
    schema=f"({_ARGUMENTS}, bool save) -> (Tensor, Tensor)",
    launch=_launch,
    fake=_fake,
    extras=lambda output, options: (),
    backward_schema=f"(Tensor dy, {_ARGUMENTS}, bool[] wanted) -> (Tensor, Tensor)",
    backward=_backward,
    backward_fake=_backward_fake,
    composite=_composite,
).register()
