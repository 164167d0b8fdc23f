"""Losses of one element each, a number between 0 and 1 as its target: binary cross-entropy on logits, on probabilities.

Forward reads every operand once, in one launch, its reduction included; backward reads them again and writes the
gradients that are wanted. All are read in place, whatever their strides: see `walks`.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import logsigmoid
from .launch import launch
from .metadata import flops_each, told
from .tiles import is_last_program, like, log, log1m, log1p_exp, narrow, ordered_sum, sigmoid
from .walks import load, walks
from .workspace import accumulator, cdiv, tickets, wide

PROGRAMS = 1024  # partial sums that one program can add in one tile


class Loss(NamedTuple):
    """Device functions of an element x, its target t and its pos_weight p, which may be None."""

    value: Any
    input_grad: Any
    target_grad: Any


class Tile(NamedTuple):
    block: int
    num_warps: int


def tile(itemsize: int) -> Tile:
    """16 elements a thread; 4 in float64, whose logarithms take more registers."""
    return Tile(512 if itemsize == 8 else 2048, 4)


# Formulas. In those of logits each term is infinite or NaN where torch's is


@triton.jit
def _logits_loss(x, t, p):
    """(1 - t) x - w min(x, 0) + w log(1 + exp(-|x|)) with w = (p - 1) t + 1.

    The first two cancel exactly where the answer is right, and what is left keeps its digits.
    """
    below, rest = tl.minimum(x, 0.0), log1p_exp(x)
    if p is not None:
        weight = (p - 1.0) * t + 1.0
        below, rest = weight * below, weight * rest
    return (1.0 - t) * x - below + rest


@triton.jit
def _logits_grad(x, t, p):
    if p is not None:
        return (p * t + 1.0 - t) * sigmoid(x) - p * t
    else:
        return sigmoid(x) - t


@triton.jit
def _logits_target_grad(x, t, p):
    if p is not None:
        return logsigmoid(-x) - p * logsigmoid(x)
    else:
        return -x


@triton.jit
def _where_probable(x, t, value):
    """NaN where x or t is no number between 0 and 1."""
    return tl.where((tl.minimum(x, 1.0 - x) >= 0) & (tl.minimum(t, 1.0 - t) >= 0), value, float("nan"))


@triton.jit
def _logs(x):
    """log(1 - y) and log y of y = min(x, 1 - x); the latter is at 0 only known to be below -100."""
    y = tl.minimum(x, 1.0 - x)
    return log1m(y), log(y)


@triton.jit
def _probability_loss(x, t, p):
    """-t log x - (1 - t) log(1 - x), each logarithm at least -100."""
    near, far = _logs(x)
    far = tl.maximum(far, like(-100.0, x))
    share = tl.where(x < 0.5, t, 1.0 - t)  # that falls to the far one
    return _where_probable(x, t, share * (near - far) - near)


@triton.jit
def _probability_grad(x, t, p):
    return _where_probable(x, t, (x - t) / tl.maximum((1.0 - x) * x, like(1e-12, x)))


@triton.jit
def _probability_target_grad(x, t, p):
    near, far = _logs(x)
    far = tl.where((x == 0) | (x == 1), like(-float("inf"), x), far)
    return _where_probable(x, t, tl.where(x < 0.5, near - far, far - near))


LOGITS = Loss(_logits_loss, _logits_grad, _logits_target_grad)
PROBABILITIES = Loss(_probability_loss, _probability_grad, _probability_target_grad)


# Kernels


@triton.jit
def losses(ptrs, ways, offsets, mask, LOSS: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """Of the elements at these offsets. ptrs, ways: of input, target, weight and pos_weight, the latter two or None."""
    x = load(ptrs[0], ways[0], offsets, mask, ACCUMULATOR)
    target = load(ptrs[1], ways[1], offsets, mask, ACCUMULATOR)
    pos_weight = None
    if ptrs[3] is not None:
        pos_weight = load(ptrs[3], ways[3], offsets, mask, ACCUMULATOR)
    if ptrs[2] is not None:
        weight = load(ptrs[2], ways[2], offsets, mask, ACCUMULATOR)
        return LOSS(x, target, pos_weight) * weight
    else:
        return LOSS(x, target, pos_weight)


@triton.jit(launch_metadata=told(__name__, flops_each("x_ptr", 8)))
def _forward_kernel(
    x_ptr,  # (n,), as the next three
    target_ptr,
    weight_ptr,  # or None
    pos_weight_ptr,  # or None
    loss_ptr,  # (n,) or, reduced, (1,)
    partial_ptr,  # (programs,) or None
    ticket_ptr,  # (1,)
    n,
    divisor,
    x_walk,
    target_walk,
    weight_walk,
    pos_weight_walk,
    LOSS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    n = n // ALIGNED * ALIGNED  # the same number, known to the compiler as a multiple
    programs = tl.num_programs(0)
    ptrs = (x_ptr, target_ptr, weight_ptr, pos_weight_ptr)
    ways = (x_walk, target_walk, weight_walk, pos_weight_walk)
    cols = tl.arange(0, BLOCK)
    loss_sum = tl.zeros((BLOCK,), ACCUMULATOR)
    whole = n // BLOCK
    if (tl.program_id(0) == whole % programs) & (n % BLOCK > 0):
        offsets = tl.cast(whole, INDEX) * BLOCK + cols
        mask = offsets < n
        loss = losses(ptrs, ways, offsets, mask, LOSS, ACCUMULATOR)
        if partial_ptr is None:
            tl.store(loss_ptr + offsets, narrow(loss, loss_ptr.dtype.element_ty), mask=mask)
        loss_sum += tl.where(mask, loss, 0.0)
    for block in range(tl.program_id(0), whole, programs):
        offsets = tl.cast(block, INDEX) * BLOCK + cols
        loss = losses(ptrs, ways, offsets, tl.full((BLOCK,), True, tl.int1), LOSS, ACCUMULATOR)
        if partial_ptr is None:
            tl.store(loss_ptr + offsets, narrow(loss, loss_ptr.dtype.element_ty))
        loss_sum += loss

    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(loss_sum, 0))
        if is_last_program(ticket_ptr, programs):
            one = tl.arange(0, 1)
            total = tl.sum(ordered_sum(partial_ptr, programs, 1, one, one < 1, MAX_PROGRAMS, 1), 0)
            total = total / tl.cast(divisor, ACCUMULATOR)
            tl.store(loss_ptr, narrow(total, loss_ptr.dtype.element_ty))


@triton.jit(launch_metadata=told(__name__, flops_each("x_ptr", 5)))
def _backward_kernel(
    dloss_ptr,  # (n,), as all others
    x_ptr,
    target_ptr,
    weight_ptr,  # or None
    pos_weight_ptr,  # or None
    dx_ptr,  # or None
    dtarget_ptr,  # or None
    n,
    divisor,
    dloss_walk,
    x_walk,
    target_walk,
    weight_walk,
    pos_weight_walk,
    INPUT_GRAD: tl.constexpr,
    TARGET_GRAD: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = n // ALIGNED * ALIGNED
    offsets = tl.cast(tl.program_id(0), INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dloss = load(dloss_ptr, dloss_walk, offsets, mask, ACCUMULATOR) / tl.cast(divisor, ACCUMULATOR)
    if weight_ptr is not None:
        dloss *= load(weight_ptr, weight_walk, offsets, mask, ACCUMULATOR)
    x = load(x_ptr, x_walk, offsets, mask, ACCUMULATOR)
    target = load(target_ptr, target_walk, offsets, mask, ACCUMULATOR)
    pos_weight = None
    if pos_weight_ptr is not None:
        pos_weight = load(pos_weight_ptr, pos_weight_walk, offsets, mask, ACCUMULATOR)
    if dx_ptr is not None:
        dx = INPUT_GRAD(x, target, pos_weight) * dloss
        tl.store(dx_ptr + offsets, narrow(dx, dx_ptr.dtype.element_ty), mask=mask)
    if dtarget_ptr is not None:
        dtarget = TARGET_GRAD(x, target, pos_weight) * dloss
        tl.store(dtarget_ptr + offsets, narrow(dtarget, dtarget_ptr.dtype.element_ty), mask=mask)


# Launchers


def forward(loss_of, x, target, weight, pos_weight, divisor, config):
    """x and target of one shape; weight and pos_weight, or None, broadcast to it -> loss of that shape. One launch.

    With a divisor, which is no None, the losses are summed, and the sum is divided by it: loss ().
    """
    n = x.numel()
    loss = x.new_empty(x.shape if divisor is None else ())
    if n == 0:
        return loss.fill_(0.0 if divisor else float("nan"))
    programs = min(PROGRAMS, cdiv(n, config.block))
    partial, order = None, None
    if divisor is not None:
        partial = x.new_empty(programs, dtype=wide(x.dtype))
        order = _order_in_memory(x, target)
    tensors, ways, index = walks(x.shape, x, target, weight, pos_weight, order=order)
    launch(
        _forward_kernel, (programs,),
        *tensors, loss, partial, tickets(x.device, 1),
        n, divisor or 1,
        *ways,
        LOSS=loss_of.value, ACCUMULATOR=accumulator(x.dtype), INDEX=index, ALIGNED=math.gcd(n, 16),
        BLOCK=config.block, MAX_PROGRAMS=PROGRAMS,
        num_warps=config.num_warps,
    )  # fmt: skip
    return loss


def _order_in_memory(x, target):
    """Of the dimensions, in which a sum may be taken as well; None for the usual order."""
    if x.is_contiguous() and target.is_contiguous():
        return None
    return sorted(range(x.dim()), key=lambda dim: x.stride(dim) + target.stride(dim), reverse=True)


def backward(loss_of, dloss, x, target, weight, pos_weight, divisor, want_dx, want_dtarget, config):
    """dloss broadcasts to x's shape; the rest as in forward -> dx and dtarget, or None where not wanted. One launch."""
    n = x.numel()
    dx = x.new_empty(x.shape) if want_dx else None
    dtarget = target.new_empty(x.shape) if want_dtarget else None
    if n == 0:
        return dx, dtarget
    tensors, ways, index = walks(x.shape, dloss, x, target, weight, pos_weight)
    launch(
        _backward_kernel, (cdiv(n, config.block),),
        *tensors, dx, dtarget,
        n, divisor,
        *ways,
        INPUT_GRAD=loss_of.input_grad, TARGET_GRAD=loss_of.target_grad, ACCUMULATOR=accumulator(x.dtype), INDEX=index,
        ALIGNED=math.gcd(n, 16), BLOCK=config.block,
        num_warps=config.num_warps,
    )  # fmt: skip
    return dx, dtarget
