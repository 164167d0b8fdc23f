"""The losses of a class among many."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import autograd, backend
from fusedact.functional.checks import REDUCTIONS, cast, on_triton


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log softmax(input)[target], in one launch where Triton runs.

    input (N, C) logits, target (N,) int64 class indices -> () for 'mean' (over the rows whose target is not
    `ignore_index`) and 'sum', (N,) for 'none'. Fused for these shapes without weight and label_smoothing; torch's
    own operations take the rest. A class index outside [0, C) is an IndexError on a CPU; on a GPU nothing is read
    out of bounds and that row's loss and gradient are NaN.

    Raises torch.nn.functional.cross_entropy's errors. Source: torch.nn.functional.cross_entropy.
    """
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    plain = plain and type(ignore_index) is int and -(2**63) <= ignore_index < 2**63
    if plain and on_triton(input, target) and _cross_entropy_fits(input, target, reduction):
        if input.device.type == "cpu":
            _check_classes(target, ignore_index, input.shape[1])
        elif backend.autocast_dtype(input) is not None:
            input = cast(input, torch.float32)
        return autograd.cross_entropy(input, target, ignore_index, reduction)
    return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def _cross_entropy_fits(logits: Tensor, target: Tensor, reduction: str) -> bool:
    return (
        logits.dim() == 2
        and target.shape == logits.shape[:1]
        and logits.shape[1] > 0
        and target.dtype == torch.int64
        and logits.dtype in backend.KERNEL_DTYPES
        and reduction in REDUCTIONS
    )


def _check_classes(target: Tensor, ignore_index: int, classes: int) -> None:
    """torch's own IndexError; on a CPU looking at the labels costs no synchronisation."""
    if torch.compiler.is_compiling() or backend.transforming() or backend.dispatching((target,)):
        return
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise IndexError(f"Target {wrong[0].item()} is out of bounds.")
