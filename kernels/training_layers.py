"""A multi-layer perceptron trained for many steps in one launch, by programs that wait for each other.

A step of L layers is 2 L - 1 phases, each ended by a grid barrier: forward, a hidden layer at a time; the head, by rows
the last layer, its loss, and the gradient by what comes into it; that gradient, a layer at a time, down to the first;
all weights. A phase is a list of tiles that are dealt out to the programs.

Within a phase no program reads what another writes: activations and gradients are written in one phase and read in
later ones; a tile of weights is stepped by one program, in a phase where nobody else reads weights; the next step's
rows are fetched during the head, to the other of two places, and the powers of Adam's betas taken there by one program.
So the barriers order all that needs an order, between programs and between the threads of one, whose own barrier is
part of the grid's. Fewer would do with tiles as high as the batch, but these read more for each number.
Sums are taken in one order, whatever the number of programs: a run repeats bit for bit.

784-256-256-10 at batch 100: 121 MFLOP, 33 MB through L2 and 5 barriers a step.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import by_triton
from .metadata import told, training_flops
from .tiles import below, blocks_of, grid_barrier, narrow, widen, within
from .training import RATES
from .workspace import cdiv, power_of_2

POLLS = 2**24  # of a barrier before it gives up, some seconds
MOST_OUTPUTS = 32  # of the last layer: a row's are one tile


class Tile(NamedTuple):
    """rows and cols of activations, height and width of weights; depth: of a product's sum, how much at once."""

    rows: int
    cols: int
    height: int
    width: int
    depth: int
    num_warps: int
    num_stages: int
    registers: int | None  # of a thread, where ptxas must be told
    programs: int


class Run(NamedTuple):
    """The memory that phases share."""

    x: Any  # (rows, inputs)
    y: Any  # (rows, outputs) or, of labels, (rows,)
    order: Any  # (steps, batch)
    flat: Any  # (P,)
    moments: Any  # (moments, P)
    rates: Any  # (RATES,)
    losses: Any  # (steps,)
    inputs: Any  # (L + 1, batch, stride): of each layer; the first layer's are in the first place and the last in turn
    saved: Any  # (L, batch, stride): of a hidden layer, z where the derivative is taken from that
    dz: Any  # (L, batch, stride)
    row_losses: Any  # (batch,)


class Code(NamedTuple):
    """What is compiled in, sizes too: of what is the same in all steps, little is left to keep in registers."""

    loss: Any  # or None
    loss_grad: Any  # or None
    step: Any
    mean: Any
    moments: Any
    precision: Any
    layers: Any
    batch: Any
    stride: Any
    P: Any
    rates: Any
    weight_tiles: Any
    block_batch: Any  # a power of 2, as the next
    block_outputs: Any
    rows: Any
    cols: Any
    height: Any
    width: Any
    depth: Any
    stages: Any


def fits(layers):
    return len(layers) >= 2 and layers[-1].outputs <= MOST_OUTPUTS


def tile(layers, batch, precision, multiprocessors, warp_size, ampere=False):
    """256 threads; programs: as many as have a tile in some phase, one a multiprocessor at most.

    A second stage of bfloat16 operands would pass through registers, and spill on sm_100. ampere: compute capability 8,
    where ptxas would keep to 128 registers and spill, to make room for a second program.
    """
    stages = 1 if precision == "bf16" else 2
    config = Tile(16, 16, 32, 32, 64, 256 // warp_size, stages, registers=255 if ampere else None, programs=1)
    activations = cdiv(batch, config.rows) * max(cdiv(layer.outputs, config.cols) for layer in layers)
    return config._replace(programs=min(multiprocessors, max(activations, _weight_tiles(layers, config))))


def _weight_tiles(layers, config):
    return sum(cdiv(layer.outputs, config.height) * cdiv(layer.inputs, config.width) for layer in layers)


def _visited(args):
    return args["run"].order.numel(), (args["run"].x, args["run"].y)


def _flops(args):
    layers = [(layer.inputs.value, layer.outputs.value) for layer in args["layers"]]
    return training_flops(_visited(args)[0], layers)


@triton.jit(do_not_specialize=["steps"], launch_metadata=told(__name__, _flops, visited=_visited))
def _train_kernel(
    counter_ptr,  # (1,)
    failed_ptr,  # (1,)
    steps,
    run,
    layers,
    code,
    POLLS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    gather(pid, programs, 0, steps, run, layers, code)
    target = programs.to(tl.int64)
    alive = grid_barrier(counter_ptr, target, tl.full((), POLLS, tl.int32))
    step = 0
    while (step < steps) & alive:
        for PHASE in tl.static_range(2 * code.layers - 1):
            phase(PHASE, pid, programs, step, steps, run, layers, code)
            target += programs
            alive &= grid_barrier(counter_ptr, target, tl.where(alive, POLLS, 0))
            pid = tl.where(alive, pid, 0)  # not known before the barrier: no register holds addresses from step to step
        step += 1
    if not alive:
        tl.store(failed_ptr, 1)


# Phases


@triton.jit
def phase(PHASE: tl.constexpr, pid, programs, step, steps, run, layers, code):
    """What a program does between two barriers."""
    if code.layers - 1 > PHASE:
        _hidden(PHASE, pid, programs, step, run, layers, code)
    elif code.layers - 1 == PHASE:
        _head(PHASE, pid, programs, step, run, layers, code)
        if pid == 0:
            _advance(run.rates)
        gather(programs - 1 - pid, programs, step + 1, steps, run, layers, code)
    elif 2 * code.layers - 2 > PHASE:
        _gradient(2 * code.layers - 3 - PHASE, pid, programs, step, run, layers, code)
    else:
        _update(pid, programs, step, run, layers, code)


@triton.jit
def gather(pid, programs, step, steps, run, layers, code):
    """The rows of a step, 0 where there is none, to where its first layer reads them."""
    x_ptr = _inputs(0, step, run, code)
    K = layers[0].inputs
    tiles_k = blocks_of(K, code.width)
    for tile in range(pid, tiles_k * blocks_of(code.batch, code.rows), programs):
        rows, mask_m = _block(tile // tiles_k, code.batch, code.rows)
        k, mask_k = _block(tile % tiles_k, K, code.width)
        which = _load_order(rows, mask_m & below(step, steps, code.rows), step, run, code)
        ptrs = run.x + which[:, None].to(tl.int64) * K + k[None, :]
        x = tl.load(ptrs, mask=(which >= 0)[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
        tl.store(x_ptr + rows[:, None] * code.stride + k[None, :], x, mask=mask_m[:, None] & mask_k[None, :])


@triton.jit
def _hidden(L: tl.constexpr, pid, programs, step, run, layers, code):
    """act(x Wᵀ + b), 0 where there is no row, and what its derivative is taken from."""
    N = layers[L].outputs
    tiles_n = blocks_of(N, code.cols)
    for tile in range(pid, tiles_n * blocks_of(code.batch, code.rows), programs):
        rows, mask_m = _block(tile // tiles_n, code.batch, code.rows)
        cols, mask_n = _block(tile % tiles_n, N, code.cols)
        which = _load_order(rows, mask_m, step, run, code)
        z = _pre_activation(L, rows, mask_m, cols, mask_n, step, run, layers, code)
        y = tl.where((which >= 0)[:, None], layers[L].act(z, *layers[L].act_params), 0.0)
        offsets = rows[:, None] * code.stride + cols[None, :]
        mask = mask_m[:, None] & mask_n[None, :]
        tl.store(_inputs(L + 1, step, run, code) + offsets, y, mask=mask)
        if not layers[L].from_output:
            tl.store(_place(run.saved, L, code) + offsets, z, mask=mask)


@triton.jit
def _head(L: tl.constexpr, pid, programs, step, run, layers, code):
    """By rows: the last layer, its loss, the gradient of its z, and that of the layer before it."""
    N = layers[L].outputs
    K = layers[L].inputs
    cols, mask_n = _block(0, N, code.block_outputs)
    for tile in range(pid, blocks_of(code.batch, code.rows), programs):
        rows, mask_m = _block(tile, code.batch, code.rows)
        which = _load_order(rows, mask_m, step, run, code)
        mask = (which >= 0)[:, None] & mask_n[None, :]
        z = _pre_activation(L, rows, mask_m, cols, mask_n, step, run, layers, code)
        y = layers[L].act(z, *layers[L].act_params)
        loss, dy = _loss_and_gradient(y, which.to(tl.int64), cols, mask, N, run, code)
        dy = dy / _divisor(step, N, run, code)
        dz = layers[L].act_grad(dy, y if layers[L].from_output else z, *layers[L].act_params)
        dz = tl.where(mask, dz, 0.0)
        tl.store(run.row_losses + rows, loss, mask=mask_m)
        dz_ptrs = _place(run.dz, L, code) + rows[:, None] * code.stride + cols[None, :]
        tl.store(dz_ptrs, dz, mask=mask_m[:, None] & mask_n[None, :])
        for first in range(0, blocks_of(K, code.width)):
            k, mask_k = _block(first, K, code.width)
            w_ptrs = run.flat + layers[L].weight + cols[:, None] * K + k[None, :]
            w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
            dx = _dot(dz, w, tl.zeros((code.rows, code.width), tl.float32), code)
            _store_gradient(L - 1, dx, rows, mask_m, k, mask_k, step, run, layers, code)


@triton.jit
def _advance(rates_ptr):
    """The powers of this step, which all read when they update."""
    for i in tl.static_range(2):
        tl.store(rates_ptr + 5 + i, tl.load(rates_ptr + 5 + i) * tl.load(rates_ptr + 2 + i))


@triton.jit
def _gradient(L: tl.constexpr, pid, programs, step, run, layers, code):
    """dz of a hidden layer from that of the layer after it."""
    N = layers[L].outputs
    tiles_n = blocks_of(N, code.cols)
    for tile in range(pid, tiles_n * blocks_of(code.batch, code.rows), programs):
        rows, mask_m = _block(tile // tiles_n, code.batch, code.rows)
        cols, mask_n = _block(tile % tiles_n, N, code.cols)
        dy = _product(
            _place(run.dz, L + 1, code), run.flat + layers[L + 1].weight,
            within(rows, mask_m, code.rows), within(cols, mask_n, code.cols), layers[L + 1].outputs,
            code.stride, 1, N, 1, code,
        )  # fmt: skip
        _store_gradient(L, dy, rows, mask_m, cols, mask_n, step, run, layers, code)


@triton.jit
def _update(pid, programs, step, run, layers, code):
    """The step of every weight and bias, the tiles of all layers in a row; the loss, by the last program."""
    rates = ()
    for i in tl.static_range(code.rates):
        rates += (tl.load(run.rates + i),)
    for tile in range(pid, code.weight_tiles, programs):
        before = 0
        for L in tl.static_range(code.layers):
            tiles = blocks_of(layers[L].outputs, code.height) * blocks_of(layers[L].inputs, code.width)
            if (tile >= before) & (tile < before + tiles):
                _update_tile(L, tile - before, step, rates, run, layers, code)
            before += tiles
    if pid == programs - 1:
        rows, mask = _block(0, code.batch, code.block_batch)
        loss = tl.sum(tl.load(run.row_losses + rows, mask=mask, other=0.0), 0)
        tl.store(run.losses + step, loss / _divisor(step, layers[code.layers - 1].outputs, run, code))


@triton.jit
def _update_tile(L: tl.constexpr, tile, step, rates, run, layers, code):
    """The step of a tile of weights and, with the first of a row of tiles, of its biases."""
    N = layers[L].outputs
    K = layers[L].inputs
    tiles_k = blocks_of(K, code.width)
    n, mask_n = _block(tile // tiles_k, N, code.height)
    k, mask_k = _block(tile % tiles_k, K, code.width)
    dz_ptr = _place(run.dz, L, code)
    g = _product(
        dz_ptr, _inputs(L, step, run, code),
        within(n, mask_n, code.height), within(k, mask_k, code.width), code.batch,
        1, code.stride, code.stride, 1, code,
    )  # fmt: skip
    _step(g, layers[L].weight + n[:, None] * K + k[None, :], mask_n[:, None] & mask_k[None, :], rates, run, code)
    if layers[L].bias is not None:
        if tile % tiles_k == 0:
            _step(_column_sums(dz_ptr, n, mask_n, run, code), layers[L].bias + n, mask_n, rates, run, code)


# Places


@triton.jit
def _block(i, size, BLOCK: tl.constexpr):
    """The i-th block of offsets, and which of these are below the size."""
    offsets = i * BLOCK + tl.arange(0, BLOCK)
    return offsets, offsets < size


@triton.jit
def _place(ptr, i, code):
    return ptr + i * (code.batch * code.stride)


@triton.jit
def _inputs(L: tl.constexpr, step, run, code):
    """Where what goes into a layer stands."""
    return _place(run.inputs, code.layers * (step % 2) if L == 0 else L, code)


@triton.jit
def _load_order(rows, mask, step, run, code):
    """Which row of the data stands in each row of the batch, -1 where there is none."""
    ptrs = run.order + tl.cast(step, tl.int64) * code.batch + rows
    return tl.load(ptrs, mask=mask, other=-1)


@triton.jit
def _divisor(step, outputs, run, code):
    """What losses and gradients are divided by."""
    if code.mean:
        rows, mask = _block(0, code.batch, code.block_batch)
        count = tl.sum((_load_order(rows, mask, step, run, code) >= 0).to(tl.int32), 0)
        if code.loss is not None:
            count *= outputs
        return count.to(tl.float32)
    else:
        return 1.0


# Arithmetic


@triton.jit
def _dot(a, b, c, code):
    if code.precision == "bf16":
        a = widen(narrow(a, tl.bfloat16))
        b = widen(narrow(b, tl.bfloat16))
        return tl.dot(a, b, c, input_precision="ieee")
    else:
        return tl.dot(a, b, c, input_precision=code.precision)


@triton.jit
def _product(a_ptr, b_ptr, rows, cols, K, stride_am, stride_ak, stride_bk, stride_bn, code):
    """These rows and columns of a (M, K) @ b (K, N)."""
    k = tl.arange(0, code.depth)
    a_ptrs = a_ptr + rows[:, None] * stride_am + k[None, :] * stride_ak
    b_ptrs = b_ptr + k[:, None] * stride_bk + cols[None, :] * stride_bn
    c = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for first in tl.range(0, K, code.depth, num_stages=code.stages):
        a = tl.load(a_ptrs, mask=k[None, :] < K - first, other=0.0)
        b = tl.load(b_ptrs, mask=k[:, None] < K - first, other=0.0)
        c = _dot(a, b, c, code)
        a_ptrs += code.depth * stride_ak
        b_ptrs += code.depth * stride_bk
    return c


@triton.jit
def _pre_activation(L: tl.constexpr, rows, mask_m, cols, mask_n, step, run, layers, code):
    """x Wᵀ + b of a layer at these rows and columns."""
    K = layers[L].inputs
    rows = within(rows, mask_m, rows.shape[0])
    cols = within(cols, mask_n, cols.shape[0])
    w_ptr = run.flat + layers[L].weight
    z = _product(_inputs(L, step, run, code), w_ptr, rows, cols, K, code.stride, 1, 1, K, code)
    if layers[L].bias is not None:
        z += tl.load(run.flat + layers[L].bias + cols)[None, :]
    return z


@triton.jit
def _loss_and_gradient(y, which, cols, mask, N, run, code):
    """The loss of each row of outputs, and its gradient by each output, undivided."""
    if code.loss is None:
        label = tl.load(run.y + which, mask=which >= 0, other=0)
        y = tl.where((cols < N)[None, :], y, -float("inf"))
        m = tl.max(y, 1)
        e = tl.exp(y - m[:, None])
        s = tl.sum(e, 1)
        hot = cols[None, :] == label[:, None]
        loss = tl.where(which >= 0, tl.log(s) + (m - tl.sum(tl.where(hot, y, 0.0), 1)), 0.0)
        dy = e / s[:, None] - tl.where(hot, 1.0, 0.0)
    else:
        t = tl.load(run.y + which[:, None] * N + cols[None, :], mask=mask, other=0.0)
        loss = tl.sum(tl.where(mask, code.loss(y, t, None), 0.0), 1)
        dy = code.loss_grad(y, t, None)
    return loss, dy


@triton.jit
def _store_gradient(L: tl.constexpr, dy, rows, mask_m, cols, mask_n, step, run, layers, code):
    """dz of a hidden layer at these rows and columns, 0 where there is no row."""
    which = _load_order(rows, mask_m, step, run, code)
    offsets = rows[:, None] * code.stride + cols[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    saved_ptr = _inputs(L + 1, step, run, code) if layers[L].from_output else _place(run.saved, L, code)
    saved = tl.load(saved_ptr + offsets, mask=mask, other=0.0)
    dz = tl.where((which >= 0)[:, None], layers[L].act_grad(dy, saved, *layers[L].act_params), 0.0)
    tl.store(_place(run.dz, L, code) + offsets, dz, mask=mask)


@triton.jit
def _column_sums(dz_ptr, n, mask_n, run, code):
    total = tl.zeros((code.height,), tl.float32)
    for first in range(0, blocks_of(code.batch, code.depth)):
        rows, mask_m = _block(first, code.batch, code.depth)
        ptrs = dz_ptr + rows[:, None] * code.stride + n[None, :]
        total += tl.sum(tl.load(ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0), 0)
    return total


@triton.jit
def _step(g, offsets, mask, rates, run, code):
    """The optimizer's step of these parameters."""
    w = tl.load(run.flat + offsets, mask=mask, other=0.0)
    m, v = w, w
    if code.moments > 0:
        m = tl.load(run.moments + offsets, mask=mask, other=0.0)
    if code.moments > 1:
        v = tl.load(run.moments + code.P + offsets, mask=mask, other=0.0)
    w, m, v = code.step(w, g, m, v, *rates)
    tl.store(run.flat + offsets, w, mask=mask)
    if code.moments > 0:
        tl.store(run.moments + offsets, m, mask=mask)
    if code.moments > 1:
        tl.store(run.moments + code.P + offsets, v, mask=mask)


def train(x, y, order, flat, moments, rates, losses, failed, layers, objective, rule, precision, config):
    """Trains a network of at least two layers for as many steps as order has, in one launch.

    x (rows, inputs), taken as float32; y (rows, outputs), or labels (rows,) in int64 for cross-entropy; order (steps,
    batch) of int32: the rows that a step visits, -1 where there is none. flat (P,), moments (rule.moments, P) and the
    powers in rates (RATES,), float64, are brought up to the last step; losses (steps,) are written. failed (1,) of
    int32 is set to 1 where programs waited for each other in vain: the rest is then of no use. All are contiguous.

    precision: that of products, as `tl.dot` names it, or bf16 for bfloat16 operands. The programs of the
    configuration must all run at once; with one, nobody waits.
    """
    steps, batch = order.shape
    stride = 16 * cdiv(max(max(layer.inputs, layer.outputs) for layer in layers), 16)
    workspace = flat.new_empty(3 * len(layers) + 1, batch, stride)
    inputs, saved, dz = workspace.split((len(layers) + 1, len(layers), len(layers)))
    run = Run(x, y, order, flat, moments, rates, losses, inputs, saved, dz, flat.new_empty(batch))
    loss, loss_grad, _ = objective.loss or (None,) * 3
    numbers = (
        objective.mean, rule.moments, precision, len(layers), batch, stride, flat.numel(), RATES,
        _weight_tiles(layers, config),
        power_of_2(batch), max(16, power_of_2(layers[-1].outputs)),
        config.rows, config.cols, config.height, config.width, config.depth, config.num_stages,
    )  # fmt: skip
    limits = {"maxnreg": config.registers} if config.registers else {}
    by_triton(
        _train_kernel, (config.programs,),
        flat.new_zeros(1, dtype=torch.int64), failed,
        steps,
        run,
        tuple(map(_compiled, layers)),
        Code(loss, loss_grad, rule.step, *map(tl.constexpr, numbers)),
        POLLS=POLLS,
        num_warps=config.num_warps, num_stages=1, launch_cooperative_grid=True, **limits,
    )  # fmt: skip


def _compiled(layer):
    """Its numbers as constants; its functions are so anyway."""
    numbers = {name: getattr(layer, name) for name in ("inputs", "outputs", "weight", "bias", "from_output")}
    return layer._replace(**{name: tl.constexpr(n) for name, n in numbers.items() if n is not None})
