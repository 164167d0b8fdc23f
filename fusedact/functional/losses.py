"""The losses of a class among many."""

import math
from functools import partial
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import autograd, backend
from fusedact.functional import sharded
from fusedact.functional.checks import STRIDED, cast, checked_reduction, class_dim, on_triton


@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0, *,
    z_loss: float = 0.0, softcap: float | None = None, sample_weight: Tensor | None = None,
    return_lse: Literal[False] = False, grad_in_forward: bool = False,
) -> Tensor: ...  # fmt: skip
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0, *,
    z_loss: float = 0.0, softcap: float | None = None, sample_weight: Tensor | None = None,
    return_lse: bool, grad_in_forward: bool = False,
) -> Any: ...  # fmt: skip
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    sample_weight: Tensor | None = None,
    return_lse: bool = False,
    grad_in_forward: bool = False,
) -> Any:
    """-log softmax(input) at a class, or against probabilities, in one launch where Triton runs.

    input (C), (N, C) or (N, C, d1, ...) logits; target without C, int64 class indices, or as input, probabilities of
    its dtype -> () for 'mean' and 'sum', as input without C for 'none'. weight (C,). Read in place, whatever the
    strides; never written. A class index outside [0, C) is an IndexError on a CPU; on a GPU nothing is read out of
    bounds and that row's loss and gradient are NaN (FUSEDACT_CHECKS=1: the IndexError, for a synchronisation).

    Beyond torch: `softcap` c puts c tanh(input / c) in the logits' place; `z_loss` z adds z lse² to the loss of each
    row that counts, where lse is the row's log-sum-exp; `sample_weight`, as input without C, multiplies each row's
    loss, and a mean is the weighted one: it divides by the sum of the rows' weights; `return_lse` gives (loss, lse),
    both differentiable, lse as input without C in float32 (float64 of float64). `grad_in_forward` makes the gradient
    of the logits with the loss where a gradient is wanted, the logits then being read once instead of twice; it pays
    where the loss's own gradient will be 1, as it is after `loss.backward()`, and costs a read and a write of the
    gradient more where it is not (a scaled or averaged loss). Only a mean or a sum, without return_lse, not in float16.

    Raises torch.nn.functional.cross_entropy's errors, and ValueError for a z_loss that is not finite or negative, a
    softcap that is not finite or not positive, and a sample_weight of another shape or not of real numbers. Of DTensors
    whose classes are in shards there is no second derivative: RuntimeError for create_graph. Source:
    torch.nn.functional.cross_entropy.
    """
    tensors = isinstance(input, Tensor) and isinstance(target, Tensor)  # else torch names the one that is none
    extended = tensors and (return_lse or softcap is not None or sample_weight is not None or z_loss != 0.0)
    if extended:
        check_extensions(input, z_loss, softcap, sample_weight)
    fused = tensors and on_triton(input, target, weight, sample_weight)
    if tensors and not fused and backend.is_sharded(input):
        loss = _sharded(
            (input, target, weight, sample_weight), ignore_index, checked_reduction(size_average, reduce, reduction),
            label_smoothing, z_loss, softcap, return_lse, grad_in_forward,
        )  # fmt: skip
        if loss is not NotImplemented:
            return loss
    if (fused or extended) and backend.autocast_dtype(input) is not None:
        input, target = cast(input, torch.float32), cast(target, torch.float32)
        weight = weight if weight is None else cast(weight, torch.float32)
    fused = fused and _class_loss_fits(input, target, weight, ignore_index) and smooths(label_smoothing)
    fused = fused and not wants_gradient(weight, sample_weight)
    if not (fused or extended):
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    reduction = checked_reduction(size_average, reduce, reduction)
    if fused and not target.is_floating_point() and backend.looks_at_values(target):
        check_classes(target, ignore_index, input.shape[class_dim(input)])
    op = autograd.cross_entropy if fused else autograd.cross_entropy_formula
    options = float(label_smoothing), float(z_loss), float(softcap or 0.0)
    if grad_in_forward and fused and reduction != "none" and not return_lse and _knows_its_gradient(input, target):
        return autograd.cross_entropy_early(input, target, weight, sample_weight, ignore_index, reduction, *options)
    return op(input, target, weight, sample_weight, ignore_index, reduction, *options, return_lse)


def _sharded(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    return_lse: bool,
    grad_in_forward: bool,
) -> Any:
    def run(x: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, reduction: str) -> Any:
        return cross_entropy(
            x, target, weight,
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss,
            softcap=softcap, sample_weight=sample_weight, return_lse=return_lse, grad_in_forward=grad_in_forward,
        )  # fmt: skip

    def of_slice(x, target, weight, sample_weight, reduction, group, first, classes) -> Any:
        if backend.autocast_dtype(x) is not None:
            x, weight = cast(x, torch.float32), weight if weight is None else cast(weight, torch.float32)
        if backend.looks_at_values(target):
            check_classes(target, ignore_index, classes)
        options = float(label_smoothing), float(z_loss), float(softcap or 0.0), return_lse, group, first, classes
        return autograd.vocab_parallel_cross_entropy(
            x, target, weight, sample_weight, ignore_index, reduction, *options
        )

    fits = _class_loss_fits(*tensors[:3], ignore_index) and smooths(label_smoothing)
    return sharded.cross_entropy(run, of_slice if fits else None, tensors, ignore_index, reduction)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-input at a class, in one launch where Triton runs.

    input (C), (N, C) or (N, C, d1, ...) log-probabilities, target without C, int64, weight (C,) -> () for 'mean' and
    'sum', as target for 'none'. A class index outside [0, C) is an IndexError on a CPU; on a GPU that row's loss and
    gradient are NaN (FUSEDACT_CHECKS=1: the IndexError, for a synchronisation).

    Raises torch.nn.functional.nll_loss's errors. Source: torch.nn.functional.nll_loss.
    """
    fused = target is not None and on_triton(input, target, weight)
    if fused and backend.autocast_dtype(input) is not None:
        input = cast(input, torch.float32)
        weight = weight if weight is None else cast(weight, torch.float32)
    elif target is not None and backend.is_sharded(input):
        reduction = checked_reduction(size_average, reduce, reduction)
        run = partial(_nll_of_rows, ignore_index)
        loss = sharded.cross_entropy(run, None, (input, target, weight, None), ignore_index, reduction)
        if loss is not NotImplemented:
            return loss.to(input.dtype) if backend.autocast_dtype(input) is None else loss
    fused = fused and _class_loss_fits(input, target, weight, ignore_index) and not wants_gradient(weight)
    if not fused or target.is_floating_point():
        return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
    reduction = checked_reduction(size_average, reduce, reduction)
    if backend.looks_at_values(target):
        check_classes(target, ignore_index, input.shape[class_dim(input)])
    return autograd.nll_loss(input, target, weight, ignore_index, reduction)


def _nll_of_rows(
    ignore_index: int, x: Tensor, target: Tensor, weight: Tensor | None, row_weights: Tensor | None, reduction: str
) -> Tensor:
    """nll_loss; with numbers for the rows, their sum, in float32 or wider."""
    if row_weights is None:
        return nll_loss(x, target, weight, ignore_index=ignore_index, reduction=reduction)
    dtype = backend.wide(x.dtype)
    weight = weight if weight is None else weight.to(dtype)
    rows = nll_loss(x.to(dtype), target, weight, ignore_index=ignore_index, reduction="none")
    return (rows * row_weights).sum()


def check_extensions(input: Tensor, z_loss: float, softcap: float | None, sample_weight: Tensor | None) -> None:
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must not be negative, infinite or NaN, got {z_loss}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if sample_weight is not None:
        _check_sample_weight(sample_weight, input)


def _check_sample_weight(sample_weight: Tensor, input: Tensor) -> None:
    if not isinstance(sample_weight, Tensor):
        raise TypeError(f"sample_weight must be Tensor, not {type(sample_weight).__name__}")
    if sample_weight.layout is not STRIDED or sample_weight.is_complex() or sample_weight.is_quantized:
        given = f"{sample_weight.dtype} of layout {sample_weight.layout}"
        raise ValueError(f"sample_weight must be real numbers of layout {STRIDED}, got {given}")
    rows = _rows_shape(input)
    if sample_weight.is_nested or sample_weight.shape != rows:
        shape = "a nested tensor" if sample_weight.is_nested else tuple(sample_weight.shape)
        raise ValueError(
            f"sample_weight must have one number for each row of input {tuple(input.shape)}, that is "
            f"{rows}, got {shape}"
        )


def _rows_shape(input: Tensor) -> tuple[int, ...]:
    """input's shape without its classes."""
    dim = class_dim(input)
    return tuple(input.shape[:dim] + input.shape[dim + 1 :])


def _class_loss_fits(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> bool:
    """Whether a kernel takes these; torch answers for all others, or refuses them."""
    if input.dim() == 0 or input.dtype not in backend.KERNEL_DTYPES:
        return False
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        return False
    classes = input.shape[class_dim(input)]
    if classes == 0 or (weight is not None and (weight.shape != (classes,) or weight.dtype != input.dtype)):
        return False
    if target.is_floating_point():
        return target.shape == input.shape and target.dtype == input.dtype and ignore_index < 0
    return target.dtype == torch.int64 and target.shape == _rows_shape(input)


def smooths(label_smoothing: float) -> bool:
    """Whether that is a label smoothing; torch answers for all else."""
    return isinstance(label_smoothing, float | int) and 0.0 <= label_smoothing <= 1.0


def _knows_its_gradient(input: Tensor, target: Tensor) -> bool:
    """Whether the logits' gradient, wanted alone, can be made before dloss is known: float16 underflows undivided.

    Where torch compiles, a product with dloss would be one more read and write.
    """
    compiling = torch.compiler.is_compiling() or backend.dispatching() or backend.transforming()
    return wants_gradient(input) and not wants_gradient(target) and input.dtype != torch.float16 and not compiling


def wants_gradient(*weights: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(weight is not None and weight.requires_grad for weight in weights)


def check_classes(target: Tensor, ignore_index: int, classes: int) -> None:
    """torch's own IndexError; on a CPU looking at the labels costs no synchronisation."""
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise IndexError(f"Target {wrong[0].item()} is out of bounds.")
