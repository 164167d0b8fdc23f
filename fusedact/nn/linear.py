"""Linear, as torch.nn.Linear, with its activation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import functional
from fusedact.functional.checks import refuse_meta
from fusedact.nn.activation import of_layer
from fusedact.nn.hooks import is_plain


class Linear(torch.nn.Linear):
    """act(x Wᵀ + b) in one launch. Arguments, attributes and state_dict are torch.nn.Linear's.

    activation: None; a name of the table, which makes torch's module for it where torch has one (so that prelu
    brings its slope); or a module, which becomes the child `activation`. Without one this is torch.nn.Linear.

    Shapes: input (*, in_features) -> (*, out_features). Raises ValueError for an unknown name and TypeError for an
    activation that is neither a name nor a module.
    Source: torch.nn.Linear.
    """

    activation: torch.nn.Module | str | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        activation: str | torch.nn.Module | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = of_layer(activation, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        activation = self.activation
        if activation is None:
            weight = self.weight
            if weight.is_meta is True:  # torch.fx's stand-in gives another one
                refuse_meta(input, weight)
            return F.linear(input, weight, self.bias)  # stock's forward, without the call of it
        if isinstance(activation, torch.nn.Module) and not is_plain(activation):
            return activation(super().forward(input))
        return functional.linear(input, self.weight, self.bias, activation=activation)

    def extra_repr(self) -> str:
        named = f", activation={self.activation!r}" if isinstance(self.activation, str) else ""
        return super().extra_repr() + named
