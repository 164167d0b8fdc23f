"""The elementwise half of a linear layer's backward: dz, db and the slope's gradient in one pass.

Bytes: dy and the saved output (or pre-activation) once, dz once, so 3 M N; the column sums add two rows per
program. One launch: each program sums its own rows, and the last to finish in a block of columns sums those
partials in the order of the programs, so that the result is the same in every run.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from .activations import prelu_slope_grad
from .linear import slope_stride
from .tiles import is_last_program, narrow, ordered_sum
from .workspace import as_arguments, cdiv, power_of_2, tickets, wide

PROGRAMS = 1024  # enough to fill any chip in view several times


class Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int


@lru_cache(4096)
def tile(M: int, N: int, itemsize: int) -> Tile:
    """Wide enough that a warp reads whole 128-byte lines, where there are so many columns; short where rows are few."""
    widest = 64 if itemsize == 8 else 128
    block_n = min(widest, power_of_2(max(N, 16)))
    return Tile(16 if M <= 16 or itemsize == 8 else 32, block_n, 4)


@triton.jit
def _backward_kernel(
    dy_ptr,  # (M, N)
    saved_ptr,  # (M, N), rows contiguous: y or z
    slope_ptr,  # (N,) or None
    dz_ptr,  # (M, N), rows contiguous
    db_ptr,  # (N,) or None
    dslope_ptr,  # (N,) or (1,) or None
    partial_ptr,  # (2, programs along M, N): sums of dz, sums for the slope
    tickets_ptr,  # (programs along N + 1,)
    M,
    N,
    rows_per_program,
    stride_dym,
    stride_dyn,
    stride_slope,
    act_params,  # a tuple; the name `params` is taken by the function that Triton makes of the signature
    ACT_GRAD: tl.constexpr,
    ONE_SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    programs_m = tl.num_programs(1)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < N
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    db = tl.zeros((BLOCK_M, BLOCK_N), dtype)
    dslope = tl.zeros((BLOCK_M, BLOCK_N), dtype)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + cols * stride_slope, mask=mask_n, other=0.0).to(dtype)

    start = pid_m.to(tl.int64) * rows_per_program
    for first in range(0, rows_per_program, BLOCK_M):
        rows = start + first + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & mask_n[None, :]
        dy_ptrs = dy_ptr + rows[:, None] * stride_dym + cols[None, :] * stride_dyn
        offsets = rows[:, None] * N + cols[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(dtype)
        saved = tl.load(saved_ptr + offsets, mask=mask, other=0.0).to(dtype)
        if slope_ptr is not None:
            dz = ACT_GRAD(dy, saved, slope[None, :])
        else:
            dz = ACT_GRAD(dy, saved, *act_params)
        tl.store(dz_ptr + offsets, narrow(dz, dz_ptr.dtype.element_ty), mask=mask)
        if db_ptr is not None:
            db += tl.where(mask, dz, 0.0)
        if dslope_ptr is not None:
            dslope += tl.where(mask, prelu_slope_grad(dy, saved), 0.0)

    row = pid_m.to(tl.int64) * N
    slope_partial_ptr = partial_ptr + programs_m.to(tl.int64) * N
    if db_ptr is not None:
        tl.store(partial_ptr + row + cols, tl.sum(db, 0), mask=mask_n)
    if dslope_ptr is not None:
        tl.store(slope_partial_ptr + row + cols, tl.sum(dslope, 0), mask=mask_n)
    if (db_ptr is not None) | (dslope_ptr is not None):
        if is_last_program(tickets_ptr + pid_n, programs_m):
            if db_ptr is not None:
                db_sum = ordered_sum(partial_ptr, programs_m, N, cols, mask_n, BLOCK_M, BLOCK_N)
                tl.store(db_ptr + cols, narrow(db_sum, db_ptr.dtype.element_ty), mask=mask_n)
            if dslope_ptr is not None:
                slope_sum = ordered_sum(slope_partial_ptr, programs_m, N, cols, mask_n, BLOCK_M, BLOCK_N)
                if ONE_SLOPE:
                    _sum_over_columns(
                        slope_partial_ptr, dslope_ptr, tickets_ptr, pid_n, tl.sum(slope_sum, 0),
                        BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                else:
                    tl.store(dslope_ptr + cols, narrow(slope_sum, dslope_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _sum_over_columns(
    partial_ptr, dslope_ptr, tickets_ptr, pid_n, block_sum, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One slope: each block of columns leaves its sum in its own first partial; the last block adds them."""
    programs_n = tl.num_programs(0)
    tl.debug_barrier()
    tl.store(partial_ptr + pid_n.to(tl.int64) * BLOCK_N, block_sum)
    if is_last_program(tickets_ptr + programs_n, programs_n):
        lanes = tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_M,), partial_ptr.dtype.element_ty)
        for first in range(0, programs_n, BLOCK_M):
            block = (first + lanes).to(tl.int64)
            ptrs = partial_ptr + block * BLOCK_N
            total += tl.load(ptrs, mask=block < programs_n, other=0.0, cache_modifier=".cg")
        tl.store(dslope_ptr, narrow(tl.sum(total, 0), dslope_ptr.dtype.element_ty))


def backward(dy, saved, act_grad, params, slope, want_db, want_dslope, config):
    """dy (M, N), saved (M, N) -> dz (M, N), db (N,) or None, dslope as slope or None. One launch."""
    M, N = saved.shape
    dz = saved.new_empty((M, N))
    db = saved.new_empty(N) if want_db else None
    dslope = slope.new_empty(slope.shape) if want_dslope else None
    if dz.numel() == 0:
        return dz, db if db is None else db.zero_(), dslope if dslope is None else dslope.zero_()
    programs_n = cdiv(N, config.block_n)
    wanted = min(cdiv(M, config.block_m), max(1, PROGRAMS // programs_n))
    rows = cdiv(cdiv(M, wanted), config.block_m) * config.block_m
    programs_m = cdiv(M, rows)
    dtype = wide(saved.dtype)
    partial = saved.new_empty((2, programs_m, N), dtype=dtype)
    _backward_kernel[programs_n, programs_m](
        dy, saved, slope, dz, db, dslope, partial, tickets(saved.device, programs_n + 1),
        M, N, rows,
        *dy.stride(), slope_stride(slope),
        as_arguments(params, saved.dtype),
        ACT_GRAD=act_grad, ONE_SLOPE=slope is not None and slope.numel() == 1,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps,
    )  # fmt: skip
    return dz, db, dslope
