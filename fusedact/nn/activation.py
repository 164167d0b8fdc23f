"""The activations as modules, torch.nn's with another `forward`, and Step.

What runs when is functional's to say; see there. A module holds torch's attributes, in torch's state_dict and repr.
"""

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor

from fusedact import activations, functional
from fusedact.activations import by_name, lines_of
from fusedact.backend import get_backend

_Class = TypeVar("_Class", bound=type[torch.nn.Module])


def _fused(cls: _Class) -> _Class:
    """The class with torch's documentation and, where kernels may run, functional's function of its attributes."""
    stock: Any = cls.__bases__[0]
    lines = lines_of(stock)
    act = next(iter(lines.values()))
    alone, stock_forward = act.fused_alone, stock.forward
    function = getattr(functional, act.name)
    names = list(inspect.signature(function).parameters)[1:]

    def forward(self: torch.nn.Module, input: Tensor) -> Tensor:
        if get_backend() != "triton" and not (alone and isinstance(input, Tensor) and input.is_cuda):
            return stock_forward(self, input)
        return through_functional(self, input)

    def through_functional(self: torch.nn.Module, input: Tensor) -> Tensor:
        return function(input, **{name: getattr(self, name) for name in names})

    forward.__qualname__, forward.__doc__ = f"{cls.__qualname__}.forward", stock_forward.__doc__
    cls.__doc__ = stock.__doc__
    cls.forward = forward  # type: ignore[assignment]
    cls._lines = lines  # type: ignore[attr-defined]
    return cls


@_fused
class Threshold(torch.nn.Threshold): ...


@_fused
class ReLU(torch.nn.ReLU): ...


@_fused
class ReLU6(torch.nn.ReLU6): ...


@_fused
class Sigmoid(torch.nn.Sigmoid): ...


@_fused
class Hardsigmoid(torch.nn.Hardsigmoid): ...


@_fused
class Tanh(torch.nn.Tanh): ...


@_fused
class SiLU(torch.nn.SiLU): ...


@_fused
class Mish(torch.nn.Mish): ...


@_fused
class Hardswish(torch.nn.Hardswish): ...


@_fused
class ELU(torch.nn.ELU): ...


@_fused
class CELU(torch.nn.CELU): ...


@_fused
class SELU(torch.nn.SELU): ...


@_fused
class GELU(torch.nn.GELU): ...


@_fused
class Hardshrink(torch.nn.Hardshrink): ...


@_fused
class LeakyReLU(torch.nn.LeakyReLU): ...


@_fused
class LogSigmoid(torch.nn.LogSigmoid): ...


@_fused
class Softplus(torch.nn.Softplus): ...


@_fused
class Softshrink(torch.nn.Softshrink): ...


@_fused
class PReLU(torch.nn.PReLU): ...


@_fused
class Softsign(torch.nn.Softsign): ...


@_fused
class Tanhshrink(torch.nn.Tanhshrink): ...


@_fused
class Hardtanh(torch.nn.Hardtanh): ...


class Step(torch.nn.Module):
    """1 where the input is at least 0, 0 where it is below, NaN where it is NaN: the perceptron's activation.

    Its gradient is 0 everywhere, so nothing before it learns by gradient descent. Shapes: (*) -> (*).
    """

    _lines = lines_of(activations.step)

    def forward(self, input: Tensor) -> Tensor:
        return functional.step(input)


def of_layer(activation: str | torch.nn.Module | None, device: Any, dtype: Any) -> str | torch.nn.Module | None:
    """What a layer keeps as its `activation=`: torch's module for a name, where torch has one.

    Raises ValueError for an unknown name and TypeError for what is neither a name nor a module.
    """
    if not isinstance(activation, str | torch.nn.Module | None):
        raise TypeError(f"activation must be a name, a module or None, got {activation!r}")
    named = by_name(activation) if isinstance(activation, str) else None
    return named.build(device, dtype) if named and named.module else activation
