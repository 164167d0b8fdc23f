"""An activation alone: y = act(x), and its backward with the gradient of a slope, at any rank and strides.

Bytes: 2 n forward, 3 n backward. Every tensor is walked as (before, channel, after), in the memory order of the
result, which keeps x's strides as torch's elementwise operations do. A slope per channel belongs to the middle
dimension; its gradient is summed in the backward's one launch: by each program over its share of (before, after),
then by the last program in the order of the shares, the same in every run.

Three dimensions hold any layout in which no more are left once those that follow each other in memory are one; what
is left of an input beyond that is copied first, by torch.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .activations import prelu_slope_grad
from .launch import launch
from .metadata import told
from .tiles import blocks_of, is_last_program, narrow, ordered_sum
from .workspace import accumulator, as_arguments, cdiv, collapse, power_of_2, tickets, wide

PROGRAMS = 1024  # that share a slope's gradient: enough to fill any chip in view several times


class Tile(NamedTuple):
    elements: int
    num_warps: int


def tile(itemsize: int) -> Tile:
    return Tile(1024 if itemsize == 8 else 2048, 4)


class Walk(NamedTuple):
    """Sizes of (before, channel, after), the strides of the result and of each input, and the block of a program."""

    sizes: tuple[int, int, int]
    strides: tuple[tuple[int, int, int], ...]
    block: tuple[int, int, int]

    def tiles(self, dim: int) -> int:
        return cdiv(self.sizes[dim], self.block[dim])


@triton.jit
def tile_places(tile_b, tile_c, tile_a, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr):
    """A tile's places along each dimension: (BLOCK_B, 1, 1), (1, BLOCK_C, 1) and (1, 1, BLOCK_A)."""
    b = tl.cast(tile_b, tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    c = tl.cast(tile_c, tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    a = tl.cast(tile_a, tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    return b[:, None, None], c[None, :, None], a[None, None, :]


@triton.jit(launch_metadata=told(__name__))
def _forward_kernel(
    x_ptr,  # (B, C, A)
    slope_ptr,  # (C,) or None
    y_ptr,  # (B, C, A)
    B,
    C,
    A,
    stride_yb,
    stride_yc,
    stride_ya,
    stride_xb,
    stride_xc,
    stride_xa,
    stride_slope,
    act_params,  # a tuple; the name `params` is taken by the function that Triton makes of the signature
    ACT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    tiles_a = blocks_of(A, BLOCK_A)
    rest = tl.program_id(0) // tiles_a
    tiles_c = blocks_of(C, BLOCK_C)
    b, c, a = tile_places(rest // tiles_c, rest % tiles_c, tl.program_id(0) % tiles_a, BLOCK_B, BLOCK_C, BLOCK_A)
    mask = (b < B) & (c < C) & (a < A)
    x_ptrs = x_ptr + b * stride_xb + c * stride_xc + a * stride_xa
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
    if slope_ptr is not None:
        y = ACT(x, tl.load(slope_ptr + c * stride_slope, mask=c < C, other=0.0).to(ACCUMULATOR))
    else:
        y = ACT(x, *act_params)
    y_ptrs = y_ptr + b * stride_yb + c * stride_yc + a * stride_ya
    tl.store(y_ptrs, narrow(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(launch_metadata=told(__name__))
def _backward_kernel(
    dy_ptr,  # (B, C, A)
    saved_ptr,  # (B, C, A): y or x
    slope_ptr,  # (C,) or None
    dx_ptr,  # (B, C, A) or None
    dslope_ptr,  # (C,) or (1,) or None
    partial_ptr,  # (shares, C) or, of one slope, (programs,); or None
    tickets_ptr,  # (blocks of C,) or None
    B,
    C,
    A,
    tiles_per_program,
    stride_dxb,
    stride_dxc,
    stride_dxa,
    stride_dyb,
    stride_dyc,
    stride_dya,
    stride_sb,
    stride_sc,
    stride_sa,
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
    summed = tl.zeros((BLOCK_B, BLOCK_C, BLOCK_A), ACCUMULATOR)
    for i in range(tiles_per_program):
        number = tl.cast(share, tl.int64) * tiles_per_program + i
        b, c, a = tile_places(number // tiles_a, pid_c, number % tiles_a, BLOCK_B, BLOCK_C, BLOCK_A)
        mask = (b < B) & (c < C) & (a < A)
        dy_ptrs = dy_ptr + b * stride_dyb + c * stride_dyc + a * stride_dya
        saved_ptrs = saved_ptr + b * stride_sb + c * stride_sc + a * stride_sa
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
        saved = tl.load(saved_ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
        if dx_ptr is not None:
            if slope_ptr is not None:
                dx = ACT_GRAD(dy, saved, tl.load(slope_ptr + c * stride_slope, mask=c < C, other=0.0).to(ACCUMULATOR))
            else:
                dx = ACT_GRAD(dy, saved, *act_params)
            dx_ptrs = dx_ptr + b * stride_dxb + c * stride_dxc + a * stride_dxa
            tl.store(dx_ptrs, narrow(dx, dx_ptr.dtype.element_ty), mask=mask)
        if dslope_ptr is not None:
            summed += tl.where(mask, prelu_slope_grad(dy, saved), 0.0)

    if dslope_ptr is not None:
        mine = tl.sum(tl.sum(summed, 2), 0)
        programs = tl.num_programs(0)
        if ONE_SLOPE:
            tl.store(partial_ptr + tl.program_id(0), tl.sum(mine, 0))
            if is_last_program(tickets_ptr, programs):
                one = tl.arange(0, 1)
                total = tl.sum(ordered_sum(partial_ptr, programs, 1, one, one < 1, SUM_ROWS, 1), 0)
                tl.store(dslope_ptr, narrow(total, dslope_ptr.dtype.element_ty))
        else:
            channels = tl.cast(pid_c, tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = channels < C
            tl.store(partial_ptr + tl.cast(share, tl.int64) * C + channels, mine, mask=mask_c)
            if is_last_program(tickets_ptr + pid_c, programs // tiles_c):
                total = ordered_sum(partial_ptr, programs // tiles_c, C, channels, mask_c, SUM_ROWS, BLOCK_C)
                tl.store(dslope_ptr + channels, narrow(total, dslope_ptr.dtype.element_ty), mask=mask_c)


@lru_cache(4096)
def _flat(n, tensors, elements):
    """Tensors of n elements that all stand in memory as the result does."""
    sizes = (1, 1, n)
    return Walk(sizes, ((0, 0, 1),) * tensors, _block(sizes, True, elements))


def walk(result, inputs, slope, elements):
    """How to walk the dense result and these inputs of its shape together; None where three dimensions are too few."""
    tensors = (result, *inputs)
    if slope is None or slope.numel() == 1:
        if all(t.stride() == result.stride() for t in inputs):
            return _flat(result.numel(), len(tensors), elements)
        sizes, strides = _in_order(result, tensors)
        channel, channel_strides = 1, [0] * len(tensors)
        places = {0: (), 1: (2,), 2: (0, 2), 3: (0, 1, 2)}.get(len(sizes))
    else:
        sizes, strides = _in_order(result, [t.narrow(1, 0, 1) for t in tensors])
        channel, channel_strides = result.shape[1], [t.stride(1) for t in tensors]
        within = len(sizes) == 1 and strides[0][0] < result.stride(1)
        places = {0: (), 1: (2,) if within else (0,), 2: (0, 2)}.get(len(sizes))
    if places is None:
        return None
    walked = [1, channel, 1]
    steps = [[0, step, 0] for step in channel_strides]
    for place, size, *own in zip(places, sizes, *strides, strict=True):
        walked[place] = size
        for step, stride in zip(steps, own, strict=True):
            step[place] = stride
    even = all(step[2] <= 1 for step in steps)
    return Walk(tuple(walked), tuple(map(tuple, steps)), _block(tuple(walked), even, elements))


def _in_order(result, tensors):
    order = sorted(range(result.dim()), key=result.stride, reverse=True)
    return collapse(*(t.permute(order) for t in tensors))


@lru_cache(4096)
def _block(sizes, even, elements):
    """Rows of what comes after the channel, unless some tensor is not contiguous along it: then nearer to a square."""
    before, channel, after = map(power_of_2, sizes)
    block_a = min(after, 512 if even else 64)
    block_c = min(channel, max(128 // block_a, 1 if even else 32), elements // block_a)
    block_b = min(before, elements // (block_a * block_c))
    block_a = min(after, elements // (block_b * block_c))
    return block_b, block_c, block_a


def walkable(result, inputs, slope, elements):
    """A walk, and the inputs, copied to the result's layout where there is none otherwise."""
    found = walk(result, inputs, slope, elements)
    if found is None:
        inputs = [t.new_empty_strided(t.shape, result.stride()).copy_(t) for t in inputs]
        found = walk(result, inputs, slope, elements)
    return found, inputs


def _slope_stride(slope):
    return 0 if slope is None or slope.numel() == 1 else slope.stride(0)


def forward(x, act, params, slope, config):
    """x (*), slope (channels,) of dimension 1 or of one element or None -> y of x's shape and strides. One launch."""
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    plan, (x,) = walkable(y, [x], slope, config.elements)
    y_strides, x_strides = plan.strides
    launch(
        _forward_kernel, (plan.tiles(0) * plan.tiles(1) * plan.tiles(2),),
        x, slope, y,
        *plan.sizes,
        *y_strides, *x_strides, _slope_stride(slope),
        as_arguments(params, x.dtype),
        ACT=act, ACCUMULATOR=accumulator(x.dtype),
        BLOCK_B=plan.block[0], BLOCK_C=plan.block[1], BLOCK_A=plan.block[2],
        num_warps=config.num_warps,
    )  # fmt: skip
    return y


def backward(dy, saved, act_grad, params, slope, want_dx, want_dslope, config):
    """dy (*), saved (*), slope as in forward -> dx (*) or None, dslope as slope or None. One launch."""
    like = torch.empty_like(saved, device=saved.device if want_dx else "meta")
    dx = like if want_dx else None
    dslope = slope.new_empty(slope.shape) if want_dslope else None
    if saved.numel() == 0:
        return dx, dslope if dslope is None else dslope.zero_()
    plan, (dy, saved) = walkable(like, [dy, saved], slope, config.elements)
    blocks_c = plan.tiles(1)
    per_program, shares = 1, plan.tiles(0) * plan.tiles(2)
    one_slope = slope is not None and slope.numel() == 1
    partial = None
    if want_dslope:
        per_program = cdiv(shares, max(1, PROGRAMS // blocks_c))
        shares = cdiv(shares, per_program)
        dtype = wide(saved.dtype)
        partial = saved.new_empty((shares, blocks_c if one_slope else plan.sizes[1]), dtype=dtype)
    dx_strides, dy_strides, saved_strides = plan.strides
    launch(
        _backward_kernel, (blocks_c * shares,),
        dy, saved, slope, dx, dslope, partial, tickets(saved.device, blocks_c) if want_dslope else None,
        *plan.sizes, per_program,
        *dx_strides, *dy_strides, *saved_strides, _slope_stride(slope),
        as_arguments(params, saved.dtype),
        ACT_GRAD=act_grad, ACCUMULATOR=accumulator(saved.dtype), ONE_SLOPE=one_slope,
        BLOCK_B=plan.block[0], BLOCK_C=plan.block[1], BLOCK_A=plan.block[2],
        SUM_ROWS=1024 // plan.block[1],
        num_warps=config.num_warps,
    )  # fmt: skip
    return dx, dslope
