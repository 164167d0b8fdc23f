"""The classification losses, as torch.nn's."""

import torch
from torch import Tensor

from fusedact import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """log-softmax and negative log-likelihood in one launch; see functional.cross_entropy.

    Shapes: input (N, C), target (N,) -> () or (N,). Source: torch.nn.CrossEntropyLoss.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """Sigmoid and binary cross-entropy in one launch; see functional.binary_cross_entropy_with_logits.

    Shapes: input (*), target (*) -> () or (*). Source: torch.nn.BCEWithLogitsLoss.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )
