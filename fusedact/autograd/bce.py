"""The losses of yes or no: BCE on logits and on probabilities, multi-label soft margin.

Each saves what it was given, by reference. `name` is the op's, by which all three share what stands here.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fusedact.autograd.doors import Op

_MULTILABEL = "multilabel_soft_margin"


def _launch(
    name: str, x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str, save: bool
) -> tuple[Tensor, None]:
    from fusedact.kernels import bce, multilabel

    if name == _MULTILABEL and reduction == "none":
        loss = multilabel.forward_rows(x, target, weight, multilabel.tile(x.shape[-1], x.element_size()))
    else:
        divisor = None if reduction == "none" else _divisor(name, x, reduction)
        loss = bce.forward(_formula(name), x, target, weight, pos_weight, divisor, bce.tile(x.element_size()))
    return loss, None


def _fake(name, x, target, weight, pos_weight, reduction, save):
    every = x.shape[:-1] if name == _MULTILABEL else x.shape
    return x.new_empty(every if reduction == "none" else ()), None


def _backward(
    name: str,
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    from fusedact.kernels import bce

    if name == _MULTILABEL and reduction == "none":
        dloss = dloss.unsqueeze(-1)
    dx, dtarget = bce.backward(
        _formula(name),
        dloss,
        x,
        target,
        weight,
        pos_weight,
        _divisor(name, x, reduction),
        wanted[0],
        wanted[1],
        bce.tile(x.element_size()),
    )
    return dx, dtarget, None, None


def _backward_fake(dloss, x, target, weight, pos_weight, reduction, wanted):
    return *(x.new_empty(x.shape) if want else None for want in wanted[:2]), None, None


@cache
def _formula(name: str) -> Any:
    from fusedact.kernels import bce, multilabel

    return {
        "bce_with_logits": bce.LOGITS,
        "binary_cross_entropy": bce.PROBABILITIES,
        _MULTILABEL: multilabel.SOFT_MARGIN,
    }[name]


def _divisor(name: str, x: Tensor, reduction: str) -> int:
    """What the sum of the elements' losses is divided by, and each of their gradients."""
    if reduction == "mean":
        return x.numel()
    return x.shape[-1] if name == _MULTILABEL else 1


_TENSORS = "Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight"


def _op(name: str, composite: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return Op(
        name=name,
        tensors=4,
        schema=f"({_TENSORS}, str reduction, bool save) -> (Tensor, Tensor)",
        launch=partial(_launch, name),
        fake=partial(_fake, name),
        extras=lambda output, options: (),
        backward_schema=f"(Tensor dloss, {_TENSORS}, str reduction, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
        backward=partial(_backward, name),
        backward_fake=_backward_fake,
        composite=composite,
    ).register()


def _bce_with_logits(x, target, weight, pos_weight, reduction):
    return F.binary_cross_entropy_with_logits(x, target, weight, reduction=reduction, pos_weight=pos_weight)


def _binary_cross_entropy(x, target, weight, pos_weight, reduction):
    return F.binary_cross_entropy(x, target, weight, reduction=reduction)


def _multilabel(x, target, weight, pos_weight, reduction):
    return F.multilabel_soft_margin_loss(x, target, weight, reduction=reduction)


bce_with_logits = _op("bce_with_logits", _bce_with_logits)
binary_cross_entropy = _op("binary_cross_entropy", _binary_cross_entropy)
multilabel_soft_margin = _op(_MULTILABEL, _multilabel)
