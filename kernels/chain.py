"""From a linear layer's dz to that of the layer before it, dz = act'(saved) · (dz_next W), with db and the slope's.

The derivative is taken in the product's epilogue, so that dy, which is the product, never reaches memory. Bytes: those
of dz_next, W, saved and dz once each, 2 M N fewer than a product with a pass after it. Where the layer saved its
pre-activation, its output, which the weight's gradient needs, is made anew beside dz. One launch; the sums are each
tile's own, added by the last tile of a block of columns in the tiles' order.
"""

import math

import triton
import triton.language as tl

from . import bias_activation
from .activations import prelu_slope_grad
from .bias_activation import add_partials, store_partials
from .launch import by_triton, launch
from .linear import GROUP_M, as_offsets, described, product
from .metadata import product_flops, told
from .products import product_by_descriptors, product_by_pointers
from .tiles import blocks_of, grouped_tile, halves, narrow
from .workspace import accumulator, as_arguments, cdiv, slope_stride, tickets, wide

SUMMED = 32  # partials that are added at once


@triton.jit(launch_metadata=told(__name__, product_flops))
def _backward_kernel(
    dz_next_ptr,  # (M, K)
    w_ptr,  # (N, K): the next layer's Wᵀ
    saved_ptr,  # (M, N), rows contiguous: y or z
    slope_ptr,  # (N,) or None
    dz_ptr,  # (M, N), rows contiguous
    y_ptr,  # (M, N) as dz, or None
    db_ptr,  # (N,) or None
    dslope_ptr,  # (N,) or (1,) or None
    partial_ptr,  # (2, tiles along M, N): sums of dz, sums for the slope
    tickets_ptr,  # (tiles along N + 1,)
    M,
    N,
    K,
    stride_dzm,
    stride_dzk,
    stride_wn,
    stride_wk,
    stride_slope,
    act_params,
    ACT: tl.constexpr,
    ACT_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    X_BY_K: tl.constexpr,
    W_BY_K: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONE_SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    N = N // ALIGNED_N * ALIGNED_N  # the same number, known to the compiler as a multiple
    pid_m, pid_n = grouped_tile(tl.program_id(0), blocks_of(M, BLOCK_M), blocks_of(N, BLOCK_N), GROUP_M)
    dy = product_by_pointers(
        dz_next_ptr, w_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, K, stride_dzm, stride_dzk, stride_wn, stride_wk,
        PRECISION, ACCUMULATOR, X_BY_K, W_BY_K, ALIGNED, OFFSET, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _store_tile(
        dy, pid_m, pid_n, saved_ptr, slope_ptr, dz_ptr, y_ptr, db_ptr, dslope_ptr, partial_ptr, tickets_ptr,
        M, N, stride_slope, act_params, ACT, ACT_GRAD, ONE_SLOPE, BLOCK_M, BLOCK_N, SUMMED,
    )  # fmt: skip


@triton.jit(launch_metadata=told(__name__, product_flops))
def _backward_tiles_kernel(
    dz_next_desc,  # (M, K), or its transpose
    w_desc,  # (N, K): the next layer's Wᵀ, or its transpose
    saved_ptr,  # (M, N), rows contiguous: y or z
    slope_ptr,  # (N,) or None
    dz_ptr,  # (M, N), rows contiguous
    y_ptr,  # (M, N) as dz, or None
    db_ptr,  # (N,) or None
    dslope_ptr,  # (N,) or (1,) or None
    partial_ptr,  # (2, tiles along M, N): sums of dz, sums for the slope
    tickets_ptr,  # (tiles along N + 1,)
    M,
    N,
    K,
    stride_slope,
    act_params,
    ACT: tl.constexpr,
    ACT_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    X_BY_K: tl.constexpr,
    W_BY_K: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    ONE_SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    N = N // ALIGNED_N * ALIGNED_N  # the same number, known to the compiler as a multiple
    tiles_m = blocks_of(M, BLOCK_M)
    tiles_n = blocks_of(N, BLOCK_N)
    for number in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=False):
        pid_m, pid_n = grouped_tile(number, tiles_m, tiles_n, GROUP_M)
        dy = product_by_descriptors(
            dz_next_desc, w_desc, pid_m * BLOCK_M, pid_n * BLOCK_N, K,
            X_BY_K, W_BY_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _store_tile(
            dy, pid_m, pid_n, saved_ptr, slope_ptr, dz_ptr, y_ptr, db_ptr, dslope_ptr, partial_ptr, tickets_ptr,
            M, N, stride_slope, act_params, ACT, ACT_GRAD, ONE_SLOPE, BLOCK_M, BLOCK_N, SUMMED,
        )  # fmt: skip


@triton.jit
def _store_tile(
    dy, pid_m, pid_n, saved_ptr, slope_ptr, dz_ptr, y_ptr, db_ptr, dslope_ptr, partial_ptr, tickets_ptr,
    M, N, stride_slope, act_params, ACT: tl.constexpr, ACT_GRAD: tl.constexpr, ONE_SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """By quarters where the tile is wide: the epilogue of all of it takes more registers than a thread has."""
    shares = blocks_of(M, BLOCK_M)
    if BLOCK_N > 64:
        left, right = halves(dy)
        quarters = halves(left) + halves(right)
        for q in tl.static_range(4):
            cols = pid_n.to(tl.int64) * BLOCK_N + q * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            _store_gradient(
                quarters[q], pid_m, shares, cols, saved_ptr, slope_ptr, dz_ptr, y_ptr, db_ptr, dslope_ptr, partial_ptr,
                M, N, stride_slope, act_params, ACT, ACT_GRAD, BLOCK_M,
            )  # fmt: skip
    else:
        cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        _store_gradient(
            dy, pid_m, shares, cols, saved_ptr, slope_ptr, dz_ptr, y_ptr, db_ptr, dslope_ptr, partial_ptr,
            M, N, stride_slope, act_params, ACT, ACT_GRAD, BLOCK_M,
        )  # fmt: skip
    add_partials(
        db_ptr, dslope_ptr, partial_ptr, tickets_ptr, shares, pid_n, blocks_of(N, BLOCK_N),
        N, pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), ONE_SLOPE, SUMMED, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _store_gradient(
    dy, pid_m, shares, cols, saved_ptr, slope_ptr, dz_ptr, y_ptr, db_ptr, dslope_ptr, partial_ptr,
    M, N, stride_slope, act_params, ACT: tl.constexpr, ACT_GRAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dz, and y where wanted, at the columns of the products dy, and their sums over the tile's rows."""
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets = rows[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    saved = tl.load(saved_ptr + offsets, mask=mask, other=0.0).to(dy.dtype)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + cols * stride_slope, mask=cols < N, other=0.0).to(dy.dtype)[None, :]
        dz = ACT_GRAD(dy, saved, slope)
    else:
        dz = ACT_GRAD(dy, saved, *act_params)
    tl.store(dz_ptr + offsets, narrow(dz, dz_ptr.dtype.element_ty), mask=mask)
    if y_ptr is not None:
        y = ACT(saved, slope) if slope_ptr is not None else ACT(saved, *act_params)
        tl.store(y_ptr + offsets, narrow(y, y_ptr.dtype.element_ty), mask=mask)
    db = tl.sum(tl.where(mask, dz, 0.0), 0) if db_ptr is not None else 0.0
    dslope = tl.sum(tl.where(mask, prelu_slope_grad(dy, saved), 0.0), 0) if dslope_ptr is not None else 0.0
    store_partials(db, dslope, db_ptr, dslope_ptr, partial_ptr, pid_m, shares, N, cols)


def backward(dz_next, w, saved, act, act_grad, params, slope, from_output, want_db, want_dslope, config, pass_config):
    """dz_next (M, K), w (K, N), saved (M, N) -> dz (M, N), y (M, N), db (N,) or None, dslope as slope or None.

    saved is y where `from_output`, else z. One launch; without a `config` the product is the library's, and one launch
    after it, by `pass_config`, takes the derivative.
    """
    (M, K), N = dz_next.shape, w.shape[1]
    if config is None or saved.numel() == 0:
        dy = product(dz_next, w, None)
        given = dy, saved, act_grad, params, slope, want_db, want_dslope, pass_config
        if from_output:
            dz, db, dslope = bias_activation.backward(*given)
            return dz, saved, db, dslope
        dz, db, dslope, y = bias_activation.backward(*given, act)
        return dz, y, db, dslope
    dz = saved.new_empty((M, N))
    y = saved if from_output else saved.new_empty((M, N))
    db = saved.new_empty(N) if want_db else None
    dslope = slope.new_empty(slope.shape) if want_dslope else None
    tiles_m, tiles_n = cdiv(M, config.block_m), cdiv(N, config.block_n)
    partial = saved.new_empty((2, tiles_m, N), dtype=wide(saved.dtype))
    outputs = saved, slope, dz, None if from_output else y, db, dslope, partial, tickets(saved.device, tiles_n + 1)
    by_n = w.t()
    x_by_k, w_by_k = dz_next.stride(1) == 1, by_n.stride(1) == 1
    constants = {
        "ACT": act, "ACT_GRAD": act_grad, "PRECISION": config.precision, "X_BY_K": x_by_k, "W_BY_K": w_by_k,
        "ALIGNED_N": math.gcd(N, 16), "ONE_SLOPE": slope is not None and slope.numel() == 1,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": GROUP_M,
        "SUMMED": SUMMED, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if config.programs:
        by_triton(
            _backward_tiles_kernel, (min(tiles_m * tiles_n, config.programs),),
            described(dz_next, x_by_k, config.block_m, config.block_k),
            described(by_n, w_by_k, config.block_n, config.block_k),
            *outputs,
            M, N, K,
            slope_stride(slope),
            as_arguments(params, saved.dtype),
            **constants,
        )  # fmt: skip
    else:
        launch(
            _backward_kernel, (tiles_m * tiles_n,),
            dz_next, by_n, *outputs,
            M, N, K,
            *dz_next.stride(), *by_n.stride(), slope_stride(slope),
            as_arguments(params, saved.dtype),
            ACCUMULATOR=accumulator(saved.dtype), EVEN_K=K % config.block_k == 0,
            **as_offsets(dz_next, x_by_k, by_n, w_by_k, config), **constants,
        )  # fmt: skip
    return dz, y, db, dslope
