"""softmax, log-softmax and softmin along any dimension.

A unit u is one tensor read or written. Forward reads x and writes y, 2u in one launch; backward reads y and dy and
writes dx, 3u in one launch, and nothing but y is saved. Rows too wide for the registers of two programs side by side
are read twice: their statistics are kept per lane, so that the loop has no reduction across lanes. From memory they
come once as long as the caches hold the rows on the way: few programs run side by side, and the second time a row is
read from its end, of which most is still there. What the caches lose is 1u more forward and 2u backward (1u of
log-softmax, whose row sum needs dy alone) at most.

Rows are what remains of a tensor without its classes, at most three dimensions once those that follow each other in
memory are one. A program takes a block of rows along the last of them, so that whichever is contiguous in memory, the
classes or the rows, a warp reads along it.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import launch
from .metadata import flops_each, told
from .tiles import LOG2_E, blocks_of, narrow
from .workspace import accumulator, cdiv, collapse, power_of_2

IN_REGISTERS = {4: 16384, 8: 4096}  # elements of a program's tensors, by the accumulator's bytes
TWO_IN_CACHE = 32768  # elements up to which two programs to a multiprocessor find theirs in the caches again
FEW = 32  # classes that a thread takes one after another, of rows next to each other
LINE = 128  # bytes, which a program reads along the rows at least, where they are what is contiguous


class Tile(NamedTuple):
    rows: int
    lanes: int
    num_warps: int


@lru_cache(4096)
def tile(shape: tuple, strides: tuple, dim: int, itemsize: int, operands: int, warp_size: int) -> Tile:
    """Rows a program takes at once, and classes: all of them, or those of one step.

    Of a launch that reads `operands` tensors of this shape, one of them with these strides. itemsize: bytes of the
    widest element, on the way too.
    """
    before, classes, after = math.prod(shape[:dim]), shape[dim] if shape else 1, math.prod(shape[dim + 1 :])
    strided = bool(shape) and strides[dim] > 1 and 1 in strides
    across = strided or after > 1  # it is the rows that are contiguous
    elements = IN_REGISTERS[itemsize] // operands
    rows = after if after > 1 else before
    least = min(LINE // itemsize, power_of_2(rows)) if across else 1
    lanes = power_of_2(classes)
    if across and itemsize == 4 and classes <= FEW and min(rows, before * after // 256) >= 1024:
        return Tile(1024, 2, 128 // warp_size)
    if least * lanes > (elements // 2 if across else elements):
        if itemsize == 8:
            return Tile(least, 1024 // least, 128 // warp_size)
        threads = 512 if operands * least * lanes <= TWO_IN_CACHE else 1024
        return Tile(least, 16 * threads // least, threads // warp_size)
    enough = max(
        1, min(elements, 4096 if lanes > 256 else 2048) // lanes
    )  # more where several warps share a row's sums
    if 4 * rows < enough:
        rows = max(before, after)
    rows = max(least, min(enough, power_of_2(rows)))
    return Tile(rows, lanes, min(1024, max(128, rows * lanes // 32)) // warp_size)


@triton.jit
def _rounded(n, ALIGNED: tl.constexpr):
    """The same number, known to the compiler as a multiple."""
    return n // ALIGNED * ALIGNED


@triton.jit
def _rows(R, ROWS: tl.constexpr):
    """This program's rows (ROWS, 1) along the last row dimension, and its number along the first two."""
    blocks = blocks_of(R, ROWS)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    return (block * ROWS + tl.arange(0, ROWS))[:, None], tl.program_id(0) // blocks


@triton.jit
def _mask(rows, R, cols, C, ROWS: tl.constexpr):
    mask = cols < C
    if ROWS > 1:
        mask = mask & (rows < R)
    return mask


@triton.jit
def _first_class(ptr, strides, rows, outer, size_1, ALONG_CLASSES: tl.constexpr, ALIGNED: tl.constexpr):
    """Where these rows begin (ROWS, 1)."""
    stride_r = strides[2]
    if ALONG_CLASSES:
        stride_r = _rounded(stride_r, ALIGNED)
    i, j = (outer // size_1).to(tl.int64), (outer % size_1).to(tl.int64)
    return ptr + i * _rounded(strides[0], ALIGNED) + j * _rounded(strides[1], ALIGNED) + rows * stride_r


@triton.jit
def _classes(first, strides, LANES: tl.constexpr, ALONG_CLASSES: tl.constexpr, ALIGNED: tl.constexpr):
    """Offsets (1, LANES) of the classes from `first` on."""
    stride_c = strides[3]
    if not ALONG_CLASSES:
        stride_c = _rounded(stride_c, ALIGNED)
    return (first + tl.arange(0, LANES)).to(tl.int64)[None, :] * stride_c


@triton.jit
def _load(ptrs, mask, dtype: tl.constexpr, NEGATE: tl.constexpr, ACCUMULATOR: tl.constexpr, EVICTION: tl.constexpr):
    """x or -x, first rounded to the dtype asked for, as torch does it; -inf beyond the edge."""
    x = tl.load(ptrs, mask=mask, other=float("inf") if NEGATE else -float("inf"), eviction_policy=EVICTION)
    if x.dtype != dtype:
        if dtype != tl.float64:
            x = narrow(x.to(tl.float32), dtype)
    x = x.to(ACCUMULATOR)
    return -x if NEGATE else x


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def _store_result(ptrs, mask, x, m, s, LOG: tl.constexpr):
    """y of x, where m is the row's maximum and s = Σ exp(x - m)."""
    if LOG:
        y = (x - m) - tl.log(s)
    else:
        y = _exp(x - m) * (1.0 / s)
    tl.store(ptrs, narrow(y, ptrs.dtype.element_ty), mask=mask)


@triton.jit(launch_metadata=told(__name__, flops_each("x_ptr", 5)))
def _forward_kernel(
    x_ptr,
    y_ptr,
    C,
    R,  # rows along the last row dimension
    size_1,  # of the second row dimension
    x_strides,  # along the three row dimensions and the classes
    y_strides,
    LOG: tl.constexpr,
    NEGATE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ONLINE: tl.constexpr,
    ALONG_CLASSES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    if ALONG_CLASSES:
        C = _rounded(C, ALIGNED)
    else:
        R = _rounded(R, ALIGNED)
    rows, outer = _rows(R, ROWS)
    cols = tl.arange(0, LANES)[None, :]
    x_ptrs = _first_class(x_ptr, x_strides, rows, outer, size_1, ALONG_CLASSES, ALIGNED)
    y_ptrs = _first_class(y_ptr, y_strides, rows, outer, size_1, ALONG_CLASSES, ALIGNED)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if ONLINE:
        lowest: tl.constexpr = -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38
        m = tl.full((ROWS, LANES), lowest, ACCUMULATOR)
        s = tl.zeros((ROWS, LANES), ACCUMULATOR)
        for first in range(0, C, LANES):
            mask = _mask(rows, R, first + cols, C, ROWS)
            ptrs = x_ptrs + _classes(first, x_strides, LANES, ALONG_CLASSES, ALIGNED)
            x = _load(ptrs, mask, dtype, NEGATE, ACCUMULATOR, "evict_last")
            e = tl.exp2(tl.abs(x - m) * -LOG2_E)
            s = tl.where(x > m, s * e + 1.0, s + e)
            m = tl.maximum(m, x)
        row_m = tl.max(m, 1)[:, None]
        row_s = tl.sum(s * _exp(m - row_m), 1)[:, None]
        for past in range(blocks_of(C, LANES)):
            first = (blocks_of(C, LANES) - 1 - past) * LANES
            mask = _mask(rows, R, first + cols, C, ROWS)
            ptrs = x_ptrs + _classes(first, x_strides, LANES, ALONG_CLASSES, ALIGNED)
            x = _load(ptrs, mask, dtype, NEGATE, ACCUMULATOR, "evict_first")
            ptrs = y_ptrs + _classes(first, y_strides, LANES, ALONG_CLASSES, ALIGNED)
            _store_result(ptrs, mask, x, row_m, row_s, LOG)
    else:
        mask = _mask(rows, R, cols, C, ROWS)
        ptrs = x_ptrs + _classes(0, x_strides, LANES, ALONG_CLASSES, ALIGNED)
        x = _load(ptrs, mask, dtype, NEGATE, ACCUMULATOR, "")
        m = tl.max(x, 1)[:, None]
        s = tl.sum(_exp(x - m), 1)[:, None]
        ptrs = y_ptrs + _classes(0, y_strides, LANES, ALONG_CLASSES, ALIGNED)
        _store_result(ptrs, mask, x, m, s, LOG)


@triton.jit
def _store_gradient(ptrs, mask, dy, y, total, LOG: tl.constexpr, NEGATE: tl.constexpr):
    if LOG:
        dx = dy - _exp(y) * total
    else:
        dx = (dy - total) * y
    if NEGATE:
        dx = -dx
    if ptrs.dtype.element_ty != tl.float64:
        dx = dx.to(tl.float32)
    tl.store(ptrs, narrow(dx, ptrs.dtype.element_ty), mask=mask)


@triton.jit(launch_metadata=told(__name__, flops_each("y_ptr", 4)))
def _backward_kernel(
    dy_ptr,
    y_ptr,
    dx_ptr,
    C,
    R,
    size_1,
    dy_strides,
    y_strides,
    dx_strides,
    LOG: tl.constexpr,
    NEGATE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ONLINE: tl.constexpr,
    ALONG_CLASSES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    if ALONG_CLASSES:
        C = _rounded(C, ALIGNED)
    else:
        R = _rounded(R, ALIGNED)
    rows, outer = _rows(R, ROWS)
    cols = tl.arange(0, LANES)[None, :]
    dy_ptrs = _first_class(dy_ptr, dy_strides, rows, outer, size_1, ALONG_CLASSES, ALIGNED)
    y_ptrs = _first_class(y_ptr, y_strides, rows, outer, size_1, ALONG_CLASSES, ALIGNED)
    dx_ptrs = _first_class(dx_ptr, dx_strides, rows, outer, size_1, ALONG_CLASSES, ALIGNED)
    if ONLINE:
        totals = tl.zeros((ROWS, LANES), ACCUMULATOR)
        for first in range(0, C, LANES):
            mask = _mask(rows, R, first + cols, C, ROWS)
            ptrs = dy_ptrs + _classes(first, dy_strides, LANES, ALONG_CLASSES, ALIGNED)
            summand = tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_last").to(ACCUMULATOR)
            if not LOG:
                ptrs = y_ptrs + _classes(first, y_strides, LANES, ALONG_CLASSES, ALIGNED)
                summand *= tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_last").to(ACCUMULATOR)
            totals += summand
        total = tl.sum(totals, 1)[:, None]
        for past in range(blocks_of(C, LANES)):
            first = (blocks_of(C, LANES) - 1 - past) * LANES
            mask = _mask(rows, R, first + cols, C, ROWS)
            ptrs = dy_ptrs + _classes(first, dy_strides, LANES, ALONG_CLASSES, ALIGNED)
            dy = tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACCUMULATOR)
            ptrs = y_ptrs + _classes(first, y_strides, LANES, ALONG_CLASSES, ALIGNED)
            y = tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACCUMULATOR)
            ptrs = dx_ptrs + _classes(first, dx_strides, LANES, ALONG_CLASSES, ALIGNED)
            _store_gradient(ptrs, mask, dy, y, total, LOG, NEGATE)
    else:
        mask = _mask(rows, R, cols, C, ROWS)
        ptrs = dy_ptrs + _classes(0, dy_strides, LANES, ALONG_CLASSES, ALIGNED)
        dy = tl.load(ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
        ptrs = y_ptrs + _classes(0, y_strides, LANES, ALONG_CLASSES, ALIGNED)
        y = tl.load(ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
        summand = dy
        if not LOG:
            summand = dy * y
        total = tl.sum(summand, 1)[:, None]
        ptrs = dx_ptrs + _classes(0, dx_strides, LANES, ALONG_CLASSES, ALIGNED)
        _store_gradient(ptrs, mask, dy, y, total, LOG, NEGATE)


class Walk(NamedTuple):
    """How a launch walks tensors of one shape: its rows in three dimensions, of which a program's are in the last."""

    outer: int  # rows' size along the first two dimensions
    classes: int
    rows: int
    size_1: int
    strides: tuple[tuple[int, ...], ...]  # of each tensor along the three, and along the classes
    along_classes: bool
    aligned: int


@lru_cache(4096)
def _walk(shape, dim, rows, *strides) -> Walk | None:
    """Where the last dimension would leave half of a program's rows idle, the longest takes its place.

    None where the rows have more than three dimensions.
    """
    tensors = [torch.empty_strided(shape or (1,), own or (1,), device="meta") for own in strides]
    sizes, walked = collapse(*(t.select(dim, 0) for t in tensors))
    ahead = 3 - len(sizes)
    if ahead < 0:
        return None
    sizes, walked = [1] * ahead + sizes, [[0] * ahead + own for own in walked]
    if 2 * sizes[2] <= rows:
        longest = sizes.index(max(sizes))
        for numbers in (sizes, *walked):
            numbers[2], numbers[longest] = numbers[longest], numbers[2]
    whole = tuple((*own, t.stride(dim)) for own, t in zip(walked, tensors, strict=True))
    classes = tensors[0].shape[dim]
    along_classes = all(own[3] == 1 for own in whole)
    aligned = _alignment(classes, sizes[2], whole, along_classes)
    return Walk(sizes[0] * sizes[1], classes, sizes[2], sizes[1], whole, along_classes, aligned)


def _alignment(C, R, strides, along_classes):
    """What divides a line's length and the steps to others, up to 16: the JIT asks for 16, and 1000 is 8 times 125."""
    if along_classes:
        return math.gcd(C, 16, *(stride for own in strides for stride in own[:3]))
    if all(own[2] == 1 for own in strides):
        return math.gcd(R, 16, *(stride for own in strides for stride in (*own[:2], own[3])))
    return 1


def _launch(kernel, tensors, dim, dtype, log, negate, config):
    """Launch over tensors of one shape, of which the last is written. Rows of more than three dimensions are copied."""
    shape = tensors[0].shape
    walk = _walk(shape, dim, config.rows, *(t.stride() for t in tensors))
    if walk is None:
        tensors = [t.contiguous() for t in tensors]
        walk = _walk(shape, dim, config.rows, *(t.stride() for t in tensors))
    launch(
        kernel, (walk.outer * cdiv(walk.rows, config.rows),),
        *tensors,
        walk.classes, walk.rows, walk.size_1, *walk.strides,
        LOG=log, NEGATE=negate, ACCUMULATOR=accumulator(dtype),
        ONLINE=config.lanes < walk.classes, ALONG_CLASSES=walk.along_classes, ALIGNED=walk.aligned,
        ROWS=config.rows, LANES=config.lanes,
        num_warps=config.num_warps,
    )  # fmt: skip


def forward(x, dim, dtype, log, negate, config):
    """x -> its softmax in that dtype, or the logarithm of it; `negate`: of -x. One launch."""
    y = x.new_empty(x.shape, dtype=dtype)
    if y.numel():
        _launch(_forward_kernel, (x, y), dim, dtype, log, negate, config)
    return y


def backward(dy, y, dim, dtype, log, negate, config):
    """dy and what forward gave -> dx of y's shape, in that dtype, which is x's. One launch."""
    dx = y.new_empty(y.shape, dtype=dtype)
    if dx.numel():
        _launch(_backward_kernel, (dy, y, dx), dim, y.dtype, log, negate, config)
    return dx
