"""Loss and gradient of logits in one launch, for a gradient that comes back as 1.

A unit u is one read of the logits. A row of up to 8,192 classes stays in registers: 2u, of 3u in two launches. A wider
one is read twice, the second time from the L2 cache, where so few rows are on their way that they stay there: of the
H200's 50 MB two thirds, 132 rows of 256 KB. Float32 rows of more than 65,536 classes are more than that: up to 3u.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from .class_rows import (
    alignment,
    capped,
    coefficients,
    logits,
    numbers_of,
    row_losses,
    row_statistics,
    rows_along,
    spread_sum,
    step_cols,
    step_mask,
    target_of,
    total_of,
    vector_of,
)
from .launch import launch
from .metadata import flops_each, told
from .tiles import LOG2_E, blocks_of, finite_or_0, narrow, store_reduced
from .workspace import accumulator, around_classes, cdiv, power_of_2, row_strides, tickets, wide

WIDEST = {8: 4096}  # classes held in registers, by the logits' bytes; 8,192 for the narrower types
IN_CACHE = 34 * 2**20  # bytes of rows that are read a second time from the L2 cache
PROGRAMS = 1024  # partial sums that one program can add in one tile


class GradientTile(NamedTuple):
    rows: int
    lanes: int
    columns: int
    num_warps: int
    programs: int


@lru_cache(4096)
def gradient_tile(
    C: int, rows: int, itemsize: int, streams: int, warp_size: int, multiprocessors: int, after: int = 1
) -> GradientTile:
    """As cross_entropy.tile, and how many programs share these rows: those that a chip holds at once.

    Every program adds up all that a mean divides by, so short rows are many to a program, a warp or less to each.

    One row of 32,768 classes in registers would fill a multiprocessor, which then loads, adds up or writes, one after
    the other: up to twice the time of its bytes by the model of bench/codegen.py. So from 8,192 classes on a row is
    read again, from the cache, by programs of which four are there at once while their rows fit it.
    """
    elements, vector = (32 if itemsize < 8 else 16) // streams, 16 // itemsize
    columns = power_of_2(max(C, 16))
    threads, resident = 128, 5
    if after > 1:
        block, lanes, columns = rows_along(columns, after, elements, vector)
    elif columns <= WIDEST.get(itemsize, 8192) // streams:
        lanes = max(min(columns // vector, warp_size), columns // elements)
        most = 128 if lanes > warp_size else 512
        threads = max(lanes, min(most, max(128, power_of_2(rows // multiprocessors) * lanes)))
        block = max(threads // lanes, 2048 // columns)
        resident = {128: 5, 256: 3}.get(threads, 1)  # by 80 or so registers a thread
    else:
        lanes = threads = 256 if 4 * multiprocessors * C * itemsize <= IN_CACHE else 1024
        block, columns, resident = 1, threads * min(16, elements), 1024 // threads
    programs = max(1, min(cdiv(rows, block), multiprocessors * resident))
    return GradientTile(block, lanes, columns, threads // warp_size, programs)


@triton.jit
def _divisor(
    target_ptr, weight_ptr, sample_weight_ptr, rows, C, stride_t, stride_weight, stride_s, ignore_index,
    ACCUMULATOR: tl.constexpr, PROBABILITIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a mean divides by; every program adds it up in the same order."""
    total = tl.zeros((BLOCK,), ACCUMULATOR)
    for first in range(0, rows, BLOCK):
        row = (first + tl.arange(0, BLOCK)).to(tl.int64)
        mask = row < rows
        if not PROBABILITIES:
            target = tl.load(target_ptr + row * stride_t, mask=mask, other=ignore_index)
            mask = mask & (target != ignore_index)
        weight = tl.where(mask, 1.0, 0.0).to(ACCUMULATOR)
        if not PROBABILITIES and weight_ptr is not None:
            in_range = (target >= 0) & (target < C)
            weight_ptrs = weight_ptr + target * stride_weight
            weight = tl.load(weight_ptrs, mask=mask & in_range, other=0.0).to(ACCUMULATOR)
        if sample_weight_ptr is not None:
            weight = weight * tl.load(sample_weight_ptr + row * stride_s, mask=mask, other=0.0).to(ACCUMULATOR)
        total += weight
    return tl.sum(total, 0)


@triton.jit
def _store_gradient(
    dx_ptrs, e, e_scale, x, k, k_scale, target, target_scale, first, mask, counts, softcap,
    CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, PROBABILITIES: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """e_scale e - k_scale k, and less by target_scale at the target; times the softcap's derivative.

    Where a row is ignored, the scales are 0, and e, which may be NaN, is so too.
    """
    dx = tl.where(counts[None, :, None, None], e, 0.0) * e_scale[None, :, :, None]
    if SPREAD:
        k_scale = k_scale[None, :, None, None]
        dx -= k_scale if k is None else k * k_scale
    if not PROBABILITIES:
        lanes = tl.arange(0, LANES)[None, None, :, None] * VECTOR
        ahead = (target[None, :, None, None] - first - lanes).to(tl.int32)  # so that a logit is told by constants
        hit = ahead == tl.arange(0, CHUNKS)[:, None, None, None] * LANES * VECTOR + tl.arange(0, VECTOR)
        dx -= tl.where(hit, target_scale[None, :, None, None], 0.0)
    if softcap is not None:
        y = x * (1.0 / softcap)
        dx = tl.where(counts[None, :, None, None], dx * (1.0 - y * y), 0.0)
    tl.store(dx_ptrs, narrow(dx, dx_ptrs.dtype.element_ty), mask=mask, cache_modifier=".cs")


@triton.jit
def _step_gradient(
    first, x_ptrs, dx_ptrs, target_ptrs, weight_ptr, mask_rows, counts, base, p_scale, k_scale, target, target_scale,
    stride_xc, stride_dxc, stride_tc, stride_weight, smoothing, softcap, C,
    CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ACCUMULATOR: tl.constexpr,
    PROBABILITIES: tl.constexpr, SPREAD: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A step of a row that is read a second time."""
    cols = first + step_cols(CHUNKS, LANES, VECTOR)
    mask = step_mask(mask_rows, cols, C, WHOLE)
    col = cols.to(tl.int64)
    x = logits(x_ptrs[None, :, None, None] + col * stride_xc, mask, softcap, ACCUMULATOR, WHOLE, "evict_first")
    e = tl.exp2((x - base[None, :, None, None]) * LOG2_E)
    k = None
    if SPREAD:
        weight_ptrs = None if weight_ptr is None else weight_ptr + col * stride_weight
        target_ptrs = target_ptrs[None, :, None, None] + col * stride_tc
        k = coefficients(target_ptrs, weight_ptrs, mask, smoothing, C, ACCUMULATOR, PROBABILITIES, WHOLE)
    _store_gradient(
        dx_ptrs[None, :, None, None] + col * stride_dxc, e, p_scale[:, None], x, k, k_scale, target, target_scale,
        first, mask, counts, softcap, CHUNKS, LANES, VECTOR, PROBABILITIES, SPREAD,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"], launch_metadata=told(__name__, flops_each("x_ptr", 8)))
def _kernel(
    x_ptr,  # (A, C, B)
    target_ptr,  # (A B,) int64, or probabilities (A, C, B)
    weight_ptr,  # (C,) or None
    sample_weight_ptr,  # (A B,) or None
    loss_ptr,  # (A B,) or, reduced, (1,)
    dx_ptr,  # (A, C, B), which may be x
    partial_ptr,  # (programs, 2) or None: not reduced
    total_ptr,  # (1,), what a mean divides by: reduced, written; else what gradients are divided by, or None
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
    stride_s,
    stride_dxa,
    stride_dxb,
    stride_dxc,
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
    STEP: tl.constexpr = CHUNKS * LANES * VECTOR
    C = C // ALIGNED * ALIGNED  # the same number, known to the compiler as a multiple
    stride_xb = stride_xb // ALIGNED * ALIGNED
    stride_dxb = stride_dxb // ALIGNED * ALIGNED
    if PROBABILITIES:
        stride_tb = stride_tb // ALIGNED * ALIGNED
    share = 1.0
    if smoothing is not None:
        share = smoothing / tl.cast(C, ACCUMULATOR)
    total = tl.full((), 1.0, ACCUMULATOR)
    if MEAN:
        total = _divisor(
            target_ptr, weight_ptr, sample_weight_ptr, tl.cast(A, tl.int64) * B, C, stride_tb, stride_weight, stride_s,
            ignore_index, ACCUMULATOR, PROBABILITIES, MAX_PROGRAMS,
        )  # fmt: skip
    elif partial_ptr is None and total_ptr is not None:
        total = tl.load(total_ptr)
    loss_sum = tl.zeros((ROWS,), ACCUMULATOR)
    weight_sum = tl.zeros((ROWS,), ACCUMULATOR)
    blocks_b = blocks_of(B, ROWS)
    for block in range(tl.program_id(0), blocks_b * A, tl.num_programs(0)):
        a = tl.cast(block // blocks_b, tl.int64)
        b = tl.cast(block % blocks_b, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask_rows = b < B
        row = a * B + b
        x_ptrs = x_ptr + a * stride_xa + b * stride_xb
        dx_ptrs = dx_ptr + a * stride_dxa + b * stride_dxb
        target_ptrs = target_ptr + a * stride_ta + b * stride_tb
        target = row
        counts = mask_rows
        x_target = tl.zeros((ROWS,), ACCUMULATOR)
        w_target = tl.full((ROWS,), 1.0, ACCUMULATOR)
        if not PROBABILITIES:  # before the row, which may be overwritten
            target = tl.load(target_ptr + row * stride_tb, mask=mask_rows, other=ignore_index)
            counts = mask_rows & (target != ignore_index)
            in_range = (target >= 0) & (target < C)
            x_target = tl.load(x_ptrs + target * stride_xc, mask=mask_rows & in_range, other=0.0).to(ACCUMULATOR)
            x_target = capped(x_target, softcap)
            if weight_ptr is not None:
                weight_ptrs = weight_ptr + target * stride_weight
                w_target = tl.load(weight_ptrs, mask=mask_rows & in_range, other=0.0).to(ACCUMULATOR)
        dloss = tl.zeros((ROWS,), ACCUMULATOR) + 1.0 / total
        if ONLINE:
            m, s, k_sum, kx_sum = row_statistics(
                x_ptrs, target_ptrs, weight_ptr, mask_rows, stride_xc, stride_tc, stride_weight, smoothing, softcap,
                C, ROWS, CHUNKS, LANES, VECTOR, True, ACCUMULATOR, PROBABILITIES, SPREAD, "evict_last",
            )  # fmt: skip
        else:
            cols = step_cols(CHUNKS, LANES, VECTOR)
            mask = step_mask(mask_rows, cols, C, False)
            col = cols.to(tl.int64)
            x = logits(x_ptrs[None, :, None, None] + col * stride_xc, mask, softcap, ACCUMULATOR, False, "")
            m_thread = tl.max(tl.max(x, 3), 0)
            e = tl.exp2((x - finite_or_0(m_thread)[None, :, :, None]) * LOG2_E)
            m = tl.max(m_thread, 1)
            e_scale = tl.exp2((m_thread - finite_or_0(m)[:, None]) * LOG2_E)
            s = tl.sum(total_of(e) * e_scale, 1)
            k = None
            k_sum = s
            kx_sum = s
            if SPREAD:
                k_weight_ptrs = None if weight_ptr is None else weight_ptr + col * stride_weight
                k_target_ptrs = target_ptrs[None, :, None, None] + col * stride_tc
                k = coefficients(k_target_ptrs, k_weight_ptrs, mask, smoothing, C, ACCUMULATOR, PROBABILITIES, False)
                kx_sum = tl.sum(spread_sum(k, x - finite_or_0(m)[None, :, None, None], mask, False), 1)
                k_sum = tl.zeros((ROWS,), ACCUMULATOR) + C
                if k is not None:
                    k_sum = tl.sum(total_of(tl.broadcast_to(k, x.shape)), 1)
        loss, lse, k_sum = row_losses(
            m, s, k_sum, kx_sum, target, x_target, w_target, smoothing, z_loss, C, PROBABILITIES, ACCUMULATOR
        )
        weight = w_target
        if sample_weight_ptr is not None:
            sample_weight = tl.load(sample_weight_ptr + row * stride_s, mask=mask_rows, other=0.0).to(ACCUMULATOR)
            loss = loss * sample_weight
            weight = weight * sample_weight
            dloss = dloss * sample_weight
        loss = tl.where(counts, loss, 0.0)
        if partial_ptr is None:
            tl.store(loss_ptr + row, loss, mask=mask_rows)
        loss_sum += loss
        weight_sum += tl.where(counts, weight, 0.0)

        p_scale = k_sum
        if z_loss is not None:
            p_scale += lse * z_loss * 2.0
        if not PROBABILITIES:
            dloss = tl.where(in_range, dloss, float("nan"))
        dloss = tl.where(counts, dloss, 0.0)
        p_scale = tl.where(counts, p_scale * dloss / s, 0.0)
        k_scale = dloss
        target_scale = dloss * w_target
        if smoothing is not None and not PROBABILITIES:
            k_scale = dloss * share
            target_scale = target_scale * (1.0 - smoothing)
        if ONLINE:
            base = finite_or_0(m)
            whole = C // STEP * STEP
            for first in range(0, whole, STEP):
                _step_gradient(
                    first, x_ptrs, dx_ptrs, target_ptrs, weight_ptr, mask_rows, counts, base, p_scale, k_scale, target,
                    target_scale, stride_xc, stride_dxc, stride_tc, stride_weight, smoothing, softcap, C,
                    CHUNKS, LANES, VECTOR, ACCUMULATOR, PROBABILITIES, SPREAD, True,
                )  # fmt: skip
            if whole < C:
                _step_gradient(
                    whole, x_ptrs, dx_ptrs, target_ptrs, weight_ptr, mask_rows, counts, base, p_scale, k_scale, target,
                    target_scale, stride_xc, stride_dxc, stride_tc, stride_weight, smoothing, softcap, C,
                    CHUNKS, LANES, VECTOR, ACCUMULATOR, PROBABILITIES, SPREAD, False,
                )  # fmt: skip
        else:
            e_scale = tl.where(counts[:, None], e_scale * p_scale[:, None], 0.0)
            _store_gradient(
                dx_ptrs[None, :, None, None] + col * stride_dxc, e, e_scale, x, k, k_scale, target, target_scale,
                0, mask, counts, softcap, CHUNKS, LANES, VECTOR, PROBABILITIES, SPREAD,
            )  # fmt: skip

    if partial_ptr is not None:
        store_reduced(loss_sum, weight_sum, partial_ptr, ticket_ptr, loss_ptr, total_ptr, MEAN, MAX_PROGRAMS)


def _launch(
    x, target, weight, sample_weight, loss, dx, partial, total,
    ignore_index, mean, smoothing, z_loss, softcap, config,
):  # fmt: skip
    """x and dx (A, C, B)."""
    A, C, B = x.shape
    probabilities = target.is_floating_point()
    if probabilities:
        target, target_strides = target_of(target, A, B)
    else:
        target = target.reshape(-1)
        target_strides = 0, target.stride(0), 0
    if sample_weight is not None:
        sample_weight = sample_weight.expand(A * B) if sample_weight.dim() == 0 else sample_weight.reshape(-1)
    aligned = alignment(x, dx, *[target] * probabilities)
    launch(
        _kernel, (config.programs,),
        x, target, weight, sample_weight, loss, dx, partial, total, tickets(x.device, 1),
        A, B, C,
        *row_strides(x), *target_strides,
        0 if weight is None else weight.stride(0), 0 if sample_weight is None else sample_weight.stride(0),
        *row_strides(dx),
        ignore_index, numbers_of(x.dtype, smoothing, z_loss, softcap),
        MEAN=mean, PROBABILITIES=probabilities,
        ACCUMULATOR=accumulator(wide(x.dtype)),
        ALIGNED=aligned, ROWS=config.rows, **vector_of(aligned, x.element_size(), config), ONLINE=config.columns < C,
        MAX_PROGRAMS=PROGRAMS,
        num_warps=config.num_warps,
    )  # fmt: skip


def forward_with_gradient(
    x, target, weight, sample_weight, ignore_index, reduction, smoothing, z_loss, softcap, config
):  # fmt: skip
    """x (C), (N, C) or (N, C, d1, ...); target as x without C (int64) or as x -> loss (), dx as x. One launch.

    reduction: mean or sum. Every program adds up what a mean divides by, before it writes its first gradient.
    """
    mean, dtype = reduction == "mean", wide(x.dtype)
    dx = x.new_empty(x.shape)
    loss = x.new_empty(())
    if x.numel() == 0:
        return loss.fill_(float("nan") if mean else 0.0), dx
    partial, total = x.new_empty((config.programs, 2), dtype=dtype), x.new_empty(1, dtype=dtype)
    _launch(
        around_classes(x), target, weight, sample_weight, loss, around_classes(dx), partial, total,
        ignore_index, mean, smoothing, z_loss, softcap, config,
    )  # fmt: skip
    return loss, dx


def overwrite_with_gradient(
    x, target, weight, sample_weight, losses, total, ignore_index, smoothing, z_loss, softcap, config
):  # fmt: skip
    """x (rows, C), each row of which becomes its gradient; losses (rows,) become each row's loss. One launch.

    target (rows,) int64 or as x. Both are multiplied by sample_weight (rows,); the gradients are divided by total
    (1,), float32, where there is one.
    """
    if x.numel() == 0:
        return
    logits = around_classes(x)
    _launch(
        logits, target, weight, sample_weight, losses, logits, None, total,
        ignore_index, False, smoothing, z_loss, softcap, config,
    )  # fmt: skip
