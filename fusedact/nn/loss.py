"""The classification losses, as torch.nn's."""

from typing import Any

import torch
from torch import Tensor

from fusedact import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """log-softmax and negative log-likelihood in one launch; see functional.cross_entropy.

    Arguments are torch's and, keyword-only, z_loss, softcap, return_lse and grad_in_forward; `forward` takes
    sample_weight as well. Shapes: input (C), (N, C) or (N, C, d1, ...), target without C or, as probabilities, as
    input -> () or as input without C. Source: torch.nn.CrossEntropyLoss.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        return_lse: bool = False,
        grad_in_forward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.return_lse = return_lse
        self.grad_in_forward = grad_in_forward

    def forward(self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None) -> Any:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            sample_weight=sample_weight,
            return_lse=self.return_lse,
            grad_in_forward=self.grad_in_forward,
        )


class NLLLoss(torch.nn.NLLLoss):
    """The negative log-likelihood of log-probabilities in one launch; see functional.nll_loss.

    Shapes: input (C), (N, C) or (N, C, d1, ...), target without C -> () or as target. Source: torch.nn.NLLLoss.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.nll_loss(
            input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )
