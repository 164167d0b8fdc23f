"""Sequential, as torch.nn.Sequential, with each Linear or Conv2d and the activation after it as one op."""

from typing import Any

import torch

from fusedact import backend, functional
from fusedact.activations import of_module
from fusedact.nn.convolution import Conv2d, convolved
from fusedact.nn.hooks import is_plain
from fusedact.nn.linear import Linear


class Sequential(torch.nn.Sequential):
    """Modules in a row; a Linear or Conv2d (torch's or ours) runs as one op with a known activation after it.

    A pair with a hook on either, a subclass of either, or a replaced forward runs as torch.nn.Sequential runs it.
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
            module = modules[at]
            if at + 1 < len(modules) and _is_pair(module, modules[at + 1]):
                input = _activated(module, input, modules[at + 1])
                at += 2
            else:
                input = module(input)
                at += 1
        return input


def _is_pair(product: torch.nn.Module, activation: torch.nn.Module) -> bool:
    kind = type(product)
    if kind is Linear or kind is Conv2d:
        if product.activation is not None:
            return False
    elif kind is not torch.nn.Linear and kind is not torch.nn.Conv2d:
        return False
    return of_module(activation) is not None and is_plain(product) and is_plain(activation)


def _activated(product: Any, input: torch.Tensor, activation: torch.nn.Module) -> torch.Tensor:
    if isinstance(product, torch.nn.Linear):
        return functional.linear(input, product.weight, product.bias, activation=activation)
    return convolved(product, input, activation)
