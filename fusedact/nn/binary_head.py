"""A linear layer of one output with its loss, as one module."""

from typing import Any

import torch
from torch import Tensor

from fusedact import functional


class LinearBCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """The loss of a linear layer's one logit; see functional.linear_binary_cross_entropy_with_logits.

    Parameters: linear.weight (1, in_features), linear.bias (1,) unless bias=False; weight, reduction and pos_weight
    as torch.nn.BCEWithLogitsLoss's. `module.linear(input)` gives the logits.

    Shapes: input (*, in_features), target (*, 1) -> () or (*, 1). Sources: torch.nn.LinearCrossEntropyLoss,
    torch.nn.BCEWithLogitsLoss.
    """

    def __init__(
        self,
        in_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__(weight=weight, reduction=reduction, pos_weight=pos_weight)
        self.linear = torch.nn.Linear(in_features, 1, bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.linear_binary_cross_entropy_with_logits(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
        )
