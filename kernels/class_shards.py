"""log-softmax and the negative log-likelihood of a class where each process holds the logits of some of the classes.

A unit u is one read of a process's logits. Forward 1u: what is left of a row is three numbers, five with smoothing,
which the processes exchange, and one launch more combines those of all, 12 or 20 bytes for a row and process. The
gradient of a process's logits is cross_entropy_backward.py's, 2u.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .class_rows import alignment, capped, numbers_of, of_all_tiles, row_losses, row_statistics, vector_of
from .launch import launch
from .metadata import flops_each, told
from .tiles import blocks_of, finite_or_0, narrow, store_reduced
from .workspace import around_classes, by_row, cdiv, power_of_2, row_strides, tickets, wide

PROGRAMS = 1024  # partial sums that one program can add in one tile


class Tile(NamedTuple):
    """How slices are combined: so many rows by so many slices at once."""

    rows: int
    slices: int
    num_warps: int


def tile(slices: int) -> Tile:
    """Four or eight numbers of each kind a thread: few rows, so that those of one batch are enough programs."""
    at_once = min(64, power_of_2(slices))
    return Tile(512 // at_once, at_once, 2)


@triton.jit(do_not_specialize=["first", "ignore_index"], launch_metadata=told(__name__, flops_each("x_ptr", 4)))
def _statistics_kernel(
    x_ptr,  # (A, C, B)
    target_ptr,  # (A, B) int64
    weight_ptr,  # (C,), of this slice's classes, or None
    numbers_ptr,  # (3, A, B): m, s, the target's logit; SPREAD, (5, A, B): m, s, Σ k (x - m), Σ k, the target's logit
    A,
    B,
    C,
    stride_xa,
    stride_xb,
    stride_xc,
    stride_ta,
    stride_tb,
    stride_weight,
    first,
    ignore_index,
    numbers,  # softcap, None where it is off
    SPREAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    ONLINE: tl.constexpr,
):  # fmt: skip
    (softcap,) = numbers
    ACCUMULATOR: tl.constexpr = numbers_ptr.dtype.element_ty
    C = C // ALIGNED * ALIGNED  # the same number, known to the compiler as a multiple
    stride_xb = stride_xb // ALIGNED * ALIGNED
    blocks_b = blocks_of(B, ROWS)
    a = tl.cast(tl.program_id(0) // blocks_b, tl.int64)
    b = tl.cast(tl.program_id(0) % blocks_b, tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = b < B
    x_ptrs = x_ptr + a * stride_xa + b * stride_xb
    target = tl.load(target_ptr + a * stride_ta + b * stride_tb, mask=mask, other=ignore_index)
    col = target - first
    own = mask & (target != ignore_index) & (col >= 0) & (col < C)
    x_target = capped(tl.load(x_ptrs + col * stride_xc, mask=own, other=0.0).to(ACCUMULATOR), softcap)
    m, s, k_sum, kx_sum = row_statistics(
        x_ptrs, x_ptrs, weight_ptr, mask, stride_xc, 0, stride_weight, None, softcap, C,
        ROWS, CHUNKS, LANES, VECTOR, ONLINE, ACCUMULATOR, False, SPREAD, "",
    )  # fmt: skip
    n = tl.cast(A, tl.int64) * B
    ptrs = numbers_ptr + a * B + b
    tl.store(ptrs, m, mask=mask)
    tl.store(ptrs + n, s, mask=mask)
    if SPREAD:
        tl.store(ptrs + 2 * n, kx_sum, mask=mask)
        tl.store(ptrs + 3 * n, k_sum, mask=mask)
    tl.store(ptrs + (4 if SPREAD else 2) * n, x_target, mask=mask)


@triton.jit(do_not_specialize=["slices", "ignore_index"], launch_metadata=told(__name__))
def _combine_kernel(
    gathered_ptr,  # (slices, 3 or 5, M), as from the statistics
    target_ptr,  # (M,) int64
    weight_ptr,  # (C,) or None
    sample_weight_ptr,  # (M,) or None
    loss_ptr,  # (M,) or, reduced, (1,)
    lse_ptr,  # (M,) or None
    stats_ptr,  # (2, M): m and s of each row, (3, M): Σ k too, or None
    partial_ptr,  # (programs, 2): sum of losses and of what a mean divides by, or None
    total_ptr,  # (1,): what a mean divides by, or None
    ticket_ptr,  # (1,)
    M,
    C,
    slices,
    stride_target,
    stride_weight,
    stride_sample,
    ignore_index,
    numbers,  # label smoothing and z_loss, each None where it is off
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    smoothing, z_loss = numbers
    ACCUMULATOR: tl.constexpr = gathered_ptr.dtype.element_ty
    SPREAD: tl.constexpr = smoothing is not None
    EACH: tl.constexpr = 5 if SPREAD else 3  # numbers of a row and slice
    n = tl.cast(M, tl.int64)
    loss_sum = tl.zeros((ROWS,), ACCUMULATOR)
    weight_sum = tl.zeros((ROWS,), ACCUMULATOR)
    for block in range(tl.program_id(0), blocks_of(M, ROWS), tl.num_programs(0)):
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = rows < M
        m, s, kx_sum, k_sum = of_all_tiles(gathered_ptr, rows, mask, EACH * n, slices, n, SPREAD, ROWS, SLICES)
        x_target = tl.zeros((ROWS,), ACCUMULATOR)
        for from_slice in range(0, slices, SLICES):
            which = from_slice + tl.arange(0, SLICES)
            here = (which < slices)[:, None] & mask[None, :]
            ptrs = gathered_ptr + (EACH - 1) * n + which[:, None] * (EACH * n) + rows[None, :]
            x_target += tl.sum(tl.load(ptrs, mask=here, other=0.0), 0)
        target = tl.load(target_ptr + rows * stride_target, mask=mask, other=ignore_index)
        counts = mask & (target != ignore_index)
        weight = tl.full((ROWS,), 1.0, ACCUMULATOR)
        if weight_ptr is not None:
            in_range = (target >= 0) & (target < C)
            weight = tl.load(weight_ptr + target * stride_weight, mask=mask & in_range, other=0.0).to(ACCUMULATOR)
        loss, lse, k_sum = row_losses(
            m, s, k_sum, kx_sum, target, x_target, weight, smoothing, z_loss, C, False, ACCUMULATOR
        )
        if sample_weight_ptr is not None:
            sample_weight = tl.load(sample_weight_ptr + rows * stride_sample, mask=mask, other=0.0).to(ACCUMULATOR)
            loss = loss * sample_weight
            weight = weight * sample_weight
        loss = tl.where(counts, loss, 0.0)
        if partial_ptr is None:
            tl.store(loss_ptr + rows, narrow(loss, loss_ptr.dtype.element_ty), mask=mask)
        if lse_ptr is not None:
            tl.store(lse_ptr + rows, lse, mask=mask)
        if stats_ptr is not None:
            tl.store(stats_ptr + rows, finite_or_0(m), mask=mask)
            tl.store(stats_ptr + n + rows, s, mask=mask)
            if weight_ptr is not None:
                tl.store(stats_ptr + 2 * n + rows, k_sum, mask=mask)
        loss_sum += loss
        weight_sum += tl.where(counts, weight, 0.0)

    if partial_ptr is not None:
        store_reduced(loss_sum, weight_sum, partial_ptr, ticket_ptr, loss_ptr, total_ptr, MEAN, MAX_PROGRAMS)


def statistics(x, target, weight, first, ignore_index, spread, softcap, config):
    """x (C), (N, C) or (N, C, d1, ...), the classes from `first` on; target as x without C, weight of all classes.

    Returns (3, rows), or (5, rows) where k is `spread` over all classes, in float32 or wider. config: cross_entropy's.
    One launch, none of an empty slice or of no rows.
    """
    x = around_classes(x)
    A, C, B = x.shape
    numbers = x.new_empty((5 if spread else 3, A * B), dtype=wide(x.dtype))
    if x.numel() == 0:
        numbers.zero_()[0].fill_(-float("inf"))
        return numbers
    target, target_strides = by_row(target, A, B)
    weight = weight[first : first + C] if weight is not None and spread else None
    aligned = alignment(x)
    launch(
        _statistics_kernel, (A * cdiv(B, config.rows),),
        x, target, weight, numbers,
        A, B, C,
        *row_strides(x), *target_strides, 0 if weight is None else weight.stride(0),
        first, ignore_index, numbers_of(x.dtype, softcap),
        SPREAD=spread,
        ALIGNED=aligned, ROWS=config.rows, **vector_of(aligned, x.element_size(), config), ONLINE=config.columns < C,
        num_warps=config.num_warps,
    )  # fmt: skip
    return numbers


def combined(
    gathered, target, weight, sample_weight, classes,
    ignore_index, reduction, smoothing, z_loss, want_lse, save, dtype,
):  # fmt: skip
    """gathered (slices, 3 or 5, rows), target of any shape of so many rows -> loss, lse, stats, total. One launch.

    The loss is in `dtype`, all else as gathered; each as from cross_entropy.forward.
    """
    slices, _, M = gathered.shape
    reduced = reduction != "none"
    loss = gathered.new_empty(() if reduced else target.shape, dtype=dtype)
    lse = gathered.new_empty(target.shape) if want_lse else None
    stats = gathered.new_empty((2 if weight is None else 3, M)) if save else None
    total = gathered.new_empty(1) if reduced else None
    target = target.reshape(M)
    sample_weight = None if sample_weight is None else sample_weight.reshape(M)
    config = tile(slices)
    programs = min(PROGRAMS, cdiv(M, config.rows))
    launch(
        _combine_kernel, (programs,),
        gathered, target, weight, sample_weight,
        loss, lse, stats, gathered.new_empty((programs, 2)) if reduced else None, total, tickets(gathered.device, 1),
        M, classes, slices,
        target.stride(0), 0 if weight is None else weight.stride(0),
        0 if sample_weight is None else sample_weight.stride(0),
        ignore_index, numbers_of(gathered.dtype, smoothing, z_loss),
        MEAN=reduction == "mean", ROWS=config.rows, SLICES=config.slices, MAX_PROGRAMS=PROGRAMS,
        num_warps=config.num_warps,
    )  # fmt: skip
    return loss, lse, stats, total
