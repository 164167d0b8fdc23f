"""A gated pair: y = act(gate) * up, and its backward with both gradients, at any rank and strides.

Bytes: 3 n forward, 5 n backward, one launch each. The tensors are walked as (before, channel, after), as an activation
alone is, in the memory order of the result, which keeps gate's strides; gate and up, often the two halves of one
tensor, are read in place.
"""

import torch
import triton
import triton.language as tl

from .elementwise import tile_places, walkable
from .launch import launch
from .metadata import told
from .tiles import blocks_of, narrow
from .workspace import accumulator, as_arguments


@triton.jit(launch_metadata=told(__name__))
def _forward_kernel(
    gate_ptr,  # (B, C, A)
    up_ptr,  # (B, C, A)
    y_ptr,  # (B, C, A)
    B,
    C,
    A,
    stride_yb,
    stride_yc,
    stride_ya,
    stride_gb,
    stride_gc,
    stride_ga,
    stride_ub,
    stride_uc,
    stride_ua,
    act_params,  # a tuple; the name `params` is taken by the function that Triton makes of the signature
    ACT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    tiles_a = blocks_of(A, BLOCK_A)
    tiles_c = blocks_of(C, BLOCK_C)
    rest = tl.program_id(0) // tiles_a
    b, c, a = tile_places(rest // tiles_c, rest % tiles_c, tl.program_id(0) % tiles_a, BLOCK_B, BLOCK_C, BLOCK_A)
    mask = None if EVEN else (b < B) & (c < C) & (a < A)
    gate_ptrs = gate_ptr + b * stride_gb + c * stride_gc + a * stride_ga
    up_ptrs = up_ptr + b * stride_ub + c * stride_uc + a * stride_ua
    gate = tl.load(gate_ptrs, mask=mask).to(ACCUMULATOR)  # (BLOCK_B, BLOCK_C, BLOCK_A)
    up = tl.load(up_ptrs, mask=mask).to(ACCUMULATOR)
    y = ACT(gate, *act_params) * up
    y_ptrs = y_ptr + b * stride_yb + c * stride_yc + a * stride_ya
    tl.store(y_ptrs, narrow(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(launch_metadata=told(__name__))
def _backward_kernel(
    dy_ptr,  # (B, C, A)
    gate_ptr,  # (B, C, A)
    up_ptr,  # (B, C, A), or None where dgate is
    dgate_ptr,  # (B, C, A) or None
    dup_ptr,  # (B, C, A), of dgate's strides, or None
    B,
    C,
    A,
    stride_db,
    stride_dc,
    stride_da,
    stride_dyb,
    stride_dyc,
    stride_dya,
    stride_gb,
    stride_gc,
    stride_ga,
    stride_ub,
    stride_uc,
    stride_ua,
    act_params,
    ACT: tl.constexpr,
    ACT_GRAD: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    tiles_a = blocks_of(A, BLOCK_A)
    tiles_c = blocks_of(C, BLOCK_C)
    rest = tl.program_id(0) // tiles_a
    b, c, a = tile_places(rest // tiles_c, rest % tiles_c, tl.program_id(0) % tiles_a, BLOCK_B, BLOCK_C, BLOCK_A)
    mask = None if EVEN else (b < B) & (c < C) & (a < A)
    dy_ptrs = dy_ptr + b * stride_dyb + c * stride_dyc + a * stride_dya
    gate_ptrs = gate_ptr + b * stride_gb + c * stride_gc + a * stride_ga
    offsets = b * stride_db + c * stride_dc + a * stride_da
    dy = tl.load(dy_ptrs, mask=mask).to(ACCUMULATOR)  # (BLOCK_B, BLOCK_C, BLOCK_A)
    gate = tl.load(gate_ptrs, mask=mask).to(ACCUMULATOR)
    if dgate_ptr is not None:
        up_ptrs = up_ptr + b * stride_ub + c * stride_uc + a * stride_ua
        up = tl.load(up_ptrs, mask=mask).to(ACCUMULATOR)
        dgate = ACT_GRAD(dy * up, gate, *act_params)
        tl.store(dgate_ptr + offsets, narrow(dgate, dgate_ptr.dtype.element_ty), mask=mask)
    if dup_ptr is not None:
        dup = dy * ACT(gate, *act_params)
        tl.store(dup_ptr + offsets, narrow(dup, dup_ptr.dtype.element_ty), mask=mask)


def _is_even(plan):
    """Whether every tile is whole."""
    return all(size % block == 0 for size, block in zip(plan.sizes, plan.block, strict=True))


def forward(gate, up, act, params, config):
    """gate, up (*) of one shape -> y of that shape and gate's strides. One launch."""
    y = torch.empty_like(gate)
    if y.numel() == 0:
        return y
    plan, (gate, up) = walkable(y, [gate, up], None, config.elements)
    y_strides, gate_strides, up_strides = plan.strides
    launch(
        _forward_kernel, (plan.tiles(0) * plan.tiles(1) * plan.tiles(2),),
        gate, up, y,
        *plan.sizes,
        *y_strides, *gate_strides, *up_strides,
        as_arguments(params, y.dtype),
        ACT=act, ACCUMULATOR=accumulator(y.dtype), EVEN=_is_even(plan),
        BLOCK_B=plan.block[0], BLOCK_C=plan.block[1], BLOCK_A=plan.block[2],
        num_warps=config.num_warps,
    )  # fmt: skip
    return y


def backward(dy, gate, up, act, act_grad, params, want_dgate, want_dup, config):
    """dy, gate, up (*) of one shape -> dgate and dup of gate's strides, or None where not wanted. One launch."""
    dgate = torch.empty_like(gate) if want_dgate else None
    dup = torch.empty_like(gate) if want_dup else None
    if gate.numel() == 0:
        return dgate, dup
    plan, (dy, gate, up) = walkable(dup if dgate is None else dgate, [dy, gate, up], None, config.elements)
    strides, dy_strides, gate_strides, up_strides = plan.strides
    launch(
        _backward_kernel, (plan.tiles(0) * plan.tiles(1) * plan.tiles(2),),
        dy, gate, up if want_dgate else None, dgate, dup,
        *plan.sizes,
        *strides, *dy_strides, *gate_strides, *up_strides,
        as_arguments(params, gate.dtype),
        ACT=act, ACT_GRAD=act_grad, ACCUMULATOR=accumulator(gate.dtype), EVEN=_is_even(plan),
        BLOCK_B=plan.block[0], BLOCK_C=plan.block[1], BLOCK_A=plan.block[2],
        num_warps=config.num_warps,
    )  # fmt: skip
    return dgate, dup
