"""y = act(x Wᵀ + b) in one launch, and the products of its backward.

Work M N K multiply-adds; bytes at least those of x, W, b and y once each (and z where the derivative needs the
pre-activation). One kernel serves three products, since every operand is read through its strides:
y = act(x Wᵀ + b), dx = dz (Wᵀ)ᵀ and dW = dzᵀ (xᵀ)ᵀ.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .activations import identity
from .tiles import blocks_of, grouped_tile, halves, narrow, widen, within
from .workspace import as_arguments, cdiv, power_of_2

ACCUMULATOR = {torch.float64: tl.float64}
PROGRAMS_TO_FILL = 128  # about one program for each multiprocessor of the chips in view


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# From large to small, by the operands' bytes: the first that fills the chip is taken, else the last.
TILES = {
    2: ((128, 256, 64, 8), (128, 128, 64, 8), (64, 128, 64, 4), (64, 64, 64, 4), (32, 32, 64, 4)),
    4: ((128, 128, 16, 8), (64, 64, 32, 4), (32, 32, 64, 4)),
    8: ((32, 32, 16, 4),),
}


@lru_cache(4096)
def tile(M: int, N: int, K: int, itemsize: int, shared_memory: int) -> Tile:
    """The tile for an (M, K) by (K, N) product on a chip with that many bytes of shared memory a program."""
    for block_m, block_n, block_k, num_warps in TILES[itemsize]:
        config = Tile(block_m, block_n, min(block_k, max(16, power_of_2(K))), num_warps, num_stages=1)
        stage = (config.block_m + config.block_n) * config.block_k * itemsize
        narrow_enough = block_m <= max(32, power_of_2(M)) and block_n <= max(32, power_of_2(N))
        fills = cdiv(M, block_m) * cdiv(N, block_n) >= PROGRAMS_TO_FILL
        if narrow_enough and fills and 2 * stage <= shared_memory:
            break
    return config._replace(num_stages=min(4, shared_memory // stage))


@triton.jit
def _forward_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    b_ptr,  # (N,) or None
    slope_ptr,  # (N,) or None
    y_ptr,  # (M, N), rows contiguous
    z_ptr,  # (M, N) as y, or None
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    stride_slope,
    act_params,  # a tuple; the name `params` is taken by the function that Triton makes of the signature
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = grouped_tile(tl.program_id(0), blocks_of(M, BLOCK_M), blocks_of(N, BLOCK_N), GROUP_M)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    mask_m = rows < M
    mask_n = cols < N
    # A row or column beyond the edge reads the first one instead, which costs no mask; its result is not stored.
    x_ptrs = x_ptr + within(rows, mask_m, BLOCK_M)[:, None] * stride_xm + k[None, :].to(tl.int64) * stride_xk
    w_ptrs = w_ptr + within(cols, mask_n, BLOCK_N)[None, :] * stride_wn + k[:, None].to(tl.int64) * stride_wk
    x_step = tl.full((), BLOCK_K, tl.int64) * stride_xk
    w_step = tl.full((), BLOCK_K, tl.int64) * stride_wk

    z = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    for first in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)  # (BLOCK_M, BLOCK_K)
            w = tl.load(w_ptrs)  # (BLOCK_K, BLOCK_N)
        else:
            x = tl.load(x_ptrs, mask=k[None, :] < K - first, other=0.0)
            w = tl.load(w_ptrs, mask=k[:, None] < K - first, other=0.0)
        z = tl.dot(widen(x), widen(w), z, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        x_ptrs += x_step
        w_ptrs += w_step

    # By quarters where the tile is wide: the epilogue of all of it takes more registers than a thread has.
    if BLOCK_N > 128:
        left, right = halves(z)
        quarters = halves(left) + halves(right)
        for q in tl.static_range(4):
            quarter_cols = pid_n * BLOCK_N + q * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            _store_activated(
                quarters[q], rows, quarter_cols, b_ptr, slope_ptr, y_ptr, z_ptr,
                M, N, stride_b, stride_slope, act_params, ACT,
            )  # fmt: skip
    else:
        _store_activated(
            z, rows, cols, b_ptr, slope_ptr, y_ptr, z_ptr, M, N, stride_b, stride_slope, act_params, ACT
        )  # fmt: skip


@triton.jit
def _store_activated(
    z, rows, cols, b_ptr, slope_ptr, y_ptr, z_ptr, M, N, stride_b, stride_slope, act_params, ACT: tl.constexpr
):
    """act(z + b) and, where wanted, z + b of the products z at these rows and columns."""
    mask_n = cols < N
    if b_ptr is not None:
        z += tl.load(b_ptr + cols.to(tl.int64) * stride_b, mask=mask_n, other=0.0).to(z.dtype)[None, :]
    offsets = rows[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & mask_n[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + offsets, narrow(z, z_ptr.dtype.element_ty), mask=mask)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + cols.to(tl.int64) * stride_slope, mask=mask_n, other=0.0).to(z.dtype)
        y = ACT(z, slope[None, :])
    else:
        y = ACT(z, *act_params)
    tl.store(y_ptr + offsets, narrow(y, y_ptr.dtype.element_ty), mask=mask)


def forward(x, w, b, act, params, slope, precision, config, save_z):
    """x (*, K), w (N, K), b (N,) or None, slope (N,) or (1,) or None -> y (*, N) and z (*, N) or None.

    z, the pre-activation, is stored where `save_z` asks for it. One launch, and none for an empty result.
    """
    rows = as_rows(x)
    (M, K), N = rows.shape, w.shape[0]
    y = x.new_empty((*x.shape[:-1], N))
    z = x.new_empty(y.shape) if save_z else None
    if y.numel() == 0:
        return y, z
    grid = (cdiv(M, config.block_m) * cdiv(N, config.block_n),)
    _forward_kernel[grid](
        rows, w, b, slope, y, z,
        M, N, K,
        *rows.stride(), *w.stride(), 0 if b is None else b.stride(0), slope_stride(slope),
        as_arguments(params, x.dtype),
        ACT=act, PRECISION=precision, ACCUMULATOR=ACCUMULATOR.get(x.dtype, tl.float32),
        EVEN_K=K % config.block_k == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=8,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y, z


def product(a, b, precision, config):
    """a (M, K) @ b (K, N) -> (M, N), any strides, in one launch."""
    c, _ = forward(a, b.t(), None, identity, (), None, precision, config, save_z=False)
    return c


def as_rows(x):
    """x (*, K) -> (M, K), a view where the strides allow one."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def slope_stride(slope):
    """0 where one slope serves every column."""
    return 0 if slope is None or slope.numel() == 1 else slope.stride(0)
