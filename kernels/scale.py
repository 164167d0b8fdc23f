"""x times a number that is on the device, in place: one read and one write in one launch, or nothing where it is 1."""

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import launch
from .tiles import blocks_of, narrow
from .workspace import accumulator, cdiv, wide

PROGRAMS = 2048  # that a launch which finds nothing to do has to begin and end


class Tile(NamedTuple):
    block: int
    num_warps: int


def tile() -> Tile:
    return Tile(4096, 8)


@triton.jit
def _scale_kernel(
    x_ptr,  # (n,)
    factor_ptr,  # (1,)
    scale_ptr,  # (1,) or None
    n,
    ACCUMULATOR: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    factor = tl.load(factor_ptr).to(ACCUMULATOR)
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr).to(ACCUMULATOR)
    if factor != 1.0:
        for block in range(tl.program_id(0), blocks_of(n, BLOCK), tl.num_programs(0)):
            offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = None if EVEN else offsets < n
            x = tl.load(x_ptr + offsets, mask=mask)
            tl.store(x_ptr + offsets, narrow(x.to(ACCUMULATOR) * factor, x.dtype), mask=mask)


def in_place(x, factor, scale=None):
    """x, whose memory has no gaps, is multiplied by factor and by scale, numbers of one element. One launch."""
    n, config = x.numel(), tile()
    if n == 0:
        return
    launch(
        _scale_kernel, (min(PROGRAMS, cdiv(n, config.block)),),
        x, factor, scale,
        n,
        ACCUMULATOR=accumulator(wide(x.dtype)), EVEN=n % config.block == 0, BLOCK=config.block,
        num_warps=config.num_warps,
    )  # fmt: skip
