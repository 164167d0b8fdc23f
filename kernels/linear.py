"""y = act(x Wᵀ + b) in one launch, and the products of its backward.

Work M N K multiply-adds; bytes at least those of x, W, b and y once each (and z where the derivative needs the
pre-activation). One kernel serves three products, since every operand is read through its strides:
y = act(x Wᵀ + b), dx = dz (Wᵀ)ᵀ and dW = dzᵀ (xᵀ)ᵀ. Another reads the same through the copy engine of a chip that has
one, its programs taking tile after tile.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import bias_activation
from .activations import identity
from .launch import by_triton, launch
from .metadata import product_flops, told
from .products import product_by_descriptors, product_by_pointers
from .tiles import blocks_of, grouped_tile, halves, narrow
from .workspace import accumulator, as_arguments, cdiv, slope_stride

GROUP_M = 8  # rows of tiles that are taken together


class Tile(NamedTuple):
    """How a product is taken.

    precision: of `tl.dot`, or tf32x3. programs: where the copy engine brings the operands, how many programs take
    tile after tile; 0 where each tile is a program's own and read by its threads. specialized: warps share out
    copying, products and epilogue.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"
    programs: int = 0
    specialized: bool = False


@triton.jit(launch_metadata=told(__name__, product_flops))
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
    X_BY_K: tl.constexpr,
    W_BY_K: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    N = N // ALIGNED_N * ALIGNED_N  # the same number, known to the compiler as a multiple
    pid_m, pid_n = grouped_tile(tl.program_id(0), blocks_of(M, BLOCK_M), blocks_of(N, BLOCK_N), GROUP_M)
    z = product_by_pointers(
        x_ptr, w_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
        PRECISION, ACCUMULATOR, X_BY_K, W_BY_K, ALIGNED, OFFSET, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    _store_tile(
        z, rows, pid_n, b_ptr, slope_ptr, y_ptr, z_ptr, M, N, stride_b, stride_slope, act_params,
        ACT, BLOCK_N, BLOCK_N > 128,
    )  # fmt: skip


@triton.jit(launch_metadata=told(__name__, product_flops))
def _forward_tiles_kernel(
    x_desc,  # (M, K), or its transpose
    w_desc,  # (N, K), or its transpose
    b_ptr,  # (N,) or None
    slope_ptr,  # (N,) or None
    y_ptr,  # (M, N), rows contiguous
    z_ptr,  # (M, N) as y, or None
    M,
    N,
    K,
    stride_b,
    stride_slope,
    act_params,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    X_BY_K: tl.constexpr,
    W_BY_K: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):  # fmt: skip
    N = N // ALIGNED_N * ALIGNED_N  # the same number, known to the compiler as a multiple
    tiles_m = blocks_of(M, BLOCK_M)
    tiles_n = blocks_of(N, BLOCK_N)
    # Not flattened into one loop with the product's: that compiles to twice the code.
    for number in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=False, warp_specialize=SPECIALIZED
    ):
        pid_m, pid_n = grouped_tile(number, tiles_m, tiles_n, GROUP_M)
        z = product_by_descriptors(
            x_desc, w_desc, pid_m * BLOCK_M, pid_n * BLOCK_N, K, X_BY_K, W_BY_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        _store_tile(
            z, rows, pid_n, b_ptr, slope_ptr, y_ptr, z_ptr, M, N, stride_b, stride_slope, act_params,
            ACT, BLOCK_N, (BLOCK_N > 128) & (not SPECIALIZED),
        )  # fmt: skip


@triton.jit
def _store_tile(
    z, rows, pid_n, b_ptr, slope_ptr, y_ptr, z_ptr, M, N, stride_b, stride_slope, act_params,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr, QUARTERED: tl.constexpr,
):  # fmt: skip
    """By quarters where the tile is wide: the epilogue of all of it takes more registers than a thread has."""
    if QUARTERED:
        left, right = halves(z)
        quarters = halves(left) + halves(right)
        for q in tl.static_range(4):
            cols = pid_n.to(tl.int64) * BLOCK_N + q * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            _store_activated(
                quarters[q], rows, cols, b_ptr, slope_ptr, y_ptr, z_ptr, M, N, stride_b, stride_slope, act_params, ACT
            )
    else:
        cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
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


def forward(x, w, b, act, params, slope, config, save_z, shape=None):
    """x (M, K), w (N, K), b (N,) or None, slope (N,) or (1,) or None -> y (M, N) and z (M, N) or None.

    z, the pre-activation, is stored where `save_z` asks for it. Both come in `shape` where rows have more dimensions.
    One launch, and none for an empty result. Without a `config` the product with its bias is the library's, and one
    launch more activates it.
    """
    (M, K), N = x.shape, w.shape[0]
    if config is None:
        return _activated_by_library(x, w, b, act, params, slope, save_z, shape)
    y = x.new_empty(shape or (M, N))
    z = x.new_empty(y.shape) if save_z else None
    if y.numel() == 0:
        return y, z
    tiles = cdiv(M, config.block_m) * cdiv(N, config.block_n)
    x_by_k, w_by_k = x.stride(1) == 1, w.stride(1) == 1
    constants = {
        "ACT": act, "PRECISION": config.precision, "X_BY_K": x_by_k, "W_BY_K": w_by_k, "ALIGNED_N": math.gcd(N, 16),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": GROUP_M,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if config.programs:
        by_triton(
            _forward_tiles_kernel, (min(tiles, config.programs),),
            described(x, x_by_k, config.block_m, config.block_k),
            described(w, w_by_k, config.block_n, config.block_k),
            b, slope, y, z,
            M, N, K,
            slope_stride(b), slope_stride(slope),
            as_arguments(params, x.dtype),
            SPECIALIZED=config.specialized, **constants,
        )  # fmt: skip
    else:
        launch(
            _forward_kernel, (tiles,),
            x, w, b, slope, y, z,
            M, N, K,
            *x.stride(), *w.stride(), slope_stride(b), slope_stride(slope),
            as_arguments(params, x.dtype),
            ACCUMULATOR=accumulator(x.dtype), EVEN_K=K % config.block_k == 0,
            **as_offsets(x, x_by_k, w, w_by_k, config), **constants,
        )  # fmt: skip
    return y, z


def _activated_by_library(x, w, b, act, params, slope, save_z, shape):
    z = _by_library(x, w, b, shape)
    rows = z if shape is None else z.view(len(x), len(w))
    if not save_z:
        bias_activation.activated(rows, act, params, slope, into=rows)
        return z, None
    y = torch.empty_like(z)
    bias_activation.activated(rows, act, params, slope, into=y.view(rows.shape))
    return y, z


def _by_library(x, w, b, shape):
    """The result is no view, which would forbid a user to change it in place."""
    if shape is None:
        return torch.mm(x, w.t()) if b is None else torch.addmm(b, x, w.t())
    z = x.new_empty(shape)
    rows = z.view(len(x), len(w))
    if b is None:
        torch.mm(x, w.t(), out=rows)
    else:
        torch.addmm(b, x, w.t(), out=rows)
    return z


def product(a, b, config):
    """a (M, K) @ b (K, N) -> (M, N), any strides, in one launch, the library's without a `config`."""
    if config is None:
        return torch.mm(a, b)
    return bare(a, b.t(), None, config)


def bare(x, w, b, config, shape=None):
    """x (M, K), w (N, K), b (N,) or None -> x Wᵀ + b (M, N), or in `shape`. One launch."""
    if config is None:
        return _by_library(x, w, b, shape)
    y, _ = forward(x, w, b, identity, (), None, config, save_z=False, shape=shape)
    return y


def as_offsets(x, x_by_k, w, w_by_k, config):
    """What the compiler is told of the operands x (M, K) and w (N, K): alignment and reach."""
    outer = x.stride(0 if x_by_k else 1), w.stride(0 if w_by_k else 1)
    farthest = max(*x.stride(), *w.stride()) * max(config.block_m, config.block_n, config.block_k)
    return {"ALIGNED": math.gcd(x.shape[1], *outer, 16), "OFFSET": tl.int32 if farthest < 2**30 else tl.int64}


def described(t, by_k, block, block_k):
    """An operand (rows, K) for the copy engine: as it is where its memory runs along K, else its transpose."""
    return TensorDescriptor.from_tensor(t if by_k else t.t(), [block, block_k] if by_k else [block_k, block])


def is_aligned(t):
    """Whether the lines of an operand (rows, K) run along one dimension and each begins at 16 bytes."""
    along, outer = sorted(t.stride())
    return along == 1 and outer * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0


def as_rows(x):
    """x (*, K) -> (M, K), a view where the strides allow one."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]
