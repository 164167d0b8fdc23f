"""log-softmax and the negative log-likelihood of a class index, on logits.

A unit u is one read of the logits. Forward 1u in one launch, its reduction included; backward 2u in one launch:
the logits are read again and the gradient written. Saved for backward: two numbers a row. A row up to `WIDEST`
classes stays in registers; a wider one goes through online statistics kept per lane, without a reduction across
lanes inside the loop.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .tiles import LOG2_E, blocks_of, finite_or_0, is_last_program, narrow, ordered_sum
from .workspace import cdiv, power_of_2, tickets

WIDEST = {8: 4096}  # classes held in registers, by the logits' bytes; 32,768 for the narrower types
PROGRAMS = 1024  # partial sums that one program can add in one tile


class Tile(NamedTuple):
    rows: int
    chunks: int
    lanes: int
    num_warps: int


@lru_cache(4096)
def tile(C: int, itemsize: int, warp_size: int) -> Tile:
    """Rows a program takes at once, and the columns of one step as (chunks, lanes)."""
    widest = WIDEST.get(itemsize, 32768)
    lanes = power_of_2(max(C, 16)) if widest >= C else 2048
    chunks = 1 if widest >= C else 4
    rows = max(1, 2048 // lanes)
    threads = min(1024, max(128, rows * chunks * lanes // 32))
    return Tile(rows, chunks, lanes, threads // warp_size)


@triton.jit
def _row_in_registers(x_ptrs, mask, ACCUMULATOR: tl.constexpr):
    """Maximum m and Σ exp(x - m) of each row of a (rows, lanes) tile."""
    x = tl.load(x_ptrs, mask=mask, other=-float("inf")).to(ACCUMULATOR)
    m = tl.max(x, 1)
    s = tl.sum(tl.exp2((x - finite_or_0(m)[:, None]) * LOG2_E), 1)
    return m, s


@triton.jit
def _row_online(x_ptr, C, stride_xc, CHUNKS: tl.constexpr, LANES: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """The same two numbers of one row, read once: each lane keeps its own maximum and sum until the end."""
    cols = tl.arange(0, CHUNKS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    m = tl.full((LANES,), -float("inf"), ACCUMULATOR)
    s = tl.zeros((LANES,), ACCUMULATOR)
    for first in range(0, C, CHUNKS * LANES):
        ptrs = x_ptr + (first + cols).to(tl.int64) * stride_xc
        x = tl.load(ptrs, mask=first + cols < C, other=-float("inf")).to(ACCUMULATOR)
        larger = tl.maximum(m, tl.max(x, 0))
        base = finite_or_0(larger)
        s = s * tl.exp2((m - base) * LOG2_E) + tl.sum(tl.exp2((x - base[None, :]) * LOG2_E), 0)
        m = larger
    row_m = tl.max(m, 0)
    return row_m, tl.sum(s * tl.exp2((m - finite_or_0(row_m)) * LOG2_E), 0)


@triton.jit(do_not_specialize=["ignore_index"])
def _forward_kernel(
    x_ptr,  # (N, C)
    target_ptr,  # (N,) int64
    loss_ptr,  # (N,) or, reduced, (1,)
    stats_ptr,  # (2, N): m and s of each row, or None
    partial_ptr,  # (programs, 2): sum of losses and number of rows that count, or None
    count_ptr,  # (1,): the number of rows that count, or None
    ticket_ptr,  # (1,)
    N,
    C,
    stride_xn,
    stride_xc,
    stride_target,
    ignore_index,
    MEAN: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    C = C // ALIGNED * ALIGNED  # the same number, known to the compiler as a multiple
    stride_xn = stride_xn // ALIGNED * ALIGNED
    programs = tl.num_programs(0)
    loss_sum = tl.zeros((ROWS,), ACCUMULATOR)
    counted = tl.zeros((ROWS,), ACCUMULATOR)
    for block in range(tl.program_id(0), blocks_of(N, ROWS), programs):
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = rows < N
        target = tl.load(target_ptr + rows * stride_target, mask=mask, other=ignore_index)
        counts = target != ignore_index
        in_range = (target >= 0) & (target < C)
        x_row_ptrs = x_ptr + rows * stride_xn
        if CHUNKS == 1:
            cols = tl.arange(0, LANES)
            x_ptrs = x_row_ptrs[:, None] + cols[None, :].to(tl.int64) * stride_xc
            m, s = _row_in_registers(x_ptrs, mask[:, None] & (cols[None, :] < C), ACCUMULATOR)
        else:
            row_ptr = x_ptr + tl.cast(block, tl.int64) * stride_xn
            row_m, row_s = _row_online(row_ptr, C, stride_xc, CHUNKS, LANES, ACCUMULATOR)
            m = tl.full((ROWS,), 0, ACCUMULATOR) + row_m
            s = tl.full((ROWS,), 0, ACCUMULATOR) + row_s
        picked = tl.load(x_row_ptrs + target * stride_xc, mask=mask & in_range, other=0.0).to(ACCUMULATOR)
        loss = tl.where(in_range, (m - picked) + tl.log(s), float("nan"))
        loss = tl.where(counts, loss, 0.0)
        if stats_ptr is not None:
            tl.store(stats_ptr + rows, m, mask=mask)
            tl.store(stats_ptr + N + rows, s, mask=mask)
        if partial_ptr is None:
            tl.store(loss_ptr + rows, narrow(loss, loss_ptr.dtype.element_ty), mask=mask)
        loss_sum += loss
        counted += counts.to(ACCUMULATOR)

    if partial_ptr is not None:
        mine = partial_ptr + 2 * tl.program_id(0)
        tl.store(mine, tl.sum(loss_sum, 0))
        tl.store(mine + 1, tl.sum(counted, 0))
        if is_last_program(ticket_ptr, programs):
            which = tl.arange(0, 2)
            sums = ordered_sum(partial_ptr, programs, 2, which, which < 2, MAX_PROGRAMS, 2)
            count = tl.sum(tl.where(which == 1, sums, 0.0), 0)
            total = tl.sum(tl.where(which == 0, sums, 0.0), 0)
            if MEAN:
                total = total / count
            tl.store(loss_ptr, narrow(total, loss_ptr.dtype.element_ty))
            tl.store(count_ptr, count)


@triton.jit(do_not_specialize=["ignore_index"])
def _backward_kernel(
    dloss_ptr,  # (N,) or one number
    x_ptr,  # (N, C)
    target_ptr,  # (N,) int64
    stats_ptr,  # (2, N)
    count_ptr,  # (1,) or None
    dx_ptr,  # (N, C), rows contiguous
    N,
    C,
    stride_dloss,
    stride_xn,
    stride_xc,
    stride_target,
    ignore_index,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    C = C // ALIGNED * ALIGNED
    stride_xn = stride_xn // ALIGNED * ALIGNED
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask_rows = rows < N
    mask = mask_rows[:, None] & (cols < C)[None, :]
    target = tl.load(target_ptr + rows * stride_target, mask=mask_rows, other=ignore_index)
    m = tl.load(stats_ptr + rows, mask=mask_rows, other=0.0)
    s = tl.load(stats_ptr + N + rows, mask=mask_rows, other=1.0)
    dloss = tl.load(dloss_ptr + rows * stride_dloss, mask=mask_rows, other=0.0).to(m.dtype)
    if count_ptr is not None:
        dloss = dloss / tl.load(count_ptr)
    dloss = tl.where((target >= 0) & (target < C), dloss, float("nan"))
    x_ptrs = x_ptr + rows[:, None] * stride_xn + cols[None, :] * stride_xc
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(m.dtype)
    p = tl.exp2((x - m[:, None]) * LOG2_E) / s[:, None]
    dx = tl.where(cols[None, :] == target[:, None], p - 1.0, p) * dloss[:, None]
    dx = tl.where((target != ignore_index)[:, None], dx, 0.0)
    tl.store(dx_ptr + rows[:, None] * C + cols[None, :], narrow(dx, dx_ptr.dtype.element_ty), mask=mask)


def _alignment(x):
    """What divides a row's length and stride, up to 16: the JIT itself asks for 16 alone, and 1000 is 8 times 125."""
    return math.gcd(x.shape[1], x.stride(0), 16)


def forward(x, target, ignore_index, reduction, config, save):
    """x (N, C), target (N,) -> loss (N,) or (), stats (2, N) or None, count (1,) or None. One launch."""
    N, C = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    reduced = reduction != "none"
    loss = x.new_empty(() if reduced else (N,))
    stats = x.new_empty((2, N), dtype=dtype) if save else None
    count = x.new_empty(1, dtype=dtype) if reduced else None
    if N == 0:
        return loss.fill_(float("nan") if reduction == "mean" else 0.0), stats, count
    programs = min(PROGRAMS, cdiv(N, config.rows))
    _forward_kernel[(programs,)](
        x, target, loss, stats, x.new_empty((programs, 2), dtype=dtype) if reduced else None, count,
        tickets(x.device, 1),
        N, C,
        *x.stride(), target.stride(0), ignore_index,
        MEAN=reduction == "mean", ACCUMULATOR=tl.float64 if dtype == torch.float64 else tl.float32,
        ALIGNED=_alignment(x), ROWS=config.rows, CHUNKS=config.chunks, LANES=config.lanes,
        MAX_PROGRAMS=PROGRAMS,
        num_warps=config.num_warps,
    )  # fmt: skip
    return loss, stats, count


def backward(dloss, x, target, stats, count, ignore_index, config):
    """dloss () or (N,), and what forward took and gave -> dx (N, C). `count` is given for a mean. One launch."""
    N, C = x.shape
    dx = x.new_empty((N, C))
    if dx.numel() == 0:
        return dx
    lanes = min(config.lanes, 4096)
    rows = max(1, 4096 // lanes)
    _backward_kernel[cdiv(N, rows), cdiv(C, lanes)](
        dloss, x, target, stats, count, dx,
        N, C,
        dloss.stride(0) if dloss.dim() else 0, *x.stride(), target.stride(0), ignore_index,
        ALIGNED=_alignment(x), ROWS=rows, LANES=lanes,
        num_warps=4,
    )  # fmt: skip
    return dx
