"""Conv2d, as torch.nn.Conv2d, with its activation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import functional
from fusedact.nn.activation import of_layer
from fusedact.nn.hooks import is_plain


class Conv2d(torch.nn.Conv2d):
    """act(x * W + b): torch's convolution, then one launch. Arguments, attributes and state_dict are torch.nn.Conv2d's.

    activation: None, a name of the table or a module, as in Linear. Without one this is torch.nn.Conv2d.

    Shapes: input (N, C_in, H, W) -> (N, C_out, H_out, W_out). Raises ValueError for an unknown name and TypeError for
    an activation that is neither a name nor a module.
    Source: torch.nn.Conv2d.
    """

    activation: torch.nn.Module | str | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        activation: str | torch.nn.Module | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.activation = of_layer(activation, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        activation = self.activation
        if activation is None:
            return super().forward(input)
        if isinstance(activation, torch.nn.Module) and not is_plain(activation):
            return activation(super().forward(input))
        return convolved(self, input, activation)

    def extra_repr(self) -> str:
        named = f", activation={self.activation!r}" if isinstance(self.activation, str) else ""
        return super().extra_repr() + named


def convolved(conv: torch.nn.Conv2d, input: Tensor, activation: str | torch.nn.Module) -> Tensor:
    """activation(conv(input)), for torch's own forward of it."""
    padding: str | int | tuple[int, ...] = conv.padding
    if conv.padding_mode != "zeros":
        input, padding = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
    return functional.conv2d(
        input,
        conv.weight,
        conv.bias,
        conv.stride,
        padding,
        conv.dilation,
        conv.groups,
        activation=activation,
    )
