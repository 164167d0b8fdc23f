"""Sequential, as torch.nn.Sequential, with each Linear or convolution and the activation after it as one op."""

from typing import Any

import torch

from fusedact import backend, functional
from fusedact.activations import of_module
from fusedact.functional.products import Layer
from fusedact.nn.convolution import CONVOLUTIONS, convolved
from fusedact.nn.hooks import is_plain
from fusedact.nn.linear import Linear

_OWN = frozenset((Linear, *CONVOLUTIONS))  # which may have an activation of their own
_STOCK = frozenset(getattr(torch.nn, cls.__name__) for cls in _OWN)


class Sequential(torch.nn.Sequential):
    """Modules in a row; a Linear or convolution (torch's or ours) runs as one op with a known activation after it.

    Linear layers that follow each other so, with a last one that may have none, are one op in training, whose gradients
    arrive together. What has a hook, a subclass of a layer, or a replaced forward runs as torch.nn.Sequential runs it.
    Source: torch.nn.Sequential.
    """

    def forward(self, input: Any) -> Any:
        if not (isinstance(input, torch.Tensor) and backend.uses_triton(input)):
            for module in self._modules.values():  # stock's own loop, without the call of it
                input = module(input)
            return input
        modules = list(self)
        at = 0
        while at < len(modules):
            layers, after = _linear_layers(modules, at)
            if len(layers) > 1:
                input, at = functional.linear_chain(input, layers), after
            elif at + 1 < len(modules) and _is_pair(modules[at], modules[at + 1]):
                input, at = _activated(modules[at], input, modules[at + 1]), at + 2
            else:
                input, at = modules[at](input), at + 1
        return input


def _linear_layers(modules: list[torch.nn.Module], at: int) -> tuple[list[Layer], int]:
    """The linear layers from there on, of which all but the last have an activation, and where they end."""
    layers: list[Layer] = []
    while at < len(modules) and _is_linear(modules[at]):
        linear: Any = modules[at]
        activation = linear.activation if type(linear) is Linear else None
        at += 1
        if activation is None and at < len(modules) and _is_pair(linear, modules[at]):
            activation = modules[at]
            at += 1
        layers.append((linear.weight, linear.bias, activation))
        if activation is None:
            break
    return layers, at


def _is_linear(module: Any) -> bool:
    """A plain Linear whose activation, if it has one of its own, is plain too."""
    if type(module) is Linear:
        activation = module.activation
        if isinstance(activation, torch.nn.Module) and not (of_module(activation) and is_plain(activation)):
            return False
    return type(module) in (Linear, torch.nn.Linear) and is_plain(module)


def _is_pair(product: torch.nn.Module, activation: torch.nn.Module) -> bool:
    kind = type(product)
    if kind in _OWN:
        if product.activation is not None:
            return False
    elif kind not in _STOCK:
        return False
    return of_module(activation) is not None and is_plain(product) and is_plain(activation)


def _activated(product: Any, input: torch.Tensor, activation: torch.nn.Module) -> torch.Tensor:
    if isinstance(product, torch.nn.Linear):
        return functional.linear(input, product.weight, product.bias, activation=activation)
    return convolved(product, input, activation)
