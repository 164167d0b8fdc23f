"""Sequential, as torch.nn.Sequential, with each Linear and the activation after it as one op."""

from typing import Any, TypeGuard

import torch

from fusedact import backend, functional
from fusedact.activations import of_module
from fusedact.nn.hooks import is_plain
from fusedact.nn.linear import Linear


class Sequential(torch.nn.Sequential):
    """Modules in a row; a Linear (torch's or ours) followed by a known activation runs as one launch.

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
                input = functional.linear(input, module.weight, module.bias, activation=modules[at + 1])
                at += 2
            else:
                input = module(input)
                at += 1
        return input


def _is_pair(linear: torch.nn.Module, activation: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    kind = type(linear)
    if kind is not torch.nn.Linear and not (kind is Linear and linear.activation is None):
        return False
    return of_module(activation) is not None and is_plain(linear) and is_plain(activation)
