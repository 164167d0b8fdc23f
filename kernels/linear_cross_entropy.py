"""The loss of a head, x Wᵀ + b and cross-entropy of a class, whose logits are never stored: its value, no gradient.

Work M N K multiply-adds. The epilogue of a tile's product leaves of each row its maximum and sum of exponentials, and
the target's logit where the tile has it: 8 bytes for a row and BLOCK_N classes in the place of their logits. One launch
more combines these, the tiles in one order, and reduces.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .class_rows import capped, numbers_of, of_all_tiles
from .launch import by_triton, launch
from .linear import GROUP_M, as_offsets, described
from .metadata import product_flops, told
from .products import product_by_descriptors, product_by_pointers
from .tiles import LOG2_E, blocks_of, finite_or_0, grouped_tile, halves, store_reduced
from .workspace import accumulator, cdiv, slope_stride, tickets, wide

PROGRAMS = 1024  # partial sums that one program can add in one tile


class Tile(NamedTuple):
    """How a product's tiles are combined: so many rows by so many tiles at once."""

    rows: int
    tiles: int
    num_warps: int


def tile() -> Tile:
    """Few rows, so that those of one batch are enough programs to fill a chip."""
    return Tile(16, 64, 4)


@triton.jit(launch_metadata=told(__name__, product_flops))
def _statistics_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    b_ptr,  # (N,) or None
    target_ptr,  # (M,) int64
    weight_ptr,  # (N,) or None
    partial_ptr,  # (2, tiles, M): m and s of each row; smoothed (4, tiles, M): Σ k (x - m) and Σ k too
    x_target_ptr,  # (M,): the target's logit
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    stride_target,
    stride_weight,
    softcap,
    SPREAD: tl.constexpr,
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
    GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = grouped_tile(tl.program_id(0), blocks_of(M, BLOCK_M), blocks_of(N, BLOCK_N), GROUP_M)
    z = product_by_pointers(
        x_ptr, w_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
        PRECISION, ACCUMULATOR, X_BY_K, W_BY_K, ALIGNED, OFFSET, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _store_statistics(
        z, pid_m, pid_n, b_ptr, target_ptr, weight_ptr, partial_ptr, x_target_ptr, M, N,
        stride_b, stride_target, stride_weight, softcap, SPREAD, BLOCK_N > 128, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(launch_metadata=told(__name__, product_flops))
def _statistics_tiles_kernel(
    x_desc,  # (M, K), or its transpose
    w_desc,  # (N, K), or its transpose
    b_ptr,  # (N,) or None
    target_ptr,  # (M,) int64
    weight_ptr,  # (N,) or None
    partial_ptr,  # as above
    x_target_ptr,  # (M,): the target's logit
    M,
    N,
    K,
    stride_b,
    stride_target,
    stride_weight,
    softcap,
    SPREAD: tl.constexpr,
    PRECISION: tl.constexpr,
    X_BY_K: tl.constexpr,
    W_BY_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):  # fmt: skip
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
        _store_statistics(
            z, pid_m, pid_n, b_ptr, target_ptr, weight_ptr, partial_ptr, x_target_ptr, M, N,
            stride_b, stride_target, stride_weight, softcap,
            SPREAD, (BLOCK_N > 128) & (not SPECIALIZED), BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _store_statistics(
    z, pid_m, pid_n, b_ptr, target_ptr, weight_ptr, partial_ptr, x_target_ptr, M, N,
    stride_b, stride_target, stride_weight, softcap,
    SPREAD: tl.constexpr, QUARTERED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What this tile of logits z (BLOCK_M, BLOCK_N), still without its bias, is to the loss of its rows.

    By quarters where the tile is wide: the epilogue of all of it takes more registers than a thread has.
    """
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < M
    target = tl.load(target_ptr + rows * stride_target, mask=mask, other=-1)
    if QUARTERED:
        left, right = halves(z)
        quarters = halves(left) + halves(right)
        m = tl.full((BLOCK_M,), -float("inf"), z.dtype)
        s = tl.zeros_like(m)
        x_target = tl.zeros_like(m)
        kx_sum = tl.zeros_like(m)
        k_sum = tl.zeros_like(m)
        for q in tl.static_range(4):
            cols = pid_n * BLOCK_N + q * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            own_m, own_s, own_x_target, own_kx, own_k = _statistics(
                quarters[q], cols, target, b_ptr, weight_ptr, N, stride_b, stride_weight, softcap, SPREAD
            )
            tl.debug_barrier()  # else the quarters are taken together, and so are their registers
            larger = tl.maximum(m, own_m)
            base = finite_or_0(larger)
            s = s * tl.exp2((m - base) * LOG2_E) + own_s * tl.exp2((own_m - base) * LOG2_E)
            x_target += own_x_target
            if SPREAD:
                kx_sum += (finite_or_0(m) - base) * k_sum + own_kx + (finite_or_0(own_m) - base) * own_k
                k_sum += own_k
            m = larger
    else:
        cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m, s, x_target, kx_sum, k_sum = _statistics(
            z, cols, target, b_ptr, weight_ptr, N, stride_b, stride_weight, softcap, SPREAD
        )
    plane = blocks_of(N, BLOCK_N) * tl.cast(M, tl.int64)
    partial_ptrs = partial_ptr + pid_n * tl.cast(M, tl.int64) + rows
    tl.store(partial_ptrs, m, mask=mask)
    tl.store(partial_ptrs + plane, s, mask=mask)
    if SPREAD:
        tl.store(partial_ptrs + 2 * plane, kx_sum, mask=mask)
        tl.store(partial_ptrs + 3 * plane, k_sum, mask=mask)
    here = (target >= pid_n * BLOCK_N) & (target < tl.minimum(N, (pid_n + 1) * BLOCK_N))
    tl.store(x_target_ptr + rows, x_target, mask=mask & here)


@triton.jit
def _statistics(
    z, cols, target, b_ptr, weight_ptr, N, stride_b, stride_weight, softcap, SPREAD: tl.constexpr
):  # fmt: skip
    """Of each row of products z at these columns: m, Σ exp(x - m), the target's x, Σ k (x - m) and Σ k."""
    mask = cols < N
    if b_ptr is not None:
        z += tl.load(b_ptr + cols.to(tl.int64) * stride_b, mask=mask, other=0.0).to(z.dtype)[None, :]
    z = capped(z, softcap)
    x_target = tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
    m = tl.max(tl.where(mask[None, :], z, -float("inf")), 1)
    z -= finite_or_0(m)[:, None]
    s = tl.sum(tl.where(mask[None, :], tl.exp2(z * LOG2_E), 0.0), 1)
    kx_sum = tl.zeros_like(m)
    k_sum = tl.zeros_like(m)
    if SPREAD:
        k = tl.where(mask, 1.0, 0.0).to(z.dtype)
        if weight_ptr is not None:
            k = tl.load(weight_ptr + cols.to(tl.int64) * stride_weight, mask=mask, other=0.0).to(z.dtype)
        kx_sum += tl.sum(tl.where(mask[None, :], k[None, :] * z, 0.0), 1)
        k_sum += tl.sum(k, 0)
    return m, s, x_target, kx_sum, k_sum


@triton.jit(do_not_specialize=["ignore_index"], launch_metadata=told(__name__))
def _combine_kernel(
    partial_ptr,  # (2, tiles, M) or (4, tiles, M), as from the statistics
    x_target_ptr,  # (M,)
    target_ptr,  # (M,) int64
    weight_ptr,  # (N,) or None
    sample_weight_ptr,  # (M,) or None
    loss_ptr,  # (M,) or, reduced, (1,)
    sums_ptr,  # (programs, 2): sum of losses and of what a mean divides by, or None
    total_ptr,  # (1,): what a mean divides by, or None
    ticket_ptr,  # (1,)
    M,
    N,
    tiles,
    stride_target,
    stride_weight,
    stride_sample,
    ignore_index,
    numbers,  # label smoothing and z_loss, each None where it is off
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    smoothing, z_loss = numbers
    ACCUMULATOR: tl.constexpr = partial_ptr.dtype.element_ty
    plane = tiles * tl.cast(M, tl.int64)
    loss_sum = tl.zeros((ROWS,), ACCUMULATOR)
    weight_sum = tl.zeros((ROWS,), ACCUMULATOR)
    for block in range(tl.program_id(0), blocks_of(M, ROWS), tl.num_programs(0)):
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = rows < M
        m, s, kx_sum, k_sum = of_all_tiles(partial_ptr, rows, mask, M, tiles, plane, smoothing is not None, ROWS, TILES)
        base = finite_or_0(m)
        log_s = tl.log(s)
        target = tl.load(target_ptr + rows * stride_target, mask=mask, other=ignore_index)
        counts = target != ignore_index
        in_range = (target >= 0) & (target < N)
        loss = log_s - (tl.load(x_target_ptr + rows, mask=mask & in_range, other=0.0) - m)
        weight = tl.full((ROWS,), 1.0, ACCUMULATOR)
        if weight_ptr is not None:
            weight_ptrs = weight_ptr + target * stride_weight
            weight = tl.load(weight_ptrs, mask=mask & in_range, other=0.0).to(ACCUMULATOR)
            loss = loss * weight
        if smoothing is not None:
            loss = loss * (1.0 - smoothing) + (log_s * k_sum - kx_sum) * (smoothing / tl.cast(N, ACCUMULATOR))
        loss = tl.where(in_range, loss, float("nan"))
        if z_loss is not None:
            lse = log_s + base
            loss += lse * lse * z_loss
        if sample_weight_ptr is not None:
            sample_weight = tl.load(sample_weight_ptr + rows * stride_sample, mask=mask, other=0.0).to(ACCUMULATOR)
            loss = loss * sample_weight
            weight = weight * sample_weight
        loss = tl.where(counts & mask, loss, 0.0)
        if sums_ptr is None:
            tl.store(loss_ptr + rows, loss, mask=mask)
        loss_sum += loss
        weight_sum += tl.where(counts & mask, weight, 0.0)

    if sums_ptr is not None:
        store_reduced(loss_sum, weight_sum, sums_ptr, ticket_ptr, loss_ptr, total_ptr, MEAN, MAX_PROGRAMS)


def forward(x, w, b, target, weight, sample_weight, ignore_index, reduction, smoothing, z_loss, softcap, config):
    """x (M, K), w (N, K), b (N,) or None, target (M,) int64, weight (N,) or None, sample_weight (M,) or None -> loss.

    The loss is () or, with 'none', (M,), in float32 or wider. config: a product's. Two launches, none for no rows.
    """
    if len(x) == 0:
        shape = (0,) if reduction == "none" else ()
        return x.new_full(shape, float("nan") if reduction == "mean" else 0.0, dtype=wide(x.dtype))
    partial, x_target = statistics(x, w, b, target, weight if smoothing else None, bool(smoothing), softcap, config)
    return combined(
        partial, x_target, target, weight, sample_weight, len(w), ignore_index, reduction, smoothing, z_loss
    )


def statistics(x, w, b, target, weight, spread, softcap, config):
    """As forward -> partial (2, tiles, M), or (4, tiles, M) where k is `spread` over all classes, x_target (M,)."""
    (M, K), N = x.shape, w.shape[0]
    dtype = wide(x.dtype)
    partial = x.new_empty((4 if spread else 2, cdiv(N, config.block_n), M), dtype=dtype)
    x_target = x.new_empty(M, dtype=dtype)
    tiles = cdiv(M, config.block_m) * cdiv(N, config.block_n)
    x_by_k, w_by_k = x.stride(1) == 1, w.stride(1) == 1
    (softcap,) = numbers_of(x.dtype, softcap)
    others = b, target, weight, partial, x_target
    strides = slope_stride(b), target.stride(0), 0 if weight is None else weight.stride(0)
    constants = {
        "SPREAD": spread, "PRECISION": config.precision, "X_BY_K": x_by_k, "W_BY_K": w_by_k,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": GROUP_M,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if config.programs:
        by_triton(
            _statistics_tiles_kernel, (min(tiles, config.programs),),
            described(x, x_by_k, config.block_m, config.block_k),
            described(w, w_by_k, config.block_n, config.block_k),
            *others,
            M, N, K,
            *strides,
            softcap,
            SPECIALIZED=config.specialized, **constants,
        )  # fmt: skip
    else:
        launch(
            _statistics_kernel, (tiles,),
            x, w, *others,
            M, N, K,
            *x.stride(), *w.stride(), *strides,
            softcap,
            ACCUMULATOR=accumulator(x.dtype), EVEN_K=K % config.block_k == 0,
            **as_offsets(x, x_by_k, w, w_by_k, config), **constants,
        )  # fmt: skip
    return partial, x_target


def combined(partial, x_target, target, weight, sample_weight, N, ignore_index, reduction, smoothing, z_loss):
    """The loss, as from forward, of what statistics gave."""
    _, tiles, M = partial.shape
    reduced = reduction != "none"
    loss = partial.new_empty(() if reduced else M)
    config = tile()
    programs = min(PROGRAMS, cdiv(M, config.rows))
    launch(
        _combine_kernel, (programs,),
        partial, x_target, target, weight, sample_weight,
        loss, partial.new_empty((programs, 2)) if reduced else None, partial.new_empty(1) if reduced else None,
        tickets(partial.device, 1),
        M, N, tiles,
        target.stride(0), 0 if weight is None else weight.stride(0),
        0 if sample_weight is None else sample_weight.stride(0),
        ignore_index, numbers_of(partial.dtype, smoothing, z_loss),
        MEAN=reduction == "mean", ROWS=config.rows, TILES=config.tiles, MAX_PROGRAMS=PROGRAMS,
        num_warps=config.num_warps,
    )  # fmt: skip
    return loss
