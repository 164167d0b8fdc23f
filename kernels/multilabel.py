"""Multi-label soft margin: -t log σ(x) - (1 - t) log σ(-x), a mean over the last dimension.

Reduced over the batch as well, it is a sum over all elements and shares BCE's kernels, as does its backward. Without
a reduction, rows are summed here, in one launch; C is the number of classes.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from . import bce
from .launch import launch
from .metadata import flops_each, told
from .tiles import exp_minus, log1p_exp, narrow
from .walks import walks
from .workspace import accumulator, cdiv, power_of_2


class Tile(NamedTuple):
    rows: int
    lanes: int
    num_warps: int


@lru_cache(4096)
def tile(C: int, itemsize: int) -> Tile:
    block = bce.tile(itemsize).block
    lanes = min(block, power_of_2(max(C, 16)))
    return Tile(block // lanes, lanes, 4)


@triton.jit
def _loss(x, t, p):
    """(1 - t) max(x, 0) - t min(x, 0) + log(1 + exp(-|x|))"""
    return (1.0 - t) * tl.maximum(x, 0.0) - t * tl.minimum(x, 0.0) + log1p_exp(x)


@triton.jit
def _grad(x, t, p):
    """(1 - t) σ(x) - t σ(-x), both of which are small without a cancellation."""
    e = exp_minus(tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return (1.0 - t) * tl.where(x < 0, smaller, larger) - t * tl.where(x < 0, larger, smaller)


@triton.jit
def _target_grad(x, t, p):
    return -x


SOFT_MARGIN = bce.Loss(_loss, _grad, _target_grad)


@triton.jit(launch_metadata=told(__name__, flops_each("x_ptr", 8)))
def _forward_kernel(
    x_ptr,  # (N, C), as the next two
    target_ptr,
    weight_ptr,  # or None
    loss_ptr,  # (N,)
    N,
    C,
    x_walk,
    target_walk,
    weight_walk,
    ACCUMULATOR: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    C = C // ALIGNED * ALIGNED  # the same number, known to the compiler as a multiple
    rows = tl.cast(tl.program_id(0), INDEX) * ROWS + tl.arange(0, ROWS)
    mask_rows = rows < N
    loss_sum = tl.zeros((ROWS, LANES), ACCUMULATOR)
    ptrs = (x_ptr, target_ptr, weight_ptr, None)
    ways = (x_walk, target_walk, weight_walk, None)
    every = tl.broadcast_to(mask_rows[:, None], (ROWS, LANES))
    whole = C // LANES * LANES
    if whole < C:
        cols = whole + tl.arange(0, LANES)
        mask = every & (cols < C)[None, :]
        loss = bce.losses(ptrs, ways, rows[:, None] * C + cols[None, :], mask, _loss, ACCUMULATOR)
        loss_sum += tl.where(mask, loss, 0.0)
    for first in range(0, whole, LANES):
        cols = first + tl.arange(0, LANES)
        loss_sum += bce.losses(ptrs, ways, rows[:, None] * C + cols[None, :], every, _loss, ACCUMULATOR)
    loss = tl.sum(loss_sum, 1) / tl.cast(C, ACCUMULATOR)
    tl.store(loss_ptr + rows, narrow(loss, loss_ptr.dtype.element_ty), mask=mask_rows)


def forward_rows(x, target, weight, config):
    """x and target (*, C); weight, or None, broadcasts to that -> loss (*). C > 0. One launch."""
    loss = x.new_empty(x.shape[:-1])
    N, C = loss.numel(), x.shape[-1]
    if N == 0:
        return loss
    tensors, ways, index = walks(x.shape, x, target, weight)
    launch(
        _forward_kernel, (cdiv(N, config.rows),),
        *tensors, loss,
        N, C,
        *ways,
        ACCUMULATOR=accumulator(x.dtype), INDEX=index, ALIGNED=math.gcd(C, 16),
        ROWS=config.rows, LANES=config.lanes,
        num_warps=config.num_warps,
    )  # fmt: skip
    return loss
