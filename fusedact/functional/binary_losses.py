"""The losses of yes or no."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import autograd, backend
from fusedact.functional import sharded
from fusedact.functional.checks import REDUCTIONS, cast, on_triton, resolved_reduction


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """((1 - target) input - ((pos_weight - 1) target + 1) log σ(input)) weight, in one launch where Triton runs.

    input and target of one shape (*) and floating dtype, weight and pos_weight of that dtype and of shapes that
    broadcast to it -> () for 'mean' and 'sum', (*) for 'none'. All are read in place, whatever their strides (what
    three dimensions do not describe is copied first); input and target get their gradients from one launch.

    Raises torch.nn.functional.binary_cross_entropy_with_logits's errors, and is a drop-in for it.
    """
    reduction = resolved_reduction(size_average, reduce, reduction)
    if target is not None and on_triton(input, target, weight, pos_weight):
        if backend.autocast_dtype(input) is not None:
            input, target, weight, pos_weight = as_float32(input, target, weight, pos_weight)
        if fits(input, target, reduction, weight, pos_weight):
            return autograd.bce_with_logits(input, target, weight, pos_weight, reduction)
    elif target is not None and backend.is_sharded(input):
        loss = sharded.binary_loss(_with_logits, (input, target, weight, pos_weight), reduction)
        if loss is not NotImplemented:
            return loss
    return F.binary_cross_entropy_with_logits(input, target, weight, reduction=reduction, pos_weight=pos_weight)


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-(target log input + (1 - target) log(1 - input)) weight, each logarithm at least -100, in one launch.

    input and target, probabilities of one shape (*) and floating dtype, weight of that dtype and a shape that
    broadcasts to it -> () for 'mean' and 'sum', (*) for 'none'. All are read in place, as by
    binary_cross_entropy_with_logits. A number outside [0, 1] is a RuntimeError on a CPU; on a GPU that element's loss
    and gradients are NaN (FUSEDACT_CHECKS=1: the RuntimeError, for a synchronisation).

    Raises torch.nn.functional.binary_cross_entropy's errors, and is a drop-in for it.
    """
    reduction = resolved_reduction(size_average, reduce, reduction)
    if target is not None and on_triton(input, target, weight):
        banned = False
        if backend.autocast_dtype(input) is not None:
            banned = input.is_cuda
            input, target, weight = as_float32(input, target, weight)
        if not banned and fits(input, target, reduction, weight):
            if backend.looks_at_values(input):
                _check_probabilities(input=input, target=target)
            return autograd.binary_cross_entropy(input, target, weight, None, reduction)
    elif target is not None and backend.is_sharded(input):
        loss = sharded.binary_loss(_of_probabilities, (input, target, weight), reduction)
        if loss is not NotImplemented:
            return loss
    return F.binary_cross_entropy(input, target, weight, reduction=reduction)


def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-(target log σ(input) + (1 - target) log σ(-input)) weight, a mean over the last dimension, in one launch.

    input (*, C), target of that shape and dtype (or int64), weight of a shape that broadcasts to it -> () for 'mean'
    and 'sum' over what is left, (*) for 'none'. All are read in place, as by binary_cross_entropy_with_logits.

    Raises torch.nn.functional.multilabel_soft_margin_loss's errors, and is a drop-in for it.
    """
    reduction = resolved_reduction(size_average, reduce, reduction)
    if target is not None and on_triton(input, target, weight):
        if input.is_cuda and backend.autocast_dtype(input) is not None:  # where its sum runs in float32
            input, target, weight = as_float32(input, target, weight)
        if input.dim() and input.shape[-1] and fits(input, target, reduction, weight, integers=True):
            return autograd.multilabel_soft_margin(input, target, weight, None, reduction)
    elif target is not None and backend.is_sharded(input):
        loss = sharded.binary_loss(_of_labels, (input, target, weight), reduction, of_rows=True)
        if loss is not NotImplemented:
            return loss
    return F.multilabel_soft_margin_loss(input, target, weight, reduction=reduction)


def _with_logits(x: Tensor, t: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str) -> Tensor:
    return binary_cross_entropy_with_logits(x, t, weight, reduction=reduction, pos_weight=pos_weight)


def _of_probabilities(x: Tensor, t: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    return binary_cross_entropy(x, t, weight, reduction=reduction)


def _of_labels(x: Tensor, t: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    return multilabel_soft_margin_loss(x, t, weight, reduction=reduction)


def as_float32(*tensors: Tensor | None) -> list:
    return [t if t is None else cast(t, torch.float32) for t in tensors]


def fits(x: Tensor, target: Tensor, reduction: str, *weights: Tensor | None, integers: bool = False) -> bool:
    """Whether a kernel takes these; torch answers for all others, or refuses them."""
    if x.dtype not in backend.KERNEL_DTYPES or reduction not in REDUCTIONS or target.shape != x.shape:
        return False
    if target.dtype != x.dtype and not (integers and target.dtype == torch.int64):
        return False
    return all(weight is None or _weighs(weight, x) for weight in weights)


def _weighs(weight: Tensor, x: Tensor) -> bool:
    """Of x's dtype, broadcasts to x's shape, and wants no gradient."""
    if weight.dtype != x.dtype or (weight.requires_grad and torch.is_grad_enabled()) or weight.dim() > x.dim():
        return False
    missing = x.dim() - weight.dim()
    return all(own in (1, size) for own, size in zip(weight.shape, x.shape[missing:], strict=True))


def _check_probabilities(**tensors: Tensor) -> None:
    """torch's own RuntimeError; on a CPU looking at the numbers costs no synchronisation."""
    for name, t in tensors.items():
        if not ((t >= 0) & (t <= 1)).all():
            raise RuntimeError(f"all elements of {name} should be between 0 and 1")
