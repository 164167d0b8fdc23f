"""How an elementwise kernel finds its operands, each numbered in the order of its elements and read in place.

One after another, with 16-byte loads; by `strided`, in up to three dimensions; or as one number for all. What needs
four dimensions or more, after those that follow each other in memory are joined, is copied first.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .tiles import strided
from .workspace import collapse

ZERO, ONE = tl.constexpr(0), tl.constexpr(1)  # with which arithmetic on a walk folds


class Walks(NamedTuple):
    """What a kernel is given of its operands; a walk is None (one after another), () (one number), or `strided`'s."""

    tensors: tuple[torch.Tensor | None, ...]
    walks: tuple[Any, ...]
    index: tl.dtype  # that reaches every element


def walks(shape: torch.Size, *operands: torch.Tensor | None, order: list[int] | None = None) -> Walks:
    """The way through each operand, as it broadcasts to that shape; `order` permutes the dimensions of all."""
    tensors, ways, reach = [], [], shape.numel()
    for t in operands:
        way: tuple | None = None
        if t is not None and (order is not None or t.shape != shape or not t.is_contiguous()):
            if t.numel() == 1:
                way = ()
            elif order is None and t.is_contiguous() and t.shape == shape[-t.dim() :]:
                way = (t.numel(), ONE, ZERO, ONE, ZERO)
            else:
                wide = t.expand(shape)
                t, way = _walk(t, wide if order is None else wide.permute(order))
                reach = max(reach, sum((size - 1) * stride for size, stride in zip(shape, wide.stride(), strict=True)))
        tensors.append(t)
        ways.append(way)
    return Walks(tuple(tensors), tuple(ways), tl.int32 if reach < 2**31 - 2**16 else tl.int64)


def _walk(t: torch.Tensor, wide: torch.Tensor) -> tuple[torch.Tensor, tuple | None]:
    """The tensor to hand over, t unless it must be copied, and how its elements are found in the order of `wide`."""
    if wide.is_contiguous():
        return t, None
    sizes, (strides,) = collapse(wide)
    if not any(strides):
        return t, ()
    if len(sizes) > 3:
        return wide.contiguous(), None
    absent = 3 - len(sizes)
    numbers = (*sizes[1:], *[1] * absent, *strides, *[0] * absent)
    return t, tuple(ONE if number == 1 else ZERO if number == 0 else number for number in numbers)


@triton.jit
def load(ptr, walk, offsets, mask, ACCUMULATOR: tl.constexpr):
    """An operand's elements of these numbers."""
    if walk is None:
        x = tl.load(ptr + offsets, mask=mask, other=0.0)
    else:
        if len(walk) == 0:
            x = tl.broadcast_to(tl.load(ptr), mask.shape)
        else:
            x = tl.load(ptr + strided(offsets, *walk), mask=mask, other=0.0)
    return x.to(ACCUMULATOR)
