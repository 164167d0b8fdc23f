"""A linear layer of one output and its loss of yes or no, as one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import autograd, backend
from fusedact.functional import sharded
from fusedact.functional.binary_losses import as_float32, binary_cross_entropy_with_logits, fits
from fusedact.functional.checks import on_triton, refuse_meta


def linear_binary_cross_entropy_with_logits(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """binary_cross_entropy_with_logits(linear(input, linear_weight, linear_bias), target, ...), logits never stored.

    input (*, d), linear_weight (1, d), linear_bias (1,), target (*, 1), of one floating dtype, weight and pos_weight
    that broadcast to target -> () for 'mean' and 'sum', (*, 1) for 'none'. Where Triton runs, forward and backward are
    a launch or two each for rows of up to 16,384 numbers (4,096 in float64; half as many where a row is not whole 16
    bytes), and a large input that wants no gradient is read once for both, of a reduced loss not in float16. Wider
    rows, and those of more than 128 numbers that are apart in memory, take the two functions. Under autocast all is
    computed in float32, of input as it is.

    Raises the errors of torch.nn.functional.linear and binary_cross_entropy_with_logits.
    """
    given = linear_weight is not None and target is not None
    if given and on_triton(input, linear_weight, target, linear_bias, weight, pos_weight):
        w, b, t, factor, positive = linear_weight, linear_bias, target, weight, pos_weight
        dtype = input.dtype
        if dtype != torch.float64 and backend.autocast_dtype(input) is not None:
            w, b, t, factor, positive = as_float32(w, b, t, factor, positive)
            dtype = torch.float32
        if _head_fits(input, w, b, t, dtype) and fits(t, t, reduction, factor, positive):
            return autograd.linear_bce(input, w, b, t, factor, positive, reduction)
    elif given and backend.is_sharded(input):
        tensors = input, linear_weight, linear_bias, target, weight, pos_weight
        loss = sharded.linear_binary_loss(_of_parts, tensors, reduction)
        if loss is not NotImplemented:
            return loss
    refuse_meta(input, linear_weight)
    z = F.linear(input, linear_weight, linear_bias)
    return binary_cross_entropy_with_logits(z, target, weight, reduction=reduction, pos_weight=pos_weight)


def _of_parts(x, linear_weight, linear_bias, target, weight, pos_weight, reduction) -> Tensor:
    options = {"weight": weight, "reduction": reduction, "pos_weight": pos_weight}
    return linear_binary_cross_entropy_with_logits(x, linear_weight, target, linear_bias=linear_bias, **options)


def _head_fits(x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, dtype: torch.dtype) -> bool:
    """One output of a batch that is not empty, all but x of that dtype, no gradient of the target."""
    if x.dim() == 0 or x.numel() == 0 or x.dtype not in backend.KERNEL_DTYPES:
        return False
    if w.dtype is not dtype or target.dtype is not dtype or (target.requires_grad and torch.is_grad_enabled()):
        return False
    if w.shape != (1, x.shape[-1]) or target.shape != (*x.shape[:-1], 1):
        return False
    return (b is None or (b.dtype is dtype and b.shape == (1,))) and autograd.fits_in_registers(x)
