"""The inner loops of a matrix product, through pointers or through the copy engine's descriptors, at any precision.

tf32x3 makes a float32 product of three of the tensor cores' own: each operand is split into its ten leading digits,
which such a core takes exactly, and what they leave, times 2⁹, which keeps it out of the denormals and is exact. A core
may cut its sums off instead of rounding them, an error that grows with K (bench/results/precision.json): so each step
begins a sum of its own, which is added to the others outside the core.
"""

import triton
import triton.language as tl

from .tiles import widen, within

REST = tl.constexpr(512.0)
LEADING = tl.constexpr(-(1 << 13))  # all but the 13 bits of a float32 that a tf32 lacks


@triton.jit
def product_by_pointers(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    row,
    col,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    X_BY_K: tl.constexpr,
    W_BY_K: tl.constexpr,
    ALIGNED: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The rows of x from `row` on times the columns of Wᵀ from `col` on: (BLOCK_M, BLOCK_N).

    ALIGNED divides K and the distance from line to line of each operand, whose lines run along K or across it.
    OFFSET is the type that holds a place within a tile: a narrow one takes half the registers of a pointer.
    """
    K = K // ALIGNED * ALIGNED  # the same number, known to the compiler as a multiple
    k = tl.arange(0, BLOCK_K)
    x_ptr += tl.cast(row, tl.int64) * stride_xm
    w_ptr += tl.cast(col, tl.int64) * stride_wn
    x_offsets = _offsets(M - row, stride_xm, stride_xk, X_BY_K, ALIGNED, OFFSET, BLOCK_M, BLOCK_K)
    w_offsets = _offsets(N - col, stride_wn, stride_wk, W_BY_K, ALIGNED, OFFSET, BLOCK_N, BLOCK_K).T
    x_step = tl.full((), BLOCK_K, tl.int64) * stride_xk
    w_step = tl.full((), BLOCK_K, tl.int64) * stride_wk

    z = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    rest = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    one = tl.where(K > 0, 1.0, 0.0)
    for first in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptr + x_offsets)  # (BLOCK_M, BLOCK_K)
            w = tl.load(w_ptr + w_offsets)  # (BLOCK_K, BLOCK_N)
        else:
            x = tl.load(x_ptr + x_offsets, mask=k[None, :] < K - first, other=0.0)
            w = tl.load(w_ptr + w_offsets, mask=k[:, None] < K - first, other=0.0)
        z, rest = _multiplied(x, w, z, rest, one, PRECISION, ACCUMULATOR)
        x_ptr += x_step
        w_ptr += w_step
    return _whole(z, rest, PRECISION)


@triton.jit
def _offsets(
    lines, stride, stride_k, BY_K: tl.constexpr, ALIGNED: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Where a tile's elements stand, (BLOCK, BLOCK_K), from its first one on.

    A line beyond the edge reads the first one instead, which costs no mask; its result is not stored.
    """
    if BY_K:
        stride = stride // ALIGNED * ALIGNED
    else:
        stride_k = stride_k // ALIGNED * ALIGNED
    line = tl.arange(0, BLOCK)
    line = within(line, line < lines, BLOCK)
    return line[:, None].to(OFFSET) * stride + tl.arange(0, BLOCK_K)[None, :].to(OFFSET) * stride_k


@triton.jit
def product_by_descriptors(
    x_desc,  # (M, K), or its transpose
    w_desc,  # (N, K), or its transpose
    row,
    col,
    K,
    X_BY_K: tl.constexpr,
    W_BY_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The rows of x from `row` on times the columns of Wᵀ from `col` on: (BLOCK_M, BLOCK_N).

    The copy engine reads 0 beyond the edges. An operand whose memory runs along K is described as it is, else as its
    transpose.
    """
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    rest = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    one = tl.where(K > 0, 1.0, 0.0)
    for first in range(0, K, BLOCK_K):
        if X_BY_K:
            x = x_desc.load([row, first])
        else:
            x = x_desc.load([first, row]).T
        if W_BY_K:
            w = w_desc.load([col, first]).T
        else:
            w = w_desc.load([first, col])
        z, rest = _multiplied(x, w, z, rest, one, PRECISION, tl.float32)
    return _whole(z, rest, PRECISION)


@triton.jit
def _multiplied(x, w, z, rest, one, PRECISION: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """z and rest with the product of x (BLOCK_M, BLOCK_K) and w (BLOCK_K, BLOCK_N) added."""
    if PRECISION == "tf32x3":
        x_leading = _leading(x)
        w_leading = _leading(w)
        rest = tl.dot((x - x_leading) * REST, w_leading, rest, input_precision="tf32")
        rest = tl.dot(x_leading, (w - w_leading) * REST, rest, input_precision="tf32")
        z += one * tl.dot(x_leading, w_leading, input_precision="tf32")
    else:
        z = tl.dot(widen(x), widen(w), z, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    return z, rest


@triton.jit
def _leading(x):
    """x cut off to what a tensor core takes of it. Said here, so that nothing rests on how the core would do it."""
    return (x.to(tl.int32, bitcast=True) & LEADING).to(tl.float32, bitcast=True)


@triton.jit
def _whole(z, rest, PRECISION: tl.constexpr):
    """An infinite x leaves NaN (inf - inf) in the rest alone, where it counts as 0."""
    if PRECISION == "tf32x3":
        z += tl.where(rest == rest, rest * (1.0 / REST), 0.0)
    return z
