"""Tensors times a number of the device's, in place: each read and written once in one launch; nothing where it is 1."""

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import launch
from .metadata import told
from .tiles import blocks_of, narrow
from .workspace import accumulator, cdiv, wide

PROGRAMS = 2048  # that a launch which finds nothing to do has to begin and end


class Tile(NamedTuple):
    block: int
    num_warps: int


def tile() -> Tile:
    return Tile(4096, 8)


@triton.jit(launch_metadata=told(__name__, untouched=("x_ptr", "y_ptr", "z_ptr")))
def _scale_kernel(
    x_ptr,  # (n_x,)
    y_ptr,  # (n_y,) or None
    z_ptr,  # (n_z,) or None
    factor_ptr,  # (1,)
    n_x,
    n_y,
    n_z,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    factor = tl.load(factor_ptr).to(ACCUMULATOR)
    if factor != 1.0:
        _multiply(x_ptr, n_x, factor, BLOCK, EVEN)
        if y_ptr is not None:
            _multiply(y_ptr, n_y, factor, BLOCK, EVEN)
        if z_ptr is not None:
            _multiply(z_ptr, n_z, factor, BLOCK, EVEN)


@triton.jit
def _multiply(x_ptr, n, factor, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    for block in range(tl.program_id(0), blocks_of(n, BLOCK), tl.num_programs(0)):
        offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = None if EVEN else offsets < n
        x = tl.load(x_ptr + offsets, mask=mask)
        tl.store(x_ptr + offsets, narrow(x.to(factor.dtype) * factor, x.dtype), mask=mask)


def in_place(tensors, factor):
    """One to three tensors, whose memory has no gaps, times factor, a number of one element. One launch.

    In float64 are all of them or none.
    """
    tensors, config = [t for t in tensors if t.numel()], tile()
    if not tensors:
        return
    sizes = [t.numel() for t in tensors]
    missing = 3 - len(tensors)
    launch(
        _scale_kernel, (min(PROGRAMS, cdiv(max(sizes), config.block)),),
        *tensors, *[None] * missing, factor,
        *sizes, *[0] * missing,
        ACCUMULATOR=accumulator(wide(tensors[0].dtype)),
        BLOCK=config.block, EVEN=all(n % config.block == 0 for n in sizes),
        num_warps=config.num_warps,
    )  # fmt: skip
