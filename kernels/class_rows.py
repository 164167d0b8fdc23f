"""Rows of logits, as cross-entropy reads them: tiles of classes, the statistics of a row, coefficients.

A tile is (CHUNKS, ROWS, LANES, VECTOR): a thread loads VECTOR neighbours at once, 16 bytes where the strides allow it,
CHUNKS times, and keeps one maximum and one of each sum for a row. So nothing passes between threads until the row's
end, and what a step costs beyond its elements is shared by all that a thread loads.
"""

import math

import triton
import triton.language as tl

from .tiles import LOG2_E, finite_or_0, tanh
from .workspace import around_classes, as_arguments, by_row, power_of_2, row_strides


@triton.jit
def step_cols(CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The columns of a step, (CHUNKS, 1, LANES, VECTOR)."""
    chunks = tl.arange(0, CHUNKS)[:, None, None, None] * LANES * VECTOR
    return chunks + tl.arange(0, LANES)[None, None, :, None] * VECTOR + tl.arange(0, VECTOR)


@triton.jit
def step_mask(mask_rows, cols, C, WHOLE: tl.constexpr):
    """Of (ROWS,) and columns; WHOLE: all columns are inside, so that a mask is one for a thread and row."""
    mask = mask_rows[None, :, None, None]
    return mask if WHOLE else mask & (cols < C)


@triton.jit
def capped(x, softcap):
    """softcap tanh(x / softcap). In float32 without a division or a loss of small digits near 0.

    Near 0 a polynomial (minimax, to 3e-8); further out 1 - 2 / (1 + exp(2 z)), as good as its rounding.
    """
    if softcap is None:
        y = x
    elif x.dtype == tl.float64:
        y = tanh(x / softcap) * softcap
    else:
        z = x * (1.0 / softcap)
        w = z * z
        near = -5.339025e-2 + w * (1.966489e-2 - w * 4.76947e-3)
        near = x + x * (w * (-0.33333068 + w * (0.13326521 + w * near)))
        q = tl.rsqrt(1.0 + tl.exp2(z * (2.0 * LOG2_E)))
        y = tl.where(w < 0.5625, near, softcap - (2.0 * softcap) * (q * q))
    return y


@triton.jit
def logits(x_ptrs, mask, softcap, ACCUMULATOR: tl.constexpr, WHOLE: tl.constexpr, EVICTION: tl.constexpr):
    """-inf beyond the edge; WHOLE: beyond the rows alone, where nobody looks at what was loaded."""
    if WHOLE:
        x = capped(tl.load(x_ptrs, mask=mask, eviction_policy=EVICTION).to(ACCUMULATOR), softcap)
    else:
        x = tl.load(x_ptrs, mask=mask, other=-float("inf"), eviction_policy=EVICTION).to(ACCUMULATOR)
        if softcap is not None:
            x = tl.where(mask, capped(x, softcap), x)
    return x


@triton.jit
def coefficients(
    target_ptrs, weight_ptrs, mask, smoothing, C,
    ACCUMULATOR: tl.constexpr, PROBABILITIES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """k of probabilities, 0 beyond the columns; of classes w alone, which smoothing multiplies by ε/C, None for 1."""
    k = None
    if PROBABILITIES:
        k = tl.load(target_ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
        if smoothing is not None:
            k = k * (1.0 - smoothing) + smoothing / tl.cast(C, ACCUMULATOR)
            k = k if WHOLE else tl.where(mask, k, 0.0)
    if weight_ptrs is not None:
        w = tl.load(weight_ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
        k = w if k is None else k * w
    return k


@triton.jit
def total_of(x):
    """Of a tile, each thread's sum of a row."""
    return tl.sum(tl.sum(x, 3), 0)


@triton.jit
def spread_sum(k, above, mask, WHOLE: tl.constexpr):
    """Of a tile, each thread's Σ k above of a row."""
    kx = above if k is None else k * above
    return total_of(kx if WHOLE else tl.where(mask, kx, 0.0))


@triton.jit
def _classes_inside(left, CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """How many of a tile's classes each thread has, (1, LANES), where so many are left."""
    inside = tl.zeros((1, LANES), tl.int32)
    for chunk in tl.static_range(CHUNKS):
        ahead = left - (chunk * LANES + tl.arange(0, LANES)[None, :]) * VECTOR
        inside += tl.minimum(tl.maximum(ahead, 0), VECTOR).to(tl.int32)
    return inside


@triton.jit
def _add_step(
    state, first, x_ptrs, target_ptrs, weight_ptr, mask_rows, stride_xc, stride_tc, stride_weight, smoothing, softcap,
    C, CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ACCUMULATOR: tl.constexpr,
    PROBABILITIES: tl.constexpr, SPREAD: tl.constexpr, EVICTION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    m, s, k_sum, kx_sum = state
    cols = first + step_cols(CHUNKS, LANES, VECTOR)
    mask = step_mask(mask_rows, cols, C, WHOLE)
    col = cols.to(tl.int64)
    x = logits(x_ptrs[None, :, None, None] + col * stride_xc, mask, softcap, ACCUMULATOR, WHOLE, EVICTION)
    larger = tl.maximum(m, tl.max(tl.max(x, 3), 0))
    base = finite_or_0(larger)
    above = x - base[None, :, :, None]
    s = s * tl.exp2((m - base) * LOG2_E) + total_of(tl.exp2(above * LOG2_E))
    if SPREAD:
        weight_ptrs = None if weight_ptr is None else weight_ptr + col * stride_weight
        target_ptrs = target_ptrs[None, :, None, None] + col * stride_tc
        k = coefficients(target_ptrs, weight_ptrs, mask, smoothing, C, ACCUMULATOR, PROBABILITIES, WHOLE)
        kx_sum += (finite_or_0(m) - base) * k_sum + spread_sum(k, above, mask, WHOLE)
        if k is not None:
            k_sum += total_of(tl.broadcast_to(k, x.shape))
        elif WHOLE:
            k_sum += CHUNKS * VECTOR
        else:
            k_sum += _classes_inside(C - first, CHUNKS, LANES, VECTOR).to(ACCUMULATOR)
    return larger, s, k_sum, kx_sum


@triton.jit
def row_statistics(
    x_ptrs, target_ptrs, weight_ptr, mask_rows, stride_xc, stride_tc, stride_weight, smoothing, softcap, C,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ONLINE: tl.constexpr,
    ACCUMULATOR: tl.constexpr, PROBABILITIES: tl.constexpr, SPREAD: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Of each row (ROWS,): maximum m and Σ exp(x - m); SPREAD, also Σ k and Σ k (x - m). The row is read once.

    x_ptrs, target_ptrs: where the rows begin. ONLINE: in steps, all but the last without a mask of columns.
    """
    STEP: tl.constexpr = CHUNKS * LANES * VECTOR
    nothing = tl.zeros((ROWS, LANES), ACCUMULATOR)
    state = (nothing - float("inf"), nothing, nothing, nothing)
    whole = C // STEP * STEP if ONLINE else 0
    if ONLINE:
        for first in range(0, whole, STEP):
            state = _add_step(
                state, first, x_ptrs, target_ptrs, weight_ptr, mask_rows, stride_xc, stride_tc, stride_weight,
                smoothing, softcap, C, CHUNKS, LANES, VECTOR, ACCUMULATOR, PROBABILITIES, SPREAD, EVICTION, True,
            )  # fmt: skip
    if whole < C:
        state = _add_step(
            state, whole, x_ptrs, target_ptrs, weight_ptr, mask_rows, stride_xc, stride_tc, stride_weight,
            smoothing, softcap, C, CHUNKS, LANES, VECTOR, ACCUMULATOR, PROBABILITIES, SPREAD, EVICTION, False,
        )  # fmt: skip
    m, s, k_sum, kx_sum = state
    row_m = tl.max(m, 1)
    base = finite_or_0(row_m)[:, None]
    s = tl.sum(s * tl.exp2((m - base) * LOG2_E), 1)
    return row_m, s, tl.sum(k_sum, 1), tl.sum(kx_sum + (finite_or_0(m) - base) * k_sum, 1)


@triton.jit
def of_all_tiles(
    partial_ptr, rows, mask, M, tiles, plane, SPREAD: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr
):
    """Of each row of logits: maximum m and Σ exp(x - m); SPREAD, also Σ k (x - m) and Σ k. Read once, (TILES, ROWS)."""
    m = tl.full((ROWS,), -float("inf"), partial_ptr.dtype.element_ty)
    s = tl.zeros_like(m)
    kx_sum = tl.zeros_like(m)
    k_sum = tl.zeros_like(m)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        here = (tile < tiles)[:, None] & mask[None, :]
        ptrs = partial_ptr + tile[:, None] * tl.cast(M, tl.int64) + rows[None, :]
        tile_m = tl.load(ptrs, mask=here, other=-float("inf"))
        tile_s = tl.load(ptrs + plane, mask=here, other=0.0)
        larger = tl.maximum(m, tl.max(tile_m, 0))
        base = finite_or_0(larger)
        tile_base = finite_or_0(tile_m) - base[None, :]
        shift = finite_or_0(m) - base
        if SPREAD:
            tile_k = tl.load(ptrs + 3 * plane, mask=here, other=0.0)
            kx_sum += shift * k_sum + tl.sum(tl.load(ptrs + 2 * plane, mask=here, other=0.0) + tile_base * tile_k, 0)
            k_sum += tl.sum(tile_k, 0)
        s = s * tl.exp2((m - base) * LOG2_E) + tl.sum(tile_s * tl.exp2((tile_m - base[None, :]) * LOG2_E), 0)
        m = larger
    return m, s, kx_sum, k_sum


@triton.jit
def row_losses(
    m, s, k_sum, kx_sum, target, x_target, w_target, smoothing, z_loss, C,
    PROBABILITIES: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """The loss of each row, log-sum-exp and Σ k; NaN where the label is out of range.

    target, its logit and its weight are a class's, and not looked at with probabilities.
    """
    log_s = tl.log(s)
    lse = log_s + finite_or_0(m)
    if PROBABILITIES:
        loss = log_s * k_sum - kx_sum
    else:
        loss = (log_s - (x_target - m)) * w_target
        if smoothing is not None:
            share = smoothing / tl.cast(C, ACCUMULATOR)
            loss = loss * (1.0 - smoothing) + (log_s * k_sum - kx_sum) * share
            k_sum = k_sum * share + w_target * (1.0 - smoothing)
        else:
            k_sum = w_target
        loss = tl.where((target >= 0) & (target < C), loss, float("nan"))
    if z_loss is not None:
        loss += lse * lse * z_loss
    return loss, lse, k_sum


def rows_after(x):
    """How many rows follow each other in memory; 1 where the classes of a row do."""
    x = around_classes(x)
    return x.shape[2] if x.stride(2) == 1 != x.stride(1) else 1


def rows_along(columns, after, elements, vector):
    """Rows, lanes and columns of a program of 128 threads that reads along the rows, each thread a vector of them."""
    rows = min(power_of_2(after), max(64, 2048 // columns))
    lanes = min(columns, max(1, 128 * vector // rows))
    return rows, lanes, min(columns, lanes * elements // vector)


def target_of(target, A, B):
    """A class for each row or, as probabilities, a number for each logit; strides along A, B and C."""
    if target.is_floating_point():
        target = around_classes(target)
        return target, row_strides(target)
    target, strides = by_row(target, A, B)
    return target, (*strides, 0)


def alignment(*tensors):
    """What divides the length and the strides of their rows, up to 16: the JIT asks for 16, and 1000 is 8 times 125."""
    if any(t.stride(1) != 1 for t in tensors):
        return 1
    return math.gcd(tensors[0].shape[1], *(t.stride(2) for t in tensors), 16)


def vector_of(aligned, itemsize, config):
    """How many logits a thread loads at once, and how often in a step."""
    vector = min(aligned, 16 // itemsize, config.columns // config.lanes)
    return {"VECTOR": vector, "CHUNKS": config.columns // (config.lanes * vector), "LANES": config.lanes}


def numbers_of(dtype, *numbers):
    """The numbers as arguments, None where the option is off."""
    return tuple(as_arguments((number,), dtype)[0] if number else None for number in numbers)
