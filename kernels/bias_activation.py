"""What surrounds a product: act(x + b) after it, and before its backward one pass for dz, db and the slope's gradient.

Bytes forward: 2 n. Backward: dy and the saved output (or pre-activation) once, dz once, so 3 n; the sums add two rows
per share. One launch each: a program sums its own share, and the last to finish in a block of columns sums those
partials in the order of the shares, so that the result is the same in every run.

A linear layer's rows are walked as (M, N), a convolution's channels as (before, channel, after), in their memory order.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .activations import prelu_slope_grad
from .elementwise import tile as tile_of_walk
from .elementwise import walk
from .launch import launch
from .metadata import told
from .tiles import blocks_of, is_last_program, narrow, ordered_sum
from .workspace import accumulator, as_arguments, cdiv, power_of_2, slope_stride, tickets, wide

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


@triton.jit(launch_metadata=told(__name__))
def _backward_kernel(
    dy_ptr,  # (M, N)
    saved_ptr,  # (M, N), rows contiguous: y or z
    slope_ptr,  # (N,) or None
    dz_ptr,  # (M, N), rows contiguous
    y_ptr,  # (M, N) as dz, or None
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
    ACT: tl.constexpr,
    ACT_GRAD: tl.constexpr,
    ONE_SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
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
        if y_ptr is not None:
            y = ACT(saved, slope[None, :]) if slope_ptr is not None else ACT(saved, *act_params)
            tl.store(y_ptr + offsets, narrow(y, y_ptr.dtype.element_ty), mask=mask)
        if db_ptr is not None:
            db += tl.where(mask, dz, 0.0)
        if dslope_ptr is not None:
            dslope += tl.where(mask, prelu_slope_grad(dy, saved), 0.0)

    _store_sums(
        tl.sum(db, 0), tl.sum(dslope, 0), db_ptr, dslope_ptr, partial_ptr, tickets_ptr,
        pid_m, tl.num_programs(1), pid_n, tl.num_programs(0), N, cols, ONE_SLOPE, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _store_sums(
    db, dslope, db_ptr, dslope_ptr, partial_ptr, tickets_ptr,
    share, shares, block, blocks, N, cols, ONE_SLOPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What each share summed, db and dslope (BLOCK_N,), left as partials, which the last share of the block adds."""
    store_partials(db, dslope, db_ptr, dslope_ptr, partial_ptr, share, shares, N, cols)
    add_partials(
        db_ptr, dslope_ptr, partial_ptr, tickets_ptr, shares, block, blocks, N, cols, ONE_SLOPE, BLOCK_M, BLOCK_N
    )


@triton.jit
def store_partials(db, dslope, db_ptr, dslope_ptr, partial_ptr, share, shares, N, cols):
    """A share's sums at these columns."""
    row = tl.cast(share, tl.int64) * N
    if db_ptr is not None:
        tl.store(partial_ptr + row + cols, db, mask=cols < N)
    if dslope_ptr is not None:
        slope_partial_ptr = partial_ptr + tl.cast(shares, tl.int64) * N
        tl.store(slope_partial_ptr + row + cols, dslope, mask=cols < N)


@triton.jit
def add_partials(
    db_ptr, dslope_ptr, partial_ptr, tickets_ptr, shares, block, blocks, N, cols,
    ONE_SLOPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """db and dslope at a block of columns, of its last share to come here."""
    if (db_ptr is not None) | (dslope_ptr is not None):
        if is_last_program(tickets_ptr + block, shares):
            mask = cols < N
            if db_ptr is not None:
                db_sum = ordered_sum(partial_ptr, shares, N, cols, mask, BLOCK_M, BLOCK_N)
                tl.store(db_ptr + cols, narrow(db_sum, db_ptr.dtype.element_ty), mask=mask)
            if dslope_ptr is not None:
                slope_partial_ptr = partial_ptr + tl.cast(shares, tl.int64) * N
                slope_sum = ordered_sum(slope_partial_ptr, shares, N, cols, mask, BLOCK_M, BLOCK_N)
                if ONE_SLOPE:
                    _sum_over_columns(
                        slope_partial_ptr, dslope_ptr, tickets_ptr, block, blocks, tl.sum(slope_sum, 0),
                        BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                else:
                    tl.store(dslope_ptr + cols, narrow(slope_sum, dslope_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_over_columns(
    partial_ptr, dslope_ptr, tickets_ptr, block, blocks, block_sum, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One slope: each block of columns leaves its sum in its own first partial; the last block adds them."""
    tl.debug_barrier()
    tl.store(partial_ptr + tl.cast(block, tl.int64) * BLOCK_N, block_sum)
    if is_last_program(tickets_ptr + blocks, blocks):
        lanes = tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_M,), partial_ptr.dtype.element_ty)
        for first in range(0, blocks, BLOCK_M):
            others = (first + lanes).to(tl.int64)
            total += tl.load(partial_ptr + others * BLOCK_N, mask=others < blocks, other=0.0, cache_modifier=".cg")
        tl.store(dslope_ptr, narrow(tl.sum(total, 0), dslope_ptr.dtype.element_ty))


def backward(dy, saved, act_grad, params, slope, want_db, want_dslope, config, act=None):
    """dy (M, N), saved (M, N) -> dz (M, N), db (N,) or None, dslope as slope or None. One launch.

    With `act`, where saved is z, y (M, N) as the fourth, for a fourth pass over memory.
    """
    M, N = saved.shape
    dz = saved.new_empty((M, N))
    y = None if act is None else saved.new_empty((M, N))
    db = saved.new_empty(N) if want_db else None
    dslope = slope.new_empty(slope.shape) if want_dslope else None
    results = (dz, db, dslope) if act is None else (dz, db, dslope, y)
    if dz.numel() == 0:
        for sums in (db, dslope):
            if sums is not None:
                sums.zero_()
        return results
    programs_n = cdiv(N, config.block_n)
    wanted = min(cdiv(M, config.block_m), max(1, PROGRAMS // programs_n))
    rows = cdiv(cdiv(M, wanted), config.block_m) * config.block_m
    programs_m = cdiv(M, rows)
    dtype = wide(saved.dtype)
    partial = saved.new_empty((2, programs_m, N), dtype=dtype)
    launch(
        _backward_kernel, (programs_n, programs_m),
        dy, saved, slope, dz, y, db, dslope, partial, tickets(saved.device, programs_n + 1),
        M, N, rows,
        *dy.stride(), slope_stride(slope),
        as_arguments(params, saved.dtype),
        ACT=act, ACT_GRAD=act_grad, ONE_SLOPE=slope is not None and slope.numel() == 1,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps,
    )  # fmt: skip
    return results


@triton.jit(launch_metadata=told(__name__))
def _forward_channels_kernel(
    x_ptr,  # (B, C, A)
    bias_ptr,  # (C,) or None
    slope_ptr,  # (C,) or None
    y_ptr,  # (B, C, A), of x's strides: x itself or apart from it
    B,
    C,
    A,
    stride_b,
    stride_c,
    stride_a,
    stride_bias,
    stride_slope,
    act_params,
    ACT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    tiles_a = blocks_of(A, BLOCK_A)
    tiles_c = blocks_of(C, BLOCK_C)
    rest = tl.program_id(0) // tiles_a
    b = ((rest // tiles_c).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None, None]
    c = ((rest % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :, None]
    a = ((tl.program_id(0) % tiles_a).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A))[None, None, :]
    mask = (b < B) & (c < C) & (a < A)
    offsets = b * stride_b + c * stride_c + a * stride_a
    z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACCUMULATOR)  # (BLOCK_B, BLOCK_C, BLOCK_A)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + c * stride_bias, mask=c < C, other=0.0).to(ACCUMULATOR)
    if slope_ptr is not None:
        y = ACT(z, tl.load(slope_ptr + c * stride_slope, mask=c < C, other=0.0).to(ACCUMULATOR))
    else:
        y = ACT(z, *act_params)
    tl.store(y_ptr + offsets, narrow(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(launch_metadata=told(__name__))
def _backward_channels_kernel(
    dy_ptr,  # (B, C, A)
    saved_ptr,  # (B, C, A): y or x
    bias_ptr,  # (C,): added to x; or None
    slope_ptr,  # (C,) or None
    dz_ptr,  # (B, C, A) or None
    db_ptr,  # (C,) or None
    dslope_ptr,  # (C,) or (1,) or None
    partial_ptr,  # (2, shares, C): sums of dz, sums for the slope; or None
    tickets_ptr,  # (blocks of C + 1,) or None
    B,
    C,
    A,
    tiles_per_share,
    stride_dzb,
    stride_dzc,
    stride_dza,
    stride_dyb,
    stride_dyc,
    stride_dya,
    stride_sb,
    stride_sc,
    stride_sa,
    stride_bias,
    stride_slope,
    act_params,
    ACT_GRAD: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ONE_SLOPE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    SUM_ROWS: tl.constexpr,
):  # fmt: skip
    tiles_a = blocks_of(A, BLOCK_A)
    tiles_c = blocks_of(C, BLOCK_C)
    pid_c = tl.program_id(0) % tiles_c
    share = tl.program_id(0) // tiles_c
    channels = pid_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channels[None, :, None]
    db = tl.zeros((BLOCK_B, BLOCK_C, BLOCK_A), ACCUMULATOR)
    dslope = tl.zeros((BLOCK_B, BLOCK_C, BLOCK_A), ACCUMULATOR)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c * stride_bias, mask=c < C, other=0.0).to(ACCUMULATOR)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + c * stride_slope, mask=c < C, other=0.0).to(ACCUMULATOR)

    for i in range(tiles_per_share):
        number = share.to(tl.int64) * tiles_per_share + i
        b = (number // tiles_a * BLOCK_B + tl.arange(0, BLOCK_B))[:, None, None]
        a = (number % tiles_a * BLOCK_A + tl.arange(0, BLOCK_A))[None, None, :]
        mask = (b < B) & (c < C) & (a < A)
        dy_ptrs = dy_ptr + b * stride_dyb + c * stride_dyc + a * stride_dya
        saved_ptrs = saved_ptr + b * stride_sb + c * stride_sc + a * stride_sa
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
        saved = tl.load(saved_ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
        if bias_ptr is not None:
            saved += bias
        if slope_ptr is not None:
            dz = ACT_GRAD(dy, saved, slope)
        else:
            dz = ACT_GRAD(dy, saved, *act_params)
        if dz_ptr is not None:
            dz_ptrs = dz_ptr + b * stride_dzb + c * stride_dzc + a * stride_dza
            tl.store(dz_ptrs, narrow(dz, dz_ptr.dtype.element_ty), mask=mask)
        if db_ptr is not None:
            db += tl.where(mask, dz, 0.0)
        if dslope_ptr is not None:
            dslope += tl.where(mask, prelu_slope_grad(dy, saved), 0.0)

    if partial_ptr is not None:
        _store_sums(
            tl.sum(tl.sum(db, 2), 0), tl.sum(tl.sum(dslope, 2), 0), db_ptr, dslope_ptr, partial_ptr, tickets_ptr,
            share, tl.num_programs(0) // tiles_c, pid_c, tiles_c, C, channels, ONE_SLOPE, SUM_ROWS, BLOCK_C,
        )  # fmt: skip


def _channel_walk(result, inputs, bias, slope, elements):
    """A walk with the channels in its middle, and the inputs, copied to the result's layout where there is none."""
    per_channel = slope if bias is None else bias
    found = walk(result, inputs, per_channel, elements)
    if found is None or (bias is not None and found.sizes[1] != bias.numel()):
        inputs = [t.new_empty_strided(t.shape, result.stride()).copy_(t) for t in inputs]
        found = walk(result, inputs, per_channel, elements)
    return found, inputs


def forward_channels(x, bias, act, params, slope, config, in_place):
    """act(x + bias): x (N, C, *) dense, bias (C,) or None, slope (C,) or (1,) or None -> y of x's shape and strides.

    In x's own memory where `in_place` gives it up. One launch.
    """
    y = x if in_place else x.new_empty_strided(x.shape, x.stride())
    _launch_channels(x, bias, y, act, params, slope, config)
    return y


def activated(z, act, params, slope, into):
    """act(z) of rows z (M, N), slope (N,) or (1,) or None, into z itself or another of its strides. One launch."""
    _launch_channels(z, None, into, act, params, slope, tile_of_walk(z.element_size()))


def _launch_channels(x, bias, y, act, params, slope, config):
    if y.numel() == 0:
        return
    plan, _ = _channel_walk(y, [], bias, slope, config.elements)
    launch(
        _forward_channels_kernel, (plan.tiles(0) * plan.tiles(1) * plan.tiles(2),),
        x, bias, slope, y,
        *plan.sizes,
        *plan.strides[0], slope_stride(bias), slope_stride(slope),
        as_arguments(params, x.dtype),
        ACT=act, ACCUMULATOR=accumulator(x.dtype),
        BLOCK_B=plan.block[0], BLOCK_C=plan.block[1], BLOCK_A=plan.block[2],
        num_warps=config.num_warps,
    )  # fmt: skip


def backward_channels(dy, saved, bias, act_grad, params, slope, from_output, wanted, config):
    """dy (N, C, *), saved (N, C, *): y where `from_output`, else x -> dz as saved, db as bias, dslope as slope.

    `wanted` says which of the three; None for the others. One launch.
    """
    want_dz, want_db, want_dslope = wanted
    like = torch.empty_like(saved, device=saved.device if want_dz else "meta")
    dz = like if want_dz else None
    db = bias.new_empty(bias.shape) if want_db else None
    dslope = slope.new_empty(slope.shape) if want_dslope else None
    if saved.numel() == 0:
        return dz, db if db is None else db.zero_(), dslope if dslope is None else dslope.zero_()
    plan, (dy, saved) = _channel_walk(like, [dy, saved], bias, slope, config.elements)
    blocks_c = plan.tiles(1)
    per_share, shares = 1, plan.tiles(0) * plan.tiles(2)
    partial = counters = None
    if want_db or want_dslope:
        per_share = cdiv(shares, max(1, PROGRAMS // blocks_c))
        shares = cdiv(shares, per_share)
        partial = saved.new_empty((2, shares, plan.sizes[1]), dtype=wide(saved.dtype))
        counters = tickets(saved.device, blocks_c + 1)
    dz_strides, dy_strides, saved_strides = plan.strides
    launch(
        _backward_channels_kernel, (blocks_c * shares,),
        dy, saved, None if from_output else bias, slope, dz, db, dslope, partial, counters,
        *plan.sizes, per_share,
        *dz_strides, *dy_strides, *saved_strides, slope_stride(bias), slope_stride(slope),
        as_arguments(params, saved.dtype),
        ACT_GRAD=act_grad, ACCUMULATOR=accumulator(saved.dtype),
        ONE_SLOPE=slope is not None and slope.numel() == 1,
        BLOCK_B=plan.block[0], BLOCK_C=plan.block[1], BLOCK_A=plan.block[2], SUM_ROWS=1024 // plan.block[1],
        num_warps=config.num_warps,
    )  # fmt: skip
    return dz, db, dslope
