"""One linear layer of many inputs trained for many steps in one launch: softmax regression, logistic regression.

Each program keeps a block of W's columns, with its moments, in registers from the first step to the last. In a step it
multiplies these by its columns of the batch, stores the product where all programs read it, and waits at a grid
barrier; then each adds all products in the same order, so that all have the same logits and the same gradient by them,
and updates its own columns. All update the bias, alike.

One barrier a step is enough, since products take two buffers in turn: who stores into one has passed a barrier that
all others reached after they had read it. The rows of a batch are read a step ahead of their use.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import by_triton
from .metadata import told, training_flops
from .tiles import below, grid_barrier
from .workspace import cdiv, power_of_2

PROGRAMS = 128  # at most, since each reads the products of all
POLLS = 2**22  # of a barrier before it gives up


class Tile(NamedTuple):
    block_b: int  # rows of a batch
    block_c: int  # outputs
    block_k: int  # inputs of a program
    num_warps: int
    registers: int | None  # that a thread may take; None where a compiler cannot be told


def tile(inputs: int, outputs: int, batch: int, multiprocessors: int, warp_size: int) -> Tile:
    """A program to a multiprocessor at most, since all must run at once; it may take all registers there.

    AMD's matrix cores, which take float32, want 16 outputs at least.
    """
    nvidia = warp_size == 32
    return Tile(
        block_b=max(16, power_of_2(batch)),
        block_c=max(1 if nvidia else 16, power_of_2(outputs)),
        block_k=max(32, power_of_2(cdiv(inputs, min(PROGRAMS, multiprocessors)))),
        num_warps=256 // warp_size,
        registers=255 if nvidia else None,
    )


def fits(config: Tile) -> bool:
    """Whether registers hold a program's columns of W and of two batches, and all outputs of a batch."""
    block_b, block_c, block_k, *_ = config
    return block_k <= 64 and block_c * block_k <= 1024 and block_b * (block_k + block_c) <= 10240


def _visited(args):
    return args["order_ptr"].numel(), (args["x_ptr"], args["y_ptr"])


def _flops(args):
    return training_flops(_visited(args)[0], [(args["INPUTS"], args["OUTPUTS"])])


@triton.jit(
    do_not_specialize=["steps", "batch", "P", "polls"], launch_metadata=told(__name__, _flops, visited=_visited)
)
def _train_kernel(
    x_ptr,  # (rows, INPUTS)
    y_ptr,  # (rows, OUTPUTS) or, of labels, (rows,)
    order_ptr,  # (steps, batch)
    flat_ptr,  # (P,)
    moments_ptr,  # (MOMENTS, P)
    rates_ptr,  # (7,)
    losses_ptr,  # (steps,)
    products_ptr,  # (2, programs, OUTPUTS, BLOCK_B)
    counter_ptr,  # (1,)
    failed_ptr,  # (1,)
    steps,
    batch,
    P,
    polls,
    act_params,  # a tuple; the name `params` is taken by the function that Triton makes of the signature
    ACT: tl.constexpr,
    ACT_GRAD: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    LOSS: tl.constexpr,  # or None: cross-entropy
    LOSS_GRAD: tl.constexpr,
    MEAN: tl.constexpr,
    STEP: tl.constexpr,
    MOMENTS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,  # or None
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK_B)
    c = tl.arange(0, BLOCK_C)
    k = pid * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_c = c < OUTPUTS
    mask_w = mask_c[:, None] & (k < INPUTS)[None, :]
    w_offsets = WEIGHT + c[:, None] * INPUTS + k[None, :]
    w, m, v = _load_state(flat_ptr, moments_ptr, P, w_offsets, mask_w, MOMENTS)  # (BLOCK_C, BLOCK_K)
    if BIAS is not None:
        b, b_m, b_v = _load_state(flat_ptr, moments_ptr, P, BIAS + c, mask_c, MOMENTS)  # (BLOCK_C,)
    rates = ()
    for i in tl.static_range(7):
        rates += (tl.load(rates_ptr + i),)
    lr, decay, beta1, beta2, eps, power1, power2 = rates

    x = _load_x(x_ptr, _load_rows(order_ptr, 0, steps, batch, BLOCK_B), k, INPUTS)
    step = 0
    while step < steps:
        rows = _load_rows(order_ptr, step, steps, batch, BLOCK_B)
        next_rows = _load_rows(order_ptr, step + 1, steps, batch, BLOCK_B)
        z = tl.dot(x, tl.trans(w), input_precision=PRECISION)
        buffer_ptr = products_ptr + step % 2 * (programs * OUTPUTS * BLOCK_B)
        own_ptrs = buffer_ptr + pid * (OUTPUTS * BLOCK_B) + lanes[:, None] + c[None, :] * BLOCK_B
        tl.store(own_ptrs, z, mask=mask_c[None, :])
        step += 1
        if not grid_barrier(counter_ptr, step * programs, polls):
            tl.store(failed_ptr, 1)
            steps = 0
        t = _load_targets(y_ptr, rows, c, OUTPUTS, LOSS)
        z = _sum_products(buffer_ptr, programs, OUTPUTS * BLOCK_B, BLOCK_B, BLOCK_C)
        next_x = _load_x(x_ptr, next_rows, k, INPUTS)

        if BIAS is not None:
            z += b[:, None]
        y = ACT(z, *act_params)
        mask = mask_c[:, None] & (rows >= 0)[None, :]
        loss, dy = _loss_and_gradient(y, t, mask_c, LOSS, LOSS_GRAD)
        share = 1.0
        if MEAN:
            share /= tl.sum((rows >= 0).to(tl.float32), 0) * (1 if LOSS is None else OUTPUTS)
        if pid == 0:
            tl.store(losses_ptr + step - 1, tl.sum(tl.where(rows >= 0, loss, 0.0), 0) * share)
        dz = tl.where(mask, ACT_GRAD(dy * share, y if FROM_OUTPUT else z, *act_params), 0.0)

        power1 *= beta1
        power2 *= beta2
        dw = tl.dot(dz, x, input_precision=PRECISION)
        w, m, v = STEP(w, dw, m, v, lr, decay, beta1, beta2, eps, power1, power2)
        w = tl.where(mask_w, w, 0.0)  # with eps 0 a weight beyond the edge would become 0 / 0
        if BIAS is not None:
            b, b_m, b_v = STEP(b, tl.sum(dz, 1), b_m, b_v, lr, decay, beta1, beta2, eps, power1, power2)
        x = next_x

    if steps > 0:
        _store_state(flat_ptr, moments_ptr, P, w_offsets, mask_w, w, m, v, MOMENTS)
        if pid == 0:
            tl.store(rates_ptr + 5, power1)
            tl.store(rates_ptr + 6, power2)
            if BIAS is not None:
                _store_state(flat_ptr, moments_ptr, P, BIAS + c, mask_c, b, b_m, b_v, MOMENTS)


@triton.jit
def _load_state(flat_ptr, moments_ptr, P, offsets, mask, MOMENTS: tl.constexpr):
    """Parameters and their moments, 0 where a rule keeps none."""
    w = tl.load(flat_ptr + offsets, mask=mask, other=0.0)
    m = tl.zeros_like(w)
    v = tl.zeros_like(w)
    if MOMENTS > 0:
        m = tl.load(moments_ptr + offsets, mask=mask, other=0.0)
    if MOMENTS > 1:
        v = tl.load(moments_ptr + P + offsets, mask=mask, other=0.0)
    return w, m, v


@triton.jit
def _store_state(flat_ptr, moments_ptr, P, offsets, mask, w, m, v, MOMENTS: tl.constexpr):
    tl.store(flat_ptr + offsets, w, mask=mask)
    if MOMENTS > 0:
        tl.store(moments_ptr + offsets, m, mask=mask)
    if MOMENTS > 1:
        tl.store(moments_ptr + P + offsets, v, mask=mask)


@triton.jit
def _load_rows(order_ptr, step, steps, batch, BLOCK_B: tl.constexpr):
    """The rows that a step visits, -1 where there is none."""
    lanes = tl.arange(0, BLOCK_B)
    ptrs = order_ptr + tl.cast(step, tl.int64) * batch + lanes
    return tl.load(ptrs, mask=(lanes < batch) & below(step, steps, BLOCK_B), other=-1)


@triton.jit
def _load_x(x_ptr, rows, k, INPUTS: tl.constexpr):
    """The program's columns of these rows, (BLOCK_B, BLOCK_K), 0 where there is none."""
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * INPUTS + k[None, :]
    return tl.load(x_ptrs, mask=(rows >= 0)[:, None] & (k < INPUTS)[None, :], other=0.0)


@triton.jit
def _load_targets(y_ptr, rows, c, OUTPUTS: tl.constexpr, LOSS: tl.constexpr):
    """The labels of these rows, (BLOCK_B,), or their targets, (BLOCK_C, BLOCK_B)."""
    if LOSS is None:
        return tl.load(y_ptr + rows, mask=rows >= 0, other=0).to(tl.int32)
    else:
        y_ptrs = y_ptr + rows[None, :].to(tl.int64) * OUTPUTS + c[:, None]
        return tl.load(y_ptrs, mask=(rows >= 0)[None, :] & (c < OUTPUTS)[:, None], other=0.0)


@triton.jit
def _sum_products(buffer_ptr, programs, SIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """The products of all programs, added in their order: (BLOCK_C, BLOCK_B)."""
    BLOCK: tl.constexpr = BLOCK_C * BLOCK_B
    AT_ONCE: tl.constexpr = max(1, min(16, 32768 // BLOCK))  # as many loads as registers are free for
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, programs, AT_ONCE):
        for program in tl.static_range(AT_ONCE):
            ptrs = buffer_ptr + (first + program) * SIZE + offsets
            mask = (offsets < SIZE) & below(first + program, programs, BLOCK)
            total += tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.reshape(total, (BLOCK_C, BLOCK_B))


@triton.jit
def _loss_and_gradient(y, t, mask_c, LOSS: tl.constexpr, LOSS_GRAD: tl.constexpr):
    """Of outputs (BLOCK_C, BLOCK_B): each row's loss, (BLOCK_B,), and the gradient by each output."""
    if LOSS is None:
        y = tl.where(mask_c[:, None], y, -float("inf"))
        m = tl.max(y, 0)
        e = tl.exp(y - m[None, :])
        s = tl.sum(e, 0)
        at_label = tl.arange(0, y.shape[0])[:, None] == t[None, :]
        loss = tl.log(s) + (m - tl.sum(tl.where(at_label, y, 0.0), 0))
        dy = e / s[None, :] - tl.where(at_label, 1.0, 0.0)
    else:
        loss = tl.sum(tl.where(mask_c[:, None], LOSS(y, t, None), 0.0), 0)
        dy = LOSS_GRAD(y, t, None)
    return loss, dy


def train(x, y, order, flat, moments, rates, losses, failed, layers, objective, rule, precision, config):
    """x (rows, inputs), y (rows, outputs) or labels (rows,), order (steps, batch), -1: no row. One launch.

    flat (P,), moments (rule.moments, P) and the beta powers of rates (7,) are updated, losses (steps,) written.
    failed (1,) becomes 1, and parameters are not to be used, where a program waited too long for the others.
    """
    (layer,) = layers
    steps, batch = order.shape
    programs = cdiv(layer.inputs, config.block_k)
    bound = {} if config.registers is None else {"maxnreg": config.registers}
    products = x.new_empty(2, programs, layer.outputs, config.block_b)
    counter = torch.zeros(1, dtype=torch.int32, device=x.device)
    loss, loss_grad = (None, None) if objective.loss is None else objective.loss[:2]
    by_triton(
        _train_kernel, (programs,),
        x, y, order, flat, moments, rates, losses, products, counter, failed,
        steps, batch, flat.numel(), POLLS,
        layer.act_params,
        ACT=layer.act, ACT_GRAD=layer.act_grad, FROM_OUTPUT=layer.from_output, LOSS=loss, LOSS_GRAD=loss_grad,
        MEAN=objective.mean, STEP=rule.step, MOMENTS=rule.moments, WEIGHT=layer.weight, BIAS=layer.bias,
        INPUTS=layer.inputs, OUTPUTS=layer.outputs, PRECISION=precision,
        BLOCK_B=config.block_b, BLOCK_C=config.block_c, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=1, launch_cooperative_grid=True, **bound,
    )  # fmt: skip
