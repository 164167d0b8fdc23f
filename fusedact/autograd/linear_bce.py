"""BCE on the logits x wᵀ + b of one output. Saves what it was given, by reference; gradients come with the loss.

Where those could be wrong or would cost more they come late, from the same kernel once dloss is known: without a
reduction, where dloss has a number for each row; in float16, which may hold a gradient only as dloss scales it; of a
small x, which is read again sooner than two gradients are multiplied by dloss; and with x's own gradient, which takes
twice its bytes to multiply.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import backend
from fusedact.autograd.early import EarlyOp

READ_AGAIN = 2**23  # bytes of x: two launches' time on an H200, of a few microseconds


def fits_in_registers(x: Tensor) -> bool:
    """Whether the kernel holds a row of x (*, d) in registers."""
    from fusedact.kernels import linear_bce

    return linear_bce.fits(x)


def _launch(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    late: bool,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    from fusedact.kernels import linear_bce

    divisor = None if reduction == "none" else _divisor(target, reduction)
    wanted = [False] * 3 if late else wanted
    loss, *grads = linear_bce.forward(x, w, b, target, weight, pos_weight, divisor, wanted, _tile(x))
    return loss, *grads


def _fake(x, w, b, target, weight, pos_weight, reduction, late, wanted):
    loss = target.new_empty(target.shape if reduction == "none" else ())
    grads = (t.new_empty(t.shape) if want and not late else None for t, want in zip((x, w, b), wanted, strict=True))
    return loss, *grads


def _late(
    dloss: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    late: bool,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    from fusedact.kernels import linear_bce

    divisor = _divisor(target, reduction)
    return linear_bce.backward(dloss, x, w, b, target, weight, pos_weight, divisor, wanted, _tile(x))


def _divisor(target: Tensor, reduction: str) -> int:
    return target.numel() if reduction == "mean" else 1


def _tile(x: Tensor) -> Any:
    from fusedact.kernels import linear_bce

    chip, d = backend.chip(x.device), x.shape[-1]
    itemsize = backend.wide(x.dtype).itemsize
    return linear_bce.tile(x.numel() // d, d, itemsize, chip.warp_size, chip.multiprocessors)


def _composite(x, w, b, target, weight, pos_weight, reduction, late):
    z = F.linear(x.to(w.dtype), w, b)
    return F.binary_cross_entropy_with_logits(z, target, weight, reduction=reduction, pos_weight=pos_weight)


_OP = EarlyOp(
    name="linear_bce",
    tensors=6,
    learned=3,
    schema="Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor? pos_weight,"
    " str reduction, bool late",
    launch=_launch,
    fake=_fake,
    late=_late,
    composite=_composite,
    late_only=lambda tensors, options: options[1],
).register()


def _costs_less_late(x: Tensor) -> bool:
    return x.requires_grad or x.numel() * x.element_size() < READ_AGAIN


def linear_bce(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """x (*, d), w (1, d), b (1,), target (*, 1) -> loss; x may be narrower than all others, as under autocast."""
    late = reduction == "none" or torch.float16 in (x.dtype, w.dtype) or _costs_less_late(x)
    return _OP(x, w, b, target, weight, pos_weight, reduction, late)
