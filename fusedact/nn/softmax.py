"""The softmaxes, as torch.nn's."""

import torch
from torch import Tensor

from fusedact import functional


class Softmax(torch.nn.Softmax):
    """exp(x) / Σ exp(x) along `dim` in one launch; see functional.softmax.

    Shapes: input (*) -> (*). Source: torch.nn.Softmax.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.softmax(input, self.dim, _stacklevel=5)


class Softmax2d(torch.nn.Softmax2d):
    """Softmax over the channels at each place of an image; see functional.softmax.

    Shapes: input (N, C, H, W) or (C, H, W) -> as input; ValueError for another rank. Source: torch.nn.Softmax2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4):
            return super().forward(input)  # torch's error
        return functional.softmax(input, -3, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """x - log Σ exp(x) along `dim` in one launch; see functional.log_softmax.

    Shapes: input (*) -> (*). Source: torch.nn.LogSoftmax.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.log_softmax(input, self.dim, _stacklevel=5)


class Softmin(torch.nn.Softmin):
    """exp(-x) / Σ exp(-x) along `dim` in one launch; see functional.softmin.

    Shapes: input (*) -> (*). Source: torch.nn.Softmin.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.softmin(input, self.dim, _stacklevel=5)
