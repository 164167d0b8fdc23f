"""A classifier's last layer together with its loss, as torch.nn's; torch before 2.13 has none of that name."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _WeightedLoss

from fusedact import functional

_Base: Any = getattr(nn, "LinearCrossEntropyLoss", _WeightedLoss)


class LinearCrossEntropyLoss(_Base):
    """The cross-entropy of a linear layer's logits, which are never whole; see functional.linear_cross_entropy.

    Arguments are torch's and, keyword-only as they are, z_loss and softcap; `forward` takes sample_weight as well.
    The layer is `linear`, its weight (C * out_features, in_features).
    Shapes: input (in_features) or (N, in_features), target () or (N), (N, *out_features), or as the logits
    (N, C, *out_features) -> () or as target without C. Source: torch.nn.LinearCrossEntropyLoss.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        _WeightedLoss.__init__(self, weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.linear = nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)
        self.options = options
        self.z_loss = z_loss
        self.softcap = softcap

    def forward(self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        outputs, bias = (self.num_classes, *self.out_features), self.linear.bias
        return functional.linear_cross_entropy(
            input,
            self.linear.weight.view(*outputs, self.linear.in_features),
            target,
            linear_bias=bias if bias is None else bias.view(outputs),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            softcap=self.softcap,
            sample_weight=sample_weight,
        )

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={value}"
            for name, value in {
                "in_features": self.linear.in_features,
                "num_classes": self.num_classes,
                "out_features": self.out_features,
                "bias": self.linear.bias is not None,
                "reduction": self.reduction,
                "ignore_index": self.ignore_index,
                "label_smoothing": self.label_smoothing,
                "options": self.options,
                **({"z_loss": self.z_loss} if self.z_loss else {}),
                **({"softcap": self.softcap} if self.softcap is not None else {}),
            }.items()
        )
