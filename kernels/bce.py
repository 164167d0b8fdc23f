"""Sigmoid and binary cross-entropy on logits.

Forward reads logits and targets once, in one launch, its reduction included; backward reads them again and
writes the gradient. In the form (1 - t) x - log σ(x), term by term as torch has it, infinities come out as torch's.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .activations import logsigmoid
from .tiles import blocks_of, is_last_program, narrow, ordered_sum, sigmoid
from .workspace import cdiv, tickets

PROGRAMS = 1024  # partial sums that one program can add in one tile


class Tile(NamedTuple):
    block: int
    num_warps: int


def tile() -> Tile:
    return Tile(2048, 4)


@triton.jit
def _forward_kernel(
    x_ptr,  # (n,)
    target_ptr,  # (n,)
    loss_ptr,  # (n,) or, reduced, (1,)
    partial_ptr,  # (programs,) or None
    ticket_ptr,  # (1,)
    n,
    MEAN: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    programs = tl.num_programs(0)
    loss_sum = tl.zeros((BLOCK,), ACCUMULATOR)
    for block in range(tl.program_id(0), blocks_of(n, BLOCK), programs):
        offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACCUMULATOR)
        target = tl.load(target_ptr + offsets, mask=mask, other=0.0).to(ACCUMULATOR)
        loss = (1.0 - target) * x - logsigmoid(x)
        if partial_ptr is None:
            tl.store(loss_ptr + offsets, narrow(loss, loss_ptr.dtype.element_ty), mask=mask)
        loss_sum += tl.where(mask, loss, 0.0)

    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(loss_sum, 0))
        if is_last_program(ticket_ptr, programs):
            one = tl.arange(0, 1)
            total = tl.sum(ordered_sum(partial_ptr, programs, 1, one, one < 1, MAX_PROGRAMS, 1), 0)
            if MEAN:
                total = total / tl.cast(n, ACCUMULATOR)
            tl.store(loss_ptr, narrow(total, loss_ptr.dtype.element_ty))


@triton.jit
def _backward_kernel(
    dloss_ptr,  # (n,) or one number
    x_ptr,  # (n,)
    target_ptr,  # (n,)
    dx_ptr,  # (n,)
    n,
    MEAN: tl.constexpr,
    REDUCED: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    if REDUCED:
        dloss = tl.load(dloss_ptr).to(ACCUMULATOR)
    else:
        dloss = tl.load(dloss_ptr + offsets, mask=mask, other=0.0).to(ACCUMULATOR)
    if MEAN:
        dloss = dloss / tl.cast(n, ACCUMULATOR)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACCUMULATOR)
    target = tl.load(target_ptr + offsets, mask=mask, other=0.0).to(ACCUMULATOR)
    dx = (sigmoid(x) - target) * dloss
    tl.store(dx_ptr + offsets, narrow(dx, dx_ptr.dtype.element_ty), mask=mask)


def _accumulator(x):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def forward(x, target, reduction, config):
    """x and target of one shape, contiguous -> loss of that shape, or () where reduced. One launch."""
    n = x.numel()
    reduced = reduction != "none"
    loss = x.new_empty(() if reduced else x.shape)
    if n == 0:
        return loss.fill_(float("nan") if reduction == "mean" else 0.0)
    programs = min(PROGRAMS, cdiv(n, config.block))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    _forward_kernel[(programs,)](
        x, target, loss, x.new_empty(programs, dtype=dtype) if reduced else None, tickets(x.device, 1),
        n,
        MEAN=reduction == "mean", ACCUMULATOR=_accumulator(x),
        BLOCK=config.block, MAX_PROGRAMS=PROGRAMS,
        num_warps=config.num_warps,
    )  # fmt: skip
    return loss


def backward(dloss, x, target, reduction, config):
    """dloss () or, contiguous, of x's shape; x and target as in forward -> dx of x's shape. One launch."""
    n = x.numel()
    dx = x.new_empty(x.shape)
    if n == 0:
        return dx
    _backward_kernel[(cdiv(n, config.block),)](
        dloss, x, target, dx,
        n,
        MEAN=reduction == "mean", REDUCED=reduction != "none", ACCUMULATOR=_accumulator(x),
        BLOCK=config.block,
        num_warps=config.num_warps,
    )  # fmt: skip
    return dx
