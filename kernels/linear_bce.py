"""Binary cross-entropy on the logits x wᵀ + b of one output, a row's logit never leaving its program.

A program keeps its rows of x in registers from the logit to dw += dz x, so that loss and gradients together read x
once; with dx they write as much besides. Each program sums dw over its own rows, and those partials are added in
the order of the programs: where they are few by the last program to finish, in the one launch, else in a second.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from .bce import LOGITS
from .launch import launch
from .metadata import told
from .tiles import blocks_of, is_last_program, narrow, ordered_sum
from .workspace import accumulator, cdiv, power_of_2, tickets, wide

WIDEST = {4: 16384, 8: 4096}  # elements of a row that stay in registers, by the accumulator's bytes
LEAST_ROWS = 8  # of a program, where there are so many: its partial sums are then few beside what it reads
ADDED_BY_ONE = 2**14  # partial sums; more take a launch that adds them on the whole chip


class Tile(NamedTuple):
    rows: int
    lanes: int
    num_warps: int
    stages: int
    programs: int


def fits(x):
    """Whether a row of x (*, d) stays in registers, and a warp reads whole lines of x."""
    d = x.shape[-1]
    lanes, widest = power_of_2(d), WIDEST[wide(x.dtype).itemsize]
    if d * x.element_size() % 16:
        widest //= 2  # a mask and a load for every single element take registers too
    return lanes <= widest and (d == 1 or x.stride(-1) == 1 or lanes <= 128)


@lru_cache(4096)
def tile(N: int, d: int, itemsize: int, warp_size: int, multiprocessors: int) -> Tile:
    """32 elements a thread, or 16 in float64; as many programs at once as 128 registers a thread allow.

    Where that is one or two to a multiprocessor, a row comes in while the one before it is worked on: in shared memory
    by copies that a pass of the loop starts at its end, for the pass after the next one, or on AMD in registers.
    """
    lanes, a_thread = power_of_2(d), 128 // itemsize
    rows = min(max(1, 128 * a_thread // lanes), 512, power_of_2(N))
    threads = max(128, rows * lanes // a_thread)
    programs = min(multiprocessors * max(1, 512 // threads), cdiv(N, max(rows, LEAST_ROWS)))
    stages = 1 if threads == 128 else 3 if warp_size == 32 else 2
    return Tile(rows, lanes, threads // warp_size, stages, programs)


def _flops(args):
    """y, and what is wanted of dx and dW, take a multiply-add for each element of x."""
    return 2 * args["x_ptr"].numel() * (1 + (args["dx_ptr"] is not None) + (args["dw_ptr"] is not None))


@triton.jit(launch_metadata=told(__name__, _flops))
def _rows_kernel(
    x_ptr,  # (N, d)
    w_ptr,  # (d,)
    b_ptr,  # (1,) or None
    target_ptr,  # (N,), as the next three
    weight_ptr,  # or None
    pos_weight_ptr,  # or None
    dloss_ptr,  # or None, which is 1
    loss_ptr,  # (N,) or, reduced, (1,); or None
    dx_ptr,  # (N, d) or None
    dw_ptr,  # (d,) or None
    db_ptr,  # (1,) or None
    partial_ptr,  # (programs, d): sums for dw, where that is wanted; then (programs, 2): of losses, for db; or None
    ticket_ptr,  # (1,), or None where another launch adds
    N,
    d,
    divisor,
    stride_xn,
    stride_xd,
    stride_w,
    stride_target,
    stride_weight,
    stride_pos_weight,
    stride_dloss,
    LOSS: tl.constexpr,
    LOGIT_GRAD: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    ADDED_ROWS: tl.constexpr,
    ADDED_COLS: tl.constexpr,
):  # fmt: skip
    d = d // ALIGNED * ALIGNED  # the same number, known to the compiler as a multiple
    stride_xn = stride_xn // ALIGNED * ALIGNED
    programs = tl.num_programs(0)
    cols = tl.arange(0, LANES)
    mask_d = cols < d
    w = tl.load(w_ptr + cols * stride_w, mask=mask_d, other=0.0).to(ACCUMULATOR)
    dw = tl.zeros((ROWS, LANES), ACCUMULATOR)
    db = tl.zeros((ROWS,), ACCUMULATOR)
    loss_sum = tl.zeros((ROWS,), ACCUMULATOR)
    for block in tl.range(tl.program_id(0), blocks_of(N, ROWS), programs, num_stages=STAGES):
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask_n = rows < N
        mask = mask_n[:, None] & mask_d[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_xn + cols[None, :].to(tl.int64) * stride_xd
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACCUMULATOR)  # (ROWS, LANES)
        z = tl.sum(x * w[None, :], 1)
        if b_ptr is not None:
            z += tl.load(b_ptr).to(ACCUMULATOR)
        target = tl.load(target_ptr + rows * stride_target, mask=mask_n, other=0.0).to(ACCUMULATOR)
        share = tl.full((ROWS,), 1.0, ACCUMULATOR)
        if weight_ptr is not None:
            share = tl.load(weight_ptr + rows * stride_weight, mask=mask_n, other=0.0).to(ACCUMULATOR)
        pos_weight = None
        if pos_weight_ptr is not None:
            pos_weight = tl.load(pos_weight_ptr + rows * stride_pos_weight, mask=mask_n, other=0.0).to(ACCUMULATOR)
        if loss_ptr is not None:
            loss = LOSS(z, target, pos_weight) * share
            if partial_ptr is None:
                tl.store(loss_ptr + rows, narrow(loss, loss_ptr.dtype.element_ty), mask=mask_n)
            loss_sum += tl.where(mask_n, loss, 0.0)
        if (dx_ptr is not None) | (dw_ptr is not None) | (db_ptr is not None):
            if dloss_ptr is not None:
                share *= tl.load(dloss_ptr + rows * stride_dloss, mask=mask_n, other=0.0).to(ACCUMULATOR)
            dz = LOGIT_GRAD(z, target, pos_weight) * (share / tl.cast(divisor, ACCUMULATOR))
            dz = tl.where(mask_n, dz, 0.0)
            db += dz
            dw += dz[:, None] * x
            if dx_ptr is not None:
                dx_ptrs = dx_ptr + rows[:, None] * d + cols[None, :]
                tl.store(dx_ptrs, narrow(dz[:, None] * w[None, :], dx_ptr.dtype.element_ty), mask=mask)

    if partial_ptr is not None:
        pid = tl.program_id(0)
        sums_ptr = partial_ptr
        if dw_ptr is not None:
            tl.store(partial_ptr + pid * d + cols, tl.sum(dw, 0), mask=mask_d)
            sums_ptr = partial_ptr + programs * d
        which = tl.arange(0, 2)
        tl.store(sums_ptr + pid * 2 + which, tl.where(which == 0, tl.sum(loss_sum, 0), tl.sum(db, 0)))
        if ticket_ptr is not None:
            if is_last_program(ticket_ptr, programs):
                for first in range(0, blocks_of(d, ADDED_COLS)):
                    _add(loss_ptr, dw_ptr, db_ptr, partial_ptr, programs, d, divisor, first, ADDED_ROWS, ADDED_COLS)


@triton.jit(launch_metadata=told(__name__))
def _add_kernel(
    loss_ptr, dw_ptr, db_ptr, partial_ptr, programs, d, divisor, ADDED_ROWS: tl.constexpr, ADDED_COLS: tl.constexpr
):
    _add(loss_ptr, dw_ptr, db_ptr, partial_ptr, programs, d, divisor, tl.program_id(0), ADDED_ROWS, ADDED_COLS)


@triton.jit
def _add(
    loss_ptr, dw_ptr, db_ptr, partial_ptr, programs, d, divisor, block,
    ADDED_ROWS: tl.constexpr, ADDED_COLS: tl.constexpr,
):  # fmt: skip
    """dw at a block of columns, summed over the programs; the loss and db with the first."""
    sums_ptr = partial_ptr
    if dw_ptr is not None:
        cols = block * ADDED_COLS + tl.arange(0, ADDED_COLS)
        dw = ordered_sum(partial_ptr, programs, d, cols, cols < d, ADDED_ROWS, ADDED_COLS)
        tl.store(dw_ptr + cols, narrow(dw, dw_ptr.dtype.element_ty), mask=cols < d)
        sums_ptr = partial_ptr + programs * d
    if block == 0:
        which = tl.arange(0, 2)
        sums = ordered_sum(sums_ptr, programs, 2, which, which < 2, ADDED_ROWS, 2)
        if loss_ptr is not None:
            loss = tl.sum(tl.where(which == 0, sums, 0.0), 0) / tl.cast(divisor, sums.dtype)
            tl.store(loss_ptr, narrow(loss, loss_ptr.dtype.element_ty))
        if db_ptr is not None:
            tl.store(db_ptr, narrow(tl.sum(tl.where(which == 1, sums, 0.0), 0), db_ptr.dtype.element_ty))


# Launchers


def forward(x, w, b, target, weight, pos_weight, divisor, wanted, config):
    """x (*, d), w (1, d), b (1,) or None, target (*, 1); weight and pos_weight, or None, broadcast to it.

    -> loss, and those of dx (*, d), dw (1, d), db (1,) that are wanted, else None. The losses are summed, and the sum
    is divided by the divisor: loss (). Where that is None: loss (*, 1), and no gradients. At most two launches.
    """
    loss = target.new_empty(target.shape if divisor is None else ())
    tensors = x, w, b, target, weight, pos_weight
    return loss, *_launch(*tensors, None, loss, divisor is not None, divisor or 1, wanted, config)


def backward(dloss, x, w, b, target, weight, pos_weight, divisor, wanted, config):
    """dloss broadcasts to target; the rest as in forward -> dx, dw, db or None. At most two launches."""
    return _launch(x, w, b, target, weight, pos_weight, dloss, None, wanted[1] or wanted[2], divisor, wanted, config)


def _launch(x, w, b, target, weight, pos_weight, dloss, loss, sums, divisor, wanted, config):
    shape, d, programs = target.shape, x.shape[-1], config.programs
    N, want_x, want_w, want_b = target.numel(), *wanted
    rows = x if x.dim() == 2 else x.reshape(N, d)
    stride_xn, stride_xd = d if N == 1 else rows.stride(0), rows.stride(1)
    target, stride_target = _by_row(target, shape)
    weight, stride_weight = _by_row(weight, shape)
    pos_weight, stride_pos_weight = _by_row(pos_weight, shape)
    dloss, stride_dloss = _by_row(dloss, shape)
    dx = x.new_empty(x.shape) if want_x else None
    dw = w.new_empty(w.shape) if want_w else None
    db = b.new_empty(b.shape) if want_b else None
    partials = programs * d if want_w else 0
    one_adds = partials <= ADDED_BY_ONE
    partial = x.new_empty(partials + 2 * programs, dtype=wide(x.dtype)) if sums else None
    added_rows, added_cols = _added_at_once(programs, config.lanes)
    launch(
        _rows_kernel, (programs,),
        rows, w, b, target, weight, pos_weight, dloss, loss, dx, dw, db, partial,
        tickets(x.device, 1) if sums and one_adds else None,
        N, d, divisor,
        stride_xn, stride_xd, w.stride(1), stride_target, stride_weight, stride_pos_weight, stride_dloss,
        LOSS=LOGITS.value, LOGIT_GRAD=LOGITS.input_grad, ACCUMULATOR=accumulator(x.dtype),
        ALIGNED=math.gcd(d, stride_xn, 16), ROWS=config.rows, LANES=config.lanes, STAGES=config.stages,
        ADDED_ROWS=added_rows, ADDED_COLS=added_cols,
        num_warps=config.num_warps,
    )  # fmt: skip
    if sums and not one_adds:
        launch(
            _add_kernel, (cdiv(d, added_cols),),
            loss, dw, db, partial,
            programs, d, divisor,
            ADDED_ROWS=added_rows, ADDED_COLS=added_cols,
            num_warps=4,
        )  # fmt: skip
    return dx, dw, db


@lru_cache(4096)
def _added_at_once(programs, lanes):
    """Of the partial sums, rows and columns."""
    rows = min(128, power_of_2(programs))
    return rows, min(4096 // rows, lanes)


def _by_row(t, shape):
    """A number for each row, or one for all, and how far apart they are."""
    if t is None or t.numel() == 1:
        return t, 0
    if t.dim() != 2 or t.shape != shape:
        t = t.expand(shape).reshape(-1)
    return t, t.stride(0)
