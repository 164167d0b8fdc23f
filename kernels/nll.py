"""The negative log-likelihood of a class index, on log-probabilities.

Forward reads one number a row, in one launch, its reduction included. Backward writes the gradient, zero but for one
number a row, and reads no log-probability: 1u in one launch, where a unit u is one read of the log-probabilities.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import launch
from .metadata import told
from .tiles import blocks_of, narrow, store_reduced
from .workspace import accumulator, around_classes, by_row, cdiv, gradient_block, row_strides, tickets, wide

PROGRAMS = 1024  # partial sums that one program can add in one tile


class Tile(NamedTuple):
    block: int
    num_warps: int


def tile() -> Tile:
    return Tile(256, 4)


@triton.jit
def _weights(weight_ptr, stride_weight, target, mask, ACCUMULATOR: tl.constexpr):
    """Of each row's class; 1 without weights."""
    weight = tl.where(mask, 1.0, 1.0).to(ACCUMULATOR)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + target * stride_weight, mask=mask, other=0.0).to(ACCUMULATOR)
    return weight


@triton.jit(do_not_specialize=["ignore_index"], launch_metadata=told(__name__, untouched=("logp_ptr",)))
def _forward_kernel(
    logp_ptr,  # (A, C, B)
    target_ptr,  # (A, B) int64
    weight_ptr,  # (C,) or None
    loss_ptr,  # (A, B) or, reduced, (1,)
    partial_ptr,  # (programs, 2): sum of losses and of weights, or None
    total_ptr,  # (1,): sum of weights, or None
    ticket_ptr,  # (1,)
    A,
    B,
    C,
    stride_xa,
    stride_xb,
    stride_xc,
    stride_ta,
    stride_tb,
    stride_weight,
    ignore_index,
    MEAN: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    programs = tl.num_programs(0)
    loss_sum = tl.zeros((BLOCK,), ACCUMULATOR)
    weight_sum = tl.zeros((BLOCK,), ACCUMULATOR)
    blocks_b = blocks_of(B, BLOCK)
    for block in range(tl.program_id(0), blocks_b * A, programs):
        a = tl.cast(block // blocks_b, tl.int64)
        b = tl.cast(block % blocks_b, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = b < B
        target = tl.load(target_ptr + a * stride_ta + b * stride_tb, mask=mask, other=ignore_index)
        counts = target != ignore_index
        in_range = mask & (target >= 0) & (target < C)
        logp_ptrs = logp_ptr + a * stride_xa + b * stride_xb + target * stride_xc
        logp = tl.load(logp_ptrs, mask=in_range & counts, other=0.0).to(ACCUMULATOR)
        weight = _weights(weight_ptr, stride_weight, target, in_range, ACCUMULATOR)
        loss = tl.where(in_range, -logp * weight, float("nan"))
        loss = tl.where(counts, loss, 0.0)
        if partial_ptr is None:
            tl.store(loss_ptr + a * B + b, narrow(loss, loss_ptr.dtype.element_ty), mask=mask)
        loss_sum += loss
        weight_sum += tl.where(counts, weight, 0.0)

    if partial_ptr is not None:
        store_reduced(loss_sum, weight_sum, partial_ptr, ticket_ptr, loss_ptr, total_ptr, MEAN, MAX_PROGRAMS)


@triton.jit(do_not_specialize=["ignore_index"], launch_metadata=told(__name__))
def _backward_kernel(
    dloss_ptr,  # (A, B) or one number
    target_ptr,  # (A, B) int64
    weight_ptr,  # (C,) or None
    total_ptr,  # (1,) or None
    dlogp_ptr,  # (A, C, B)
    A,
    B,
    C,
    stride_dloss_a,
    stride_dloss_b,
    stride_ta,
    stride_tb,
    stride_weight,
    stride_dxa,
    stride_dxb,
    stride_dxc,
    ignore_index,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    blocks_b = blocks_of(B, ROWS)
    a = (tl.program_id(0) // blocks_b).to(tl.int64)
    b = (tl.program_id(0) % blocks_b).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask_b = b < B
    target = tl.load(target_ptr + a * stride_ta + b * stride_tb, mask=mask_b, other=ignore_index)
    dloss = tl.load(dloss_ptr + a * stride_dloss_a + b * stride_dloss_b, mask=mask_b, other=0.0).to(ACCUMULATOR)
    if total_ptr is not None:
        dloss = dloss / tl.load(total_ptr)
    in_range = mask_b & (target >= 0) & (target < C)
    dloss = -dloss * _weights(weight_ptr, stride_weight, target, in_range, ACCUMULATOR)
    elsewhere = tl.where(in_range | (target == ignore_index), 0.0, float("nan")).to(ACCUMULATOR)
    here = (cols[None, :] == target[:, None]) & (target != ignore_index)[:, None]
    dlogp = tl.where(here, dloss[:, None], elsewhere[:, None])
    dlogp_ptrs = dlogp_ptr + a * stride_dxa + b[:, None] * stride_dxb + cols[None, :] * stride_dxc
    mask = mask_b[:, None] & (cols < C)[None, :]
    tl.store(dlogp_ptrs, narrow(dlogp, dlogp_ptr.dtype.element_ty), mask=mask)


def forward(logp, target, weight, ignore_index, reduction, config):
    """logp (C), (N, C) or (N, C, d1, ...), target int64 as logp without C -> loss and what a mean divides by (1,).

    loss () or as target; the divisor is None where nothing is reduced. One launch.
    """
    reduced = reduction != "none"
    dtype = wide(logp.dtype)
    loss = logp.new_empty(() if reduced else target.shape)
    total = logp.new_empty(1, dtype=dtype) if reduced else None
    if target.numel() == 0:
        return loss.fill_(float("nan") if reduction == "mean" else 0.0), total
    x = around_classes(logp)
    A, C, B = x.shape
    target, target_strides = by_row(target, A, B)
    programs = min(PROGRAMS, A * cdiv(B, config.block))
    launch(
        _forward_kernel, (programs,),
        x, target, weight, loss, x.new_empty((programs, 2), dtype=dtype) if reduced else None, total,
        tickets(x.device, 1),
        A, B, C,
        *row_strides(x), *target_strides, 0 if weight is None else weight.stride(0),
        ignore_index,
        MEAN=reduction == "mean", ACCUMULATOR=accumulator(x.dtype),
        BLOCK=config.block, MAX_PROGRAMS=PROGRAMS,
        num_warps=config.num_warps,
    )  # fmt: skip
    return loss, total


def backward(dloss, logp, target, weight, total, ignore_index):
    """dloss () or as target, and what forward took and gave; `total` for a mean -> dlogp as logp. One launch."""
    dlogp = logp.new_empty(logp.shape)
    if dlogp.numel() == 0:
        return dlogp
    x = around_classes(dlogp)
    A, C, B = x.shape
    (dloss, dloss_strides), (target, target_strides) = by_row(dloss, A, B), by_row(target, A, B)
    rows, lanes = gradient_block(C, 1 if x.stride(1) == 1 else B)
    launch(
        _backward_kernel, (A * cdiv(B, rows), cdiv(C, lanes)),
        dloss, target, weight, total, dlogp,
        A, B, C,
        *dloss_strides, *target_strides, 0 if weight is None else weight.stride(0), *row_strides(x),
        ignore_index,
        ACCUMULATOR=accumulator(logp.dtype), ROWS=rows, LANES=lanes,
        num_warps=4,
    )  # fmt: skip
    return dlogp
