"""log-softmax and the negative log-likelihood of a target, on logits: a class index or probabilities, every option.

A unit u is one read of the logits. Forward 1u in one launch, its reduction included; backward 2u in one launch: the
logits are read again and the gradient written (probabilities: 2u and 3u, and 1u more where they want a gradient).
Saved for backward: two or three numbers a row. Forward and gradient in one launch: 2u (cross_entropy_gradient.py).

With the softmax p, every loss is Σ k_c (log s + m - x_c) for coefficients k, and its gradient p Σk - k:
    a class t     k = w_t at t; smoothed, (1 - ε) w_t at t and ε/C w everywhere
    probabilities k = w ((1 - ε) target + ε/C)
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from .class_rows import alignment, capped, numbers_of, row_losses, row_statistics, rows_along, target_of, vector_of
from .class_rows import rows_after as rows_after
from .cross_entropy_backward import backward as backward
from .cross_entropy_gradient import forward_with_gradient as forward_with_gradient
from .cross_entropy_gradient import gradient_tile as gradient_tile
from .cross_entropy_gradient import overwrite_with_gradient as overwrite_with_gradient
from .launch import launch
from .metadata import flops_each, told
from .tiles import blocks_of, finite_or_0, narrow, store_reduced
from .workspace import accumulator, around_classes, by_row, cdiv, power_of_2, row_strides, tickets, wide

PROGRAMS = 1024  # partial sums that one program can add in one tile


class Tile(NamedTuple):
    rows: int
    lanes: int
    columns: int
    num_warps: int


@lru_cache(4096)
def tile(C: int, after: int, itemsize: int, streams: int, warp_size: int) -> Tile:
    """Rows a program takes at once, how many threads share one, and the columns of one step: 32 logits a thread.

    after: how many rows follow each other in memory, 1 where classes do. streams: how many numbers a logit takes
    registers for: twice as many with probabilities, with smoothing by class weights, with a softcap.

    Forward reads a row once whether the registers hold it or not, so a row of more than 4,096 classes goes through
    them in steps. One of 32,768 that stayed there would fill a multiprocessor, which then loads or adds up, never
    both; of these programs half a dozen are there at once, and their warps wait for each other at a row's end alone.
    """
    elements, vector = (32 if itemsize < 8 else 16) // streams, 16 // itemsize
    columns = power_of_2(max(C, 16))
    if after > 1:
        return Tile(*rows_along(columns, after, elements, vector), 128 // warp_size)
    if columns <= 128 * elements:
        lanes = max(min(columns // vector, warp_size), columns // elements)
        return Tile(max(1, 128 // lanes, 2048 // columns), lanes, columns, 128 // warp_size)
    threads = 128 if columns <= 16384 else 256
    return Tile(1, threads, threads * elements, threads // warp_size)


@triton.jit(do_not_specialize=["ignore_index"], launch_metadata=told(__name__, flops_each("x_ptr", 4)))
def _forward_kernel(
    x_ptr,  # (A, C, B)
    target_ptr,  # (A, B) int64, or probabilities (A, C, B)
    weight_ptr,  # (C,) or None
    sample_weight_ptr,  # (A, B) or None
    loss_ptr,  # (A, B) or, reduced, (1,)
    lse_ptr,  # (A, B) or None
    stats_ptr,  # (2, A, B): m and s of each row, (3, A, B): Σ k too, or None
    partial_ptr,  # (programs, 2): sum of losses and of what a mean divides by, or None
    total_ptr,  # (1,): what a mean divides by, or None
    ticket_ptr,  # (1,)
    A,
    B,
    C,
    stride_xa,
    stride_xb,
    stride_xc,
    stride_ta,
    stride_tb,
    stride_tc,
    stride_weight,
    stride_sa,
    stride_sb,
    ignore_index,
    numbers,  # label smoothing, z_loss and softcap, each None where it is off
    MEAN: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    ONLINE: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    smoothing, z_loss, softcap = numbers
    SPREAD: tl.constexpr = PROBABILITIES or smoothing is not None
    C = C // ALIGNED * ALIGNED  # the same number, known to the compiler as a multiple
    stride_xb = stride_xb // ALIGNED * ALIGNED
    if PROBABILITIES:
        stride_tb = stride_tb // ALIGNED * ALIGNED
    loss_sum = tl.zeros((ROWS,), ACCUMULATOR)
    weight_sum = tl.zeros((ROWS,), ACCUMULATOR)
    blocks_b = blocks_of(B, ROWS)
    for block in range(tl.program_id(0), blocks_b * A, tl.num_programs(0)):
        a = tl.cast(block // blocks_b, tl.int64)
        b = tl.cast(block % blocks_b, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = b < B
        row = a * B + b
        x_ptrs = x_ptr + a * stride_xa + b * stride_xb
        target_ptrs = target_ptr + a * stride_ta + b * stride_tb
        target = row
        counts = mask
        x_target = tl.zeros((ROWS,), ACCUMULATOR)
        weight = tl.full((ROWS,), 1.0, ACCUMULATOR)
        if not PROBABILITIES:  # before the row, whose loads are then on their way together with these
            target = tl.load(target_ptrs, mask=mask, other=ignore_index)
            counts = mask & (target != ignore_index)
            in_range = (target >= 0) & (target < C)
            x_target = tl.load(x_ptrs + target * stride_xc, mask=mask & in_range, other=0.0).to(ACCUMULATOR)
            x_target = capped(x_target, softcap)
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + target * stride_weight, mask=mask & in_range, other=0.0).to(ACCUMULATOR)
        m, s, k_sum, kx_sum = row_statistics(
            x_ptrs, target_ptrs, weight_ptr, mask, stride_xc, stride_tc, stride_weight, smoothing, softcap, C,
            ROWS, CHUNKS, LANES, VECTOR, ONLINE, ACCUMULATOR, PROBABILITIES, SPREAD, "",
        )  # fmt: skip
        loss, lse, k_sum = row_losses(
            m, s, k_sum, kx_sum, target, x_target, weight, smoothing, z_loss, C, PROBABILITIES, ACCUMULATOR
        )
        if sample_weight_ptr is not None:
            sample_ptrs = sample_weight_ptr + a * stride_sa + b * stride_sb
            sample_weight = tl.load(sample_ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
            loss = loss * sample_weight
            weight = weight * sample_weight
        loss = tl.where(counts, loss, 0.0)
        if partial_ptr is None:
            tl.store(loss_ptr + row, narrow(loss, loss_ptr.dtype.element_ty), mask=mask)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, lse, mask=mask)
        if stats_ptr is not None:
            n = tl.cast(A, tl.int64) * B
            tl.store(stats_ptr + row, finite_or_0(m), mask=mask)
            tl.store(stats_ptr + n + row, s, mask=mask)
            if PROBABILITIES or weight_ptr is not None:
                tl.store(stats_ptr + 2 * n + row, k_sum, mask=mask)
        loss_sum += loss
        weight_sum += tl.where(counts, weight, 0.0)

    if partial_ptr is not None:
        store_reduced(loss_sum, weight_sum, partial_ptr, ticket_ptr, loss_ptr, total_ptr, MEAN, MAX_PROGRAMS)


def forward(
    x, target, weight, sample_weight, ignore_index, reduction, smoothing, z_loss, softcap, want_lse, config, save
):  # fmt: skip
    """x (C), (N, C) or (N, C, d1, ...); target as x without C (int64) or as x -> loss, lse, stats, total. One launch.

    loss () or as x without C, lse as x without C or None, stats (2 or 3, rows) or None; total (1,), what a mean
    divides by, or None where nothing is reduced.
    """
    probabilities = target.is_floating_point()
    rows_shape = (*x.shape[: min(1, x.dim() - 1)], *x.shape[2:])
    dtype = wide(x.dtype)
    reduced = reduction != "none"
    x = around_classes(x)
    A, C, B = x.shape
    loss = x.new_empty(() if reduced else rows_shape)
    lse = x.new_empty(rows_shape, dtype=dtype) if want_lse else None
    stats = x.new_empty((3 if probabilities or weight is not None else 2, A * B), dtype=dtype) if save else None
    total = x.new_empty(1, dtype=dtype) if reduced else None
    if A * B == 0:
        return loss.fill_(float("nan") if reduction == "mean" else 0.0), lse, stats, total
    target, target_strides = target_of(target, A, B)
    sample_weight, sample_strides = by_row(sample_weight, A, B)
    programs = min(PROGRAMS, A * cdiv(B, config.rows))
    aligned = alignment(x, *[target] * probabilities)
    launch(
        _forward_kernel, (programs,),
        x, target, weight, sample_weight,
        loss, lse, stats, x.new_empty((programs, 2), dtype=dtype) if reduced else None, total, tickets(x.device, 1),
        A, B, C,
        *row_strides(x), *target_strides,
        0 if weight is None else weight.stride(0), *sample_strides,
        ignore_index, numbers_of(x.dtype, smoothing, z_loss, softcap),
        MEAN=reduction == "mean", PROBABILITIES=probabilities,
        ACCUMULATOR=accumulator(dtype),
        ALIGNED=aligned, ROWS=config.rows, **vector_of(aligned, x.element_size(), config), ONLINE=config.columns < C,
        MAX_PROGRAMS=PROGRAMS,
        num_warps=config.num_warps,
    )  # fmt: skip
    return loss, lse, stats, total
