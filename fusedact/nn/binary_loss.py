"""The losses of yes or no, as torch.nn's; where no kernel can run, torch's own function, by the shortest way."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import functional
from fusedact.backend import get_backend


def _functions(input: Tensor) -> Any:
    return functional if get_backend() == "triton" or (isinstance(input, Tensor) and input.is_cuda) else F


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """Sigmoid and binary cross-entropy in one launch; see functional.binary_cross_entropy_with_logits.

    Shapes: input (*), target (*) -> () or (*). Source: torch.nn.BCEWithLogitsLoss.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return _functions(input).binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


class BCELoss(torch.nn.BCELoss):
    """Binary cross-entropy of probabilities in one launch; see functional.binary_cross_entropy.

    Shapes: input (*), target (*) -> () or (*). Source: torch.nn.BCELoss.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return _functions(input).binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


class MultiLabelSoftMarginLoss(torch.nn.MultiLabelSoftMarginLoss):
    """Sigmoid and binary cross-entropy, a mean over classes, in one launch; see functional.multilabel_soft_margin_loss.

    Shapes: input (*, C), target (*, C) -> () or (*). Source: torch.nn.MultiLabelSoftMarginLoss.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return _functions(input).multilabel_soft_margin_loss(
            input, target, weight=self.weight, reduction=self.reduction
        )
