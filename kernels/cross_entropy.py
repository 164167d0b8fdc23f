"""log-softmax and the negative log-likelihood of a target, on logits: a class index or probabilities, every option.

A unit u is one read of the logits. Forward 1u in one launch, its reduction included; backward 2u in one launch: the
logits are read again and the gradient written (probabilities: 2u and 3u, and 1u more where they want a gradient).
Saved for backward: two or three numbers a row. A row up to `WIDEST` classes stays in registers; a wider one goes
through online statistics kept per lane, without a reduction across lanes inside the loop.

With the softmax p, every loss is Σ k_c (log s + m - x_c) for coefficients k, and its gradient p Σk - k:
    a class t     k = w_t at t; smoothed, (1 - ε) w_t at t and ε/C w everywhere
    probabilities k = w ((1 - ε) target + ε/C)
"""

import math
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from .launch import launch
from .tiles import LOG2_E, blocks_of, finite_or_0, narrow, store_reduced, tanh
from .workspace import (
    accumulator,
    around_classes,
    as_arguments,
    by_row,
    cdiv,
    gradient_block,
    power_of_2,
    row_strides,
    tickets,
    wide,
)

WIDEST = {8: 4096}  # classes held in registers, by the logits' bytes; 32,768 for the narrower types
PROGRAMS = 1024  # partial sums that one program can add in one tile
TILE = 8192  # elements a program takes at once where rows, not classes, follow each other in memory


class Tile(NamedTuple):
    rows: int
    chunks: int
    lanes: int
    num_warps: int


@lru_cache(4096)
def tile(C: int, after: int, itemsize: int, streams: int, warp_size: int) -> Tile:
    """Rows a program takes at once, and the columns of one step as (chunks, lanes).

    after: how many rows follow each other in memory, 1 where classes do. streams: how many numbers a logit takes
    registers for: twice as many with probabilities, with smoothing by class weights, with a softcap.
    """
    widest = WIDEST.get(itemsize, 32768) // streams
    lanes = power_of_2(max(C, 16)) if widest >= C else 2048
    chunks = 1 if widest >= C else max(2, 4 // streams)
    rows = max(1, 2048 // lanes)
    if after > 1 and chunks == 1:
        rows = max(1, min(power_of_2(after), 64, TILE // lanes))
    threads = min(1024, max(128, rows * chunks * lanes * min(2, streams) // 32))
    return Tile(rows, chunks, lanes, threads // warp_size)


@triton.jit
def _logits(x_ptrs, mask, softcap, ACCUMULATOR: tl.constexpr):
    x = tl.load(x_ptrs, mask=mask, other=-float("inf")).to(ACCUMULATOR)
    if softcap is not None:
        x = tl.where(mask, tanh(x / softcap) * softcap, x)
    return x


@triton.jit
def _coefficients(target_ptrs, weight_ptrs, mask, smoothing, C, ACCUMULATOR: tl.constexpr, PROBABILITIES: tl.constexpr):
    """k of probabilities; of classes w alone, which smoothing multiplies by ε/C."""
    if PROBABILITIES:
        k = tl.load(target_ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
        if smoothing is not None:
            k = tl.where(mask, k * (1.0 - smoothing) + smoothing / tl.cast(C, ACCUMULATOR), 0.0)
    else:
        k = tl.where(mask, 1.0, 0.0).to(ACCUMULATOR)
    if weight_ptrs is not None:
        k = k * tl.load(weight_ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
    return k


@triton.jit
def _rows_in_registers(
    x_ptrs, target_ptrs, weight_ptrs, mask, smoothing, softcap, C,
    ACCUMULATOR: tl.constexpr, PROBABILITIES: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Of each row of a (rows, lanes) tile: maximum m and Σ exp(x - m); SPREAD, also Σ k and Σ k (x - m)."""
    x = _logits(x_ptrs, mask, softcap, ACCUMULATOR)
    m = tl.max(x, 1)
    base = finite_or_0(m)[:, None]
    s = tl.sum(tl.exp2((x - base) * LOG2_E), 1)
    k_sum = tl.zeros_like(m)
    kx_sum = tl.zeros_like(m)
    if SPREAD:
        k = _coefficients(target_ptrs, weight_ptrs, mask, smoothing, C, ACCUMULATOR, PROBABILITIES)
        k_sum = tl.sum(k, 1)
        kx_sum = tl.sum(tl.where(mask, k * (x - base), 0.0), 1)
    return m, s, k_sum, kx_sum


@triton.jit
def _row_online(
    x_ptr, target_ptr, weight_ptr, stride_xc, stride_tc, stride_weight, smoothing, softcap, C,
    CHUNKS: tl.constexpr, LANES: tl.constexpr,
    ACCUMULATOR: tl.constexpr, PROBABILITIES: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """The same four numbers of one row, read once: each lane keeps its own until the end."""
    cols = tl.arange(0, CHUNKS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    m = tl.full((LANES,), -float("inf"), ACCUMULATOR)
    s = tl.zeros((LANES,), ACCUMULATOR)
    k_sum = tl.zeros((LANES,), ACCUMULATOR)
    kx_sum = tl.zeros((LANES,), ACCUMULATOR)
    for first in range(0, C, CHUNKS * LANES):
        col = (first + cols).to(tl.int64)
        mask = first + cols < C
        x = _logits(x_ptr + col * stride_xc, mask, softcap, ACCUMULATOR)
        larger = tl.maximum(m, tl.max(x, 0))
        base = finite_or_0(larger)
        s = s * tl.exp2((m - base) * LOG2_E) + tl.sum(tl.exp2((x - base[None, :]) * LOG2_E), 0)
        if SPREAD:
            weight_ptrs = None if weight_ptr is None else weight_ptr + col * stride_weight
            k = _coefficients(target_ptr + col * stride_tc, weight_ptrs, mask, smoothing, C, ACCUMULATOR, PROBABILITIES)
            kx_sum += (finite_or_0(m) - base) * k_sum
            kx_sum += tl.sum(tl.where(mask, k * (x - base[None, :]), 0.0), 0)
            k_sum += tl.sum(k, 0)
        m = larger
    row_m = tl.max(m, 0)
    row_base = finite_or_0(row_m)
    row_kx = tl.sum(kx_sum + (finite_or_0(m) - row_base) * k_sum, 0)
    return row_m, tl.sum(s * tl.exp2((m - row_base) * LOG2_E), 0), tl.sum(k_sum, 0), row_kx


@triton.jit(do_not_specialize=["ignore_index"])
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
    MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    smoothing, z_loss, softcap = numbers
    SPREAD: tl.constexpr = PROBABILITIES or smoothing is not None
    C = C // ALIGNED * ALIGNED  # the same number, known to the compiler as a multiple
    stride_xb = stride_xb // ALIGNED * ALIGNED
    if PROBABILITIES:
        stride_tb = stride_tb // ALIGNED * ALIGNED
    programs = tl.num_programs(0)
    loss_sum = tl.zeros((ROWS,), ACCUMULATOR)
    weight_sum = tl.zeros((ROWS,), ACCUMULATOR)
    blocks_b = blocks_of(B, ROWS)
    for block in range(tl.program_id(0), blocks_b * A, programs):
        a = tl.cast(block // blocks_b, tl.int64)
        b = tl.cast(block % blocks_b, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = b < B
        x_row_ptrs = x_ptr + a * stride_xa + b * stride_xb
        target_row_ptrs = target_ptr + a * stride_ta + b * stride_tb
        if CHUNKS == 1:
            cols = tl.arange(0, LANES).to(tl.int64)
            weight_ptrs = None if weight_ptr is None else (weight_ptr + cols * stride_weight)[None, :]
            m, s, k_sum, kx_sum = _rows_in_registers(
                x_row_ptrs[:, None] + cols[None, :] * stride_xc,
                target_row_ptrs[:, None] + cols[None, :] * stride_tc,
                weight_ptrs, mask[:, None] & (cols < C)[None, :], smoothing, softcap, C,
                ACCUMULATOR, PROBABILITIES, SPREAD,
            )  # fmt: skip
        else:
            x_row_ptr = x_ptr + a * stride_xa + tl.cast(block % blocks_b, tl.int64) * stride_xb
            target_row_ptr = target_ptr + a * stride_ta + tl.cast(block % blocks_b, tl.int64) * stride_tb
            row_m, row_s, row_k, row_kx = _row_online(
                x_row_ptr, target_row_ptr, weight_ptr, stride_xc, stride_tc, stride_weight, smoothing, softcap, C,
                CHUNKS, LANES, ACCUMULATOR, PROBABILITIES, SPREAD,
            )  # fmt: skip
            m = tl.zeros((ROWS,), ACCUMULATOR) + row_m
            s = tl.zeros((ROWS,), ACCUMULATOR) + row_s
            k_sum = tl.zeros((ROWS,), ACCUMULATOR) + row_k
            kx_sum = tl.zeros((ROWS,), ACCUMULATOR) + row_kx
        base = finite_or_0(m)
        log_s = tl.log(s)
        if PROBABILITIES:
            counts = mask
            loss = log_s * k_sum - kx_sum
            weight = tl.full((ROWS,), 1.0, ACCUMULATOR)
        else:
            target = tl.load(target_row_ptrs, mask=mask, other=ignore_index)
            counts = target != ignore_index
            in_range = (target >= 0) & (target < C)
            x_target = _logits(x_row_ptrs + target * stride_xc, mask & in_range, softcap, ACCUMULATOR)
            loss = log_s - (x_target - m)
            weight = tl.full((ROWS,), 1.0, ACCUMULATOR)
            if weight_ptr is not None:
                weight_ptrs = weight_ptr + target * stride_weight
                weight = tl.load(weight_ptrs, mask=mask & in_range, other=0.0).to(ACCUMULATOR)
                loss = loss * weight
            if smoothing is not None:
                loss = loss * (1.0 - smoothing) + (log_s * k_sum - kx_sum) * (smoothing / tl.cast(C, ACCUMULATOR))
                k_sum = k_sum * (smoothing / tl.cast(C, ACCUMULATOR)) + weight * (1.0 - smoothing)
            else:
                k_sum = weight
            loss = tl.where(in_range, loss, float("nan"))
        lse = log_s + base
        if z_loss is not None:
            loss += lse * lse * z_loss
        row = a * B + b
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
            tl.store(stats_ptr + row, base, mask=mask)
            tl.store(stats_ptr + n + row, s, mask=mask)
            if PROBABILITIES or weight_ptr is not None:
                tl.store(stats_ptr + 2 * n + row, k_sum, mask=mask)
        loss_sum += loss
        weight_sum += tl.where(counts, weight, 0.0)

    if partial_ptr is not None:
        store_reduced(loss_sum, weight_sum, partial_ptr, ticket_ptr, loss_ptr, total_ptr, MEAN, MAX_PROGRAMS)


@triton.jit(do_not_specialize=["ignore_index"])
def _backward_kernel(
    dloss_ptr,  # (A, B), one number, or None
    dlse_ptr,  # (A, B) or None
    x_ptr,  # (A, C, B)
    target_ptr,  # (A, B) int64, or probabilities (A, C, B)
    weight_ptr,  # (C,) or None
    sample_weight_ptr,  # (A, B) or None
    stats_ptr,  # as from forward
    total_ptr,  # (1,) or None
    dx_ptr,  # (A, C, B) or None
    dtarget_ptr,  # (A, C, B) or None
    A,
    B,
    C,
    stride_dloss_a,
    stride_dloss_b,
    stride_dlse_a,
    stride_dlse_b,
    stride_xa,
    stride_xb,
    stride_xc,
    stride_ta,
    stride_tb,
    stride_tc,
    stride_weight,
    stride_sa,
    stride_sb,
    stride_dxa,
    stride_dxb,
    stride_dxc,
    ignore_index,
    numbers,
    PROBABILITIES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    smoothing, z_loss, softcap = numbers
    ACCUMULATOR: tl.constexpr = stats_ptr.dtype.element_ty
    C = C // ALIGNED * ALIGNED
    stride_xb = stride_xb // ALIGNED * ALIGNED
    stride_dxb = stride_dxb // ALIGNED * ALIGNED
    if PROBABILITIES:
        stride_tb = stride_tb // ALIGNED * ALIGNED
    blocks_b = blocks_of(B, ROWS)
    a = (tl.program_id(0) // blocks_b).to(tl.int64)
    b = (tl.program_id(0) % blocks_b).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask_b = b < B
    mask = mask_b[:, None] & (cols < C)[None, :]
    row = a * B + b
    n = tl.cast(A, tl.int64) * B
    base = tl.load(stats_ptr + row, mask=mask_b, other=0.0)
    s = tl.load(stats_ptr + n + row, mask=mask_b, other=1.0)
    dloss = tl.zeros((ROWS,), ACCUMULATOR)
    if dloss_ptr is not None:
        dloss_ptrs = dloss_ptr + a * stride_dloss_a + b * stride_dloss_b
        dloss = tl.load(dloss_ptrs, mask=mask_b, other=0.0).to(ACCUMULATOR)
        if total_ptr is not None:
            dloss = dloss / tl.load(total_ptr)
        if sample_weight_ptr is not None:
            sample_ptrs = sample_weight_ptr + a * stride_sa + b * stride_sb
            dloss = dloss * tl.load(sample_ptrs, mask=mask_b, other=0.0).to(ACCUMULATOR)

    x = _logits(x_ptr + a * stride_xa + b[:, None] * stride_xb + cols[None, :] * stride_xc, mask, softcap, ACCUMULATOR)
    p = tl.exp2((x - base[:, None]) * LOG2_E) / s[:, None]
    target_ptrs = target_ptr + a * stride_ta + b * stride_tb
    counts = mask_b
    weight_ptrs = None if weight_ptr is None else (weight_ptr + cols * stride_weight)[None, :]
    if PROBABILITIES:
        target_ptrs = target_ptrs[:, None] + cols[None, :] * stride_tc
        k = _coefficients(target_ptrs, weight_ptrs, mask, smoothing, C, ACCUMULATOR, PROBABILITIES)
    else:
        target = tl.load(target_ptrs, mask=mask_b, other=ignore_index)
        counts = target != ignore_index
        in_range = (target >= 0) & (target < C)
        dloss = tl.where(in_range, dloss, float("nan"))
        k_target = tl.full((ROWS,), 1.0, ACCUMULATOR)
        if weight_ptr is not None:
            k_target = tl.load(weight_ptr + target * stride_weight, mask=in_range, other=0.0).to(ACCUMULATOR)
        if smoothing is not None:
            k = _coefficients(None, weight_ptrs, mask, None, C, ACCUMULATOR, PROBABILITIES) * (
                smoothing / tl.cast(C, ACCUMULATOR)
            )
            k_target = k_target * (1.0 - smoothing)
        else:
            k = tl.zeros((ROWS, LANES), ACCUMULATOR)
        k += tl.where(cols[None, :] == target[:, None], k_target[:, None], 0.0)

    if dx_ptr is not None:
        if PROBABILITIES or weight_ptr is not None:
            k_sum = tl.load(stats_ptr + 2 * n + row, mask=mask_b, other=0.0)
            dx = p * k_sum[:, None] - k
        else:
            dx = p - k
        if z_loss is not None:
            lse = tl.log(s) + base
            dx += p * (lse * z_loss * 2.0)[:, None]
        dx = tl.where(counts[:, None], dx * dloss[:, None], 0.0)
        if dlse_ptr is not None:
            dlse = tl.load(dlse_ptr + a * stride_dlse_a + b * stride_dlse_b, mask=mask_b, other=0.0).to(ACCUMULATOR)
            dx += p * dlse[:, None]
        if softcap is not None:
            dx = dx * (1.0 - (x / softcap) * (x / softcap))
        dx_ptrs = dx_ptr + a * stride_dxa + b[:, None] * stride_dxb + cols[None, :] * stride_dxc
        tl.store(dx_ptrs, narrow(dx, dx_ptr.dtype.element_ty), mask=mask)
    if dtarget_ptr is not None:
        dtarget = (tl.log(s)[:, None] - (x - base[:, None])) * dloss[:, None]
        if weight_ptr is not None:
            dtarget = dtarget * tl.load(weight_ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
        if smoothing is not None:
            dtarget = dtarget * (1.0 - smoothing)
        dtarget_ptrs = dtarget_ptr + a * stride_dxa + b[:, None] * stride_dxb + cols[None, :] * stride_dxc
        tl.store(dtarget_ptrs, narrow(dtarget, dtarget_ptr.dtype.element_ty), mask=mask)


def rows_after(x):
    """How many rows follow each other in memory; 1 where the classes of a row do."""
    x = around_classes(x)
    return x.shape[2] if x.stride(2) == 1 != x.stride(1) else 1


def _target(target, A, B):
    """A class for each row or, as probabilities, a number for each logit; strides along A, B and C."""
    if target.is_floating_point():
        target = around_classes(target)
        return target, row_strides(target)
    target, strides = by_row(target, A, B)
    return target, (*strides, 0)


def _alignment(*tensors):
    """What divides the length and the strides of their rows, up to 16: the JIT asks for 16, and 1000 is 8 times 125."""
    if any(t.stride(1) != 1 for t in tensors):
        return 1
    return math.gcd(tensors[0].shape[1], *(t.stride(2) for t in tensors), 16)


def _numbers(dtype, *numbers):
    """The numbers as arguments, None where the option is off."""
    return tuple(as_arguments((number,), dtype)[0] if number else None for number in numbers)


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
    target, target_strides = _target(target, A, B)
    sample_weight, sample_strides = by_row(sample_weight, A, B)
    programs = min(PROGRAMS, A * cdiv(B, config.rows))
    launch(
        _forward_kernel, (programs,),
        x, target, weight, sample_weight,
        loss, lse, stats, x.new_empty((programs, 2), dtype=dtype) if reduced else None, total, tickets(x.device, 1),
        A, B, C,
        *row_strides(x), *target_strides,
        0 if weight is None else weight.stride(0), *sample_strides,
        ignore_index, _numbers(x.dtype, smoothing, z_loss, softcap),
        MEAN=reduction == "mean", PROBABILITIES=probabilities,
        ACCUMULATOR=accumulator(dtype),
        ALIGNED=_alignment(x, *[target] * probabilities), ROWS=config.rows, CHUNKS=config.chunks, LANES=config.lanes,
        MAX_PROGRAMS=PROGRAMS,
        num_warps=config.num_warps,
    )  # fmt: skip
    return loss, lse, stats, total


def backward(
    dloss, dlse, x, target, weight, sample_weight, stats, total,
    ignore_index, smoothing, z_loss, softcap, want_dx, want_dtarget,
):  # fmt: skip
    """dloss () or a number a row or None, dlse a number a row or None, and what forward took and gave.

    `total` is given for a mean. Returns dx and the probabilities' gradient, both as x, or None. One launch.
    """
    dx = x.new_empty(x.shape) if want_dx else None
    dtarget = x.new_empty(x.shape) if want_dtarget else None
    if x.numel() == 0 or not (want_dx or want_dtarget):
        return dx, dtarget
    after = rows_after(x)
    x, gradient = around_classes(x), around_classes(dx if want_dx else dtarget)
    A, C, B = x.shape
    rows, lanes = gradient_block(C, after)
    probabilities = target.is_floating_point()
    target, target_strides = _target(target, A, B)
    (dloss, dloss_strides), (dlse, dlse_strides), (sample_weight, sample_strides) = (
        by_row(t, A, B) for t in (dloss, dlse, sample_weight)
    )
    launch(
        _backward_kernel, (A * cdiv(B, rows), cdiv(C, lanes)),
        dloss, dlse, x, target, weight, sample_weight, stats, total, dx, dtarget,
        A, B, C,
        *dloss_strides, *dlse_strides, *row_strides(x), *target_strides,
        0 if weight is None else weight.stride(0), *sample_strides,
        *row_strides(gradient),
        ignore_index, _numbers(x.dtype, smoothing, z_loss, softcap),
        PROBABILITIES=probabilities,
        ALIGNED=_alignment(x, gradient, *[target] * probabilities), ROWS=rows, LANES=lanes,
        num_warps=4,
    )  # fmt: skip
    return dx, dtarget
