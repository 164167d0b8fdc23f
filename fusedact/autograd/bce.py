"""Sigmoid + binary cross-entropy on logits. Saves logits and targets by reference."""

import torch.nn.functional as F
from torch import Tensor

from fusedact import backend
from fusedact.autograd.doors import Op


def _launch(logits: Tensor, target: Tensor, reduction: str, save: bool) -> tuple[Tensor, Tensor]:
    from fusedact.kernels import bce

    with backend.on_device(logits):
        loss = bce.forward(logits.contiguous(), target.contiguous(), reduction, bce.tile())
    return loss, logits.new_empty(0)


def _fake(logits, target, reduction, save):
    return logits.new_empty(logits.shape if reduction == "none" else ()), logits.new_empty(0)


def _backward(
    dloss: Tensor, logits: Tensor, target: Tensor, reduction: str, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    from fusedact.kernels import bce

    with backend.on_device(logits):
        dx = bce.backward(dloss.contiguous(), logits.contiguous(), target.contiguous(), reduction, bce.tile())
    return dx, logits.new_empty(0)


def _backward_fake(dloss, logits, *_):
    return logits.new_empty(logits.shape), logits.new_empty(0)


def _composite(logits, target, reduction):
    return F.binary_cross_entropy_with_logits(logits, target, reduction=reduction)


_TENSORS = "Tensor logits, Tensor target"

bce_with_logits = Op(
    name="bce_with_logits",
    tensors=2,
    schema=f"({_TENSORS}, str reduction, bool save) -> (Tensor, Tensor)",
    launch=_launch,
    fake=_fake,
    extras=lambda output, options: (),
    backward_schema=f"(Tensor dloss, {_TENSORS}, str reduction, bool[] wanted) -> (Tensor, Tensor)",
    backward=_backward,
    backward_fake=_backward_fake,
    composite=_composite,
).register()
