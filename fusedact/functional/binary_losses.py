"""The losses of yes or no."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import autograd, backend
from fusedact.functional.checks import REDUCTIONS, cast, on_triton


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """(1 - target) input - log σ(input), in one launch where Triton runs.

    input and target of one shape and floating dtype -> () for 'mean' and 'sum', that shape for 'none'. Fused
    without weight and pos_weight, for a target that wants no gradient; torch's own operations take the rest.

    Raises torch.nn.functional.binary_cross_entropy_with_logits's errors, and is a drop-in for it.
    """
    plain = weight is None and pos_weight is None and size_average is None and reduce is None
    if plain and on_triton(input, target) and not target.requires_grad:
        if backend.autocast_dtype(input) is not None:
            input, target = cast(input, torch.float32), cast(target, torch.float32)
        if _bce_fits(input, target, reduction):
            return autograd.bce_with_logits(input, target, reduction)
    return F.binary_cross_entropy_with_logits(input, target, weight, size_average, reduce, reduction, pos_weight)


def _bce_fits(logits: Tensor, target: Tensor, reduction: str) -> bool:
    return (
        logits.shape == target.shape
        and logits.dtype == target.dtype
        and logits.dtype in backend.KERNEL_DTYPES
        and reduction in REDUCTIONS
    )
