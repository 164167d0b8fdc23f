"""Conv1d, Conv2d, Conv3d and their transposes, as torch.nn's, each with its activation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import functional
from fusedact.functional.checks import refuse_meta
from fusedact.nn.activation import of_layer
from fusedact.nn.hooks import is_plain

Numbers = int | tuple[int, ...]  # one for all dimensions, or one for each


class _Layer(torch.nn.Module):
    """What a convolution with an activation has beyond torch.nn's, whose class stands after it among the bases."""

    activation: torch.nn.Module | str | None
    weight: Tensor

    def extra_repr(self) -> str:
        named = f", activation={self.activation!r}" if isinstance(self.activation, str) else ""
        return super().extra_repr() + named


class _Conv(_Layer):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: str | Numbers = 0,
        dilation: Numbers = 1,
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
            refuse_meta(input, self.weight)
            return super().forward(input)
        if isinstance(activation, torch.nn.Module) and not is_plain(activation):
            return activation(super().forward(input))
        return convolved(self, input, activation)


class _ConvTranspose(_Layer):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: Numbers = 0,
        output_padding: Numbers = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Numbers = 1,
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
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.activation = of_layer(activation, device, dtype)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        activation = self.activation
        if activation is None:
            refuse_meta(input, self.weight)
            return super().forward(input, output_size)
        if isinstance(activation, torch.nn.Module) and not is_plain(activation):
            return activation(super().forward(input, output_size))
        return convolved(self, input, activation, output_size)


class Conv1d(_Conv, torch.nn.Conv1d):
    """act(x * W + b), as Conv2d. Shapes: input (N, C_in, L) -> (N, C_out, L_out). Source: torch.nn.Conv1d."""


class Conv2d(_Conv, torch.nn.Conv2d):
    """act(x * W + b): torch's convolution, then one launch. Arguments, attributes and state_dict are torch.nn.Conv2d's.

    activation: None, a name of the table or a module, as in Linear. Without one this is torch.nn.Conv2d.

    Shapes: input (N, C_in, H, W) -> (N, C_out, H_out, W_out). Raises ValueError for an unknown name and TypeError for
    an activation that is neither a name nor a module.
    Source: torch.nn.Conv2d.
    """


class Conv3d(_Conv, torch.nn.Conv3d):
    """act(x * W + b), as Conv2d.

    Shapes: input (N, C_in, D, H, W) -> (N, C_out, D_out, H_out, W_out). Source: torch.nn.Conv3d.
    """


class ConvTranspose1d(_ConvTranspose, torch.nn.ConvTranspose1d):
    """act(the transposed convolution of x and W, + b), as Conv2d.

    Shapes: input (N, C_in, L) -> (N, C_out, L_out). Source: torch.nn.ConvTranspose1d.
    """


class ConvTranspose2d(_ConvTranspose, torch.nn.ConvTranspose2d):
    """act(the transposed convolution of x and W, + b), as Conv2d.

    Shapes: input (N, C_in, H, W) -> (N, C_out, H_out, W_out). Source: torch.nn.ConvTranspose2d.
    """


class ConvTranspose3d(_ConvTranspose, torch.nn.ConvTranspose3d):
    """act(the transposed convolution of x and W, + b), as Conv2d.

    Shapes: input (N, C_in, D, H, W) -> (N, C_out, D_out, H_out, W_out). Source: torch.nn.ConvTranspose3d.
    """


CONVOLUTIONS = (Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def convolved(
    layer: Any, input: Tensor, activation: str | torch.nn.Module, output_size: list[int] | None = None
) -> Tensor:
    """activation(layer(input)), for torch's own forward of any of these classes or of torch's."""
    stride, padding, dilation = layer.stride, layer.padding, layer.dilation
    dims = layer.weight.dim() - 2
    if layer.transposed:
        output_padding = layer._output_padding(input, output_size, stride, padding, layer.kernel_size, dims, dilation)
        return _CONV_TRANSPOSE[dims](
            input,
            layer.weight,
            layer.bias,
            stride,
            padding,
            output_padding,
            layer.groups,
            dilation,
            activation=activation,
        )
    if layer.padding_mode != "zeros":
        input, padding = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    return _CONV[dims](input, layer.weight, layer.bias, stride, padding, dilation, layer.groups, activation=activation)
