"""A small network trained for many steps in one launch, by one warp: every parameter and moment is a register.

An activation is a vector over the rows of a batch, one for each unit. A step reads which rows it visits and the rows
themselves, both ahead of their use, and writes its loss; a program is a network, so that thousands train at once.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import by_triton
from .metadata import told, training_flops
from .tiles import below
from .workspace import cdiv, power_of_2

LANES = 32  # of a warp; AMD's have 64, and twice the registers
MOST_ROWS = 128  # of a batch
MOST_NUMBERS = 150  # of a lane, which has 255 registers: as compiled, the first to spill has 169


class Tile(NamedTuple):
    block: int  # rows of a batch, at least
    num_warps: int


def tile(batch: int) -> Tile:
    """One warp: with two, each of a step's many sums would wait at a barrier."""
    return Tile(power_of_2(batch), 1)


def fits(layers, batch, rule):
    """Whether a lane's registers hold the network, its moments, and what they need of each of its rows.

    That is the inputs and targets of this step and the next, what each unit gives, and the gradient of the last ones.
    """
    parameters = len(_places(layers)) * (1 + rule.moments)
    of_a_row = 2 * layers[0].inputs + sum(layer.outputs for layer in layers) + 3 * layers[-1].outputs
    return batch <= MOST_ROWS and parameters + cdiv(batch, LANES) * of_a_row <= MOST_NUMBERS


def _visited(args):
    return args["losses_ptr"].numel() * args["batch"], (args["x_ptr"], args["y_ptr"])  # networks may share an order


def _flops(args):
    layers = [(layer.inputs.value, layer.outputs.value) for layer in args["layers"]]
    return training_flops(_visited(args)[0], layers)


@triton.jit(do_not_specialize=["steps", "batch", "stride_on"], launch_metadata=told(__name__, _flops, visited=_visited))
def _train_kernel(
    x_ptr,  # (rows, inputs)
    y_ptr,  # (rows, outputs) or, of labels, (rows,)
    order_ptr,  # (networks, steps, batch), the last two contiguous
    flat_ptr,  # (networks, P)
    moments_ptr,  # (networks, MOMENTS, P)
    rates_ptr,  # (networks, RATES)
    losses_ptr,  # (networks, steps)
    steps,
    batch,
    stride_on,
    layers,  # a Layer each, its weight and bias as indices of PLACES
    LOSS: tl.constexpr,  # or None, as its gradient
    LOSS_GRAD: tl.constexpr,
    MEAN: tl.constexpr,
    STEP: tl.constexpr,
    MOMENTS: tl.constexpr,
    PLACES: tl.constexpr,  # of each parameter in flat
    P: tl.constexpr,
    RATES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    network = tl.program_id(0).to(tl.int64)
    order_ptr += network * stride_on
    flat_ptr += network * P
    moments_ptr += network * (MOMENTS * P)
    rates_ptr += network * RATES
    losses_ptr += network * steps

    w = _load_each(flat_ptr, PLACES)
    m, v = w, w  # a moment that the rule has not, it hands back
    if MOMENTS > 0:
        m = _load_each(moments_ptr, PLACES)
    if MOMENTS > 1:
        v = _load_each(moments_ptr + P, PLACES)
    lr, decay, beta1, beta2, eps, power1, power2 = _load_each(rates_ptr, (0, 1, 2, 3, 4, 5, 6))

    rows = _load_rows(order_ptr, 0, steps, batch, BLOCK)
    next_rows = _load_rows(order_ptr, 1, steps, batch, BLOCK)
    x, t = _load_batch(x_ptr, y_ptr, rows, layers[0].inputs, layers[-1].outputs, LOSS)
    for step in range(steps):
        rows_after = _load_rows(order_ptr, step + 2, steps, batch, BLOCK)
        next_x, next_t = _load_batch(x_ptr, y_ptr, next_rows, layers[0].inputs, layers[-1].outputs, LOSS)

        mask = rows >= 0
        inputs, saved = _forward(x, w, mask, layers)
        loss, dy = _loss_and_gradient(inputs[-1], t, mask, LOSS, LOSS_GRAD, MEAN)
        tl.store(losses_ptr + step, loss)
        g = _backward(dy, inputs, saved, w, mask, layers)
        power1 *= beta1
        power2 *= beta2
        w, m, v = _updated(w, g, m, v, (lr, decay, beta1, beta2, eps, power1, power2), STEP)

        rows, next_rows, x, t = next_rows, rows_after, next_x, next_t

    _store_each(flat_ptr, w, PLACES)
    if MOMENTS > 0:
        _store_each(moments_ptr, m, PLACES)
    if MOMENTS > 1:
        _store_each(moments_ptr + P, v, PLACES)
    _store_each(rates_ptr, (power1, power2), (5, 6))


# Memory


@triton.jit
def _load_each(ptr, PLACES: tl.constexpr):
    numbers = ()
    for i in tl.static_range(len(PLACES)):
        numbers += (tl.load(ptr + PLACES[i]),)
    return numbers


@triton.jit
def _store_each(ptr, numbers, PLACES: tl.constexpr):
    for i in tl.static_range(len(PLACES)):
        tl.store(ptr + PLACES[i], numbers[i])


@triton.jit
def _load_rows(order_ptr, step, steps, batch, BLOCK: tl.constexpr):
    """The rows that a step visits, -1 where there is none."""
    lane = tl.arange(0, BLOCK)
    ptrs = order_ptr + tl.cast(step, tl.int64) * batch + lane
    return tl.load(ptrs, mask=(lane < batch) & below(step, steps, BLOCK), other=-1)


@triton.jit
def _load_batch(x_ptr, y_ptr, rows, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, LOSS: tl.constexpr):
    """Each input and each target of these rows, 0 where there is none."""
    if LOSS is None:
        t = (tl.load(y_ptr + rows, mask=rows >= 0, other=0),)
    else:
        t = _load_columns(y_ptr, rows, OUTPUTS)
    return _load_columns(x_ptr, rows, INPUTS), t


@triton.jit
def _load_columns(ptr, rows, COLUMNS: tl.constexpr):
    columns = ()
    for i in tl.static_range(COLUMNS):
        columns += (tl.load(ptr + rows.to(tl.int64) * COLUMNS + i, mask=rows >= 0, other=0.0),)
    return columns


# A step


@triton.jit
def _forward(x, w, mask, layers):
    """What goes into each layer and what comes out of the last; what each saves for its derivative."""
    inputs, saved = (x,), ()
    for i in tl.static_range(len(layers)):
        y, kept = _layer(inputs[i], w, mask, layers[i])
        inputs += (y,)
        saved += (kept,)
    return inputs, saved


@triton.jit
def _layer(x, w, mask, layer):
    y, saved = (), ()
    for o in tl.static_range(layer.outputs):
        z = x[0] * w[layer.weight + o * layer.inputs]
        for i in tl.static_range(1, layer.inputs):
            z += x[i] * w[layer.weight + o * layer.inputs + i]
        if layer.bias is not None:
            z += w[layer.bias + o]
        # 0 in a lane without a row, so that its products are 0 whatever the activation makes of the bias alone
        y += (tl.where(mask, layer.act(z, *layer.act_params), 0.0),)
        saved += (y[o] if layer.from_output else z,)
    return y, saved


@triton.jit
def _loss_and_gradient(y, t, mask, LOSS: tl.constexpr, LOSS_GRAD: tl.constexpr, MEAN: tl.constexpr):
    """The loss of a batch, and its gradient by each output."""
    if LOSS is None:
        loss, dy = _cross_entropy(y, t[0])
        terms = 1
    else:
        loss, dy = _of_each(y, t, LOSS, LOSS_GRAD)
        terms = len(y)
    loss = tl.sum(tl.where(mask, loss, 0.0), 0)
    if MEAN:
        share = 1.0 / (tl.sum(mask.to(tl.int32), 0) * terms).to(tl.float32)
        loss *= share
        dy = _scaled(dy, share)
    return loss, dy


@triton.jit
def _scaled(numbers, factor):
    scaled = ()
    for i in tl.static_range(len(numbers)):
        scaled += (numbers[i] * factor,)
    return scaled


@triton.jit
def _of_each(y, t, LOSS: tl.constexpr, LOSS_GRAD: tl.constexpr):
    loss = LOSS(y[0], t[0], None)
    dy = (LOSS_GRAD(y[0], t[0], None),)
    for o in tl.static_range(1, len(y)):
        loss += LOSS(y[o], t[o], None)
        dy += (LOSS_GRAD(y[o], t[o], None),)
    return loss, dy


@triton.jit
def _cross_entropy(y, label):
    """log(sum(exp(y))) - y[label], and softmax(y) less 1 at the label."""
    greatest, at_label = y[0], y[0]
    for o in tl.static_range(1, len(y)):
        greatest = tl.maximum(greatest, y[o])
        at_label = tl.where(label == o, y[o], at_label)
    exps = ()
    total = tl.zeros_like(greatest)
    for o in tl.static_range(len(y)):
        exps += (tl.exp(y[o] - greatest),)
        total += exps[o]
    dy = ()
    for o in tl.static_range(len(y)):
        dy += (exps[o] / total - tl.where(label == o, 1.0, 0.0),)
    return tl.log(total) + (greatest - at_label), dy


@triton.jit
def _backward(dy, inputs, saved, w, mask, layers):
    """The gradient of each parameter."""
    g = ()
    for back in tl.static_range(1, len(layers) + 1):
        dz = _activation_gradient(dy, saved[-back], mask, layers[-back])
        g = _parameter_gradient(dz, inputs[-1 - back], layers[-back]) + g
        if back < len(layers):
            dy = _input_gradient(dz, w, layers[-back])
    return g


@triton.jit
def _activation_gradient(dy, saved, mask, layer):
    dz = ()
    for o in tl.static_range(layer.outputs):
        dz += (tl.where(mask, layer.act_grad(dy[o], saved[o], *layer.act_params), 0.0),)
    return dz


@triton.jit
def _parameter_gradient(dz, x, layer):
    g = ()
    for o in tl.static_range(layer.outputs):
        for i in tl.static_range(layer.inputs):
            g += (tl.sum(dz[o] * x[i], 0),)
    if layer.bias is not None:
        for o in tl.static_range(layer.outputs):
            g += (tl.sum(dz[o], 0),)
    return g


@triton.jit
def _input_gradient(dz, w, layer):
    dx = ()
    for i in tl.static_range(layer.inputs):
        total = dz[0] * w[layer.weight + i]
        for o in tl.static_range(1, layer.outputs):
            total += dz[o] * w[layer.weight + o * layer.inputs + i]
        dx += (total,)
    return dx


@triton.jit
def _updated(w, g, m, v, rates, STEP: tl.constexpr):
    """Each parameter and its moments after a step."""
    w_after, m_after, v_after = (), (), ()
    for i in tl.static_range(len(w)):
        number, first, second = STEP(w[i], g[i], m[i], v[i], *rates)
        w_after += (number,)
        m_after += (first,)
        v_after += (second,)
    return w_after, m_after, v_after


# Launch


def train(x, y, order, flat, moments, rates, losses, layers, objective, rule, config):
    """Trains as many networks as flat has rows, in one launch, for as many steps as losses has columns.

    x (rows, inputs); y (rows, outputs), or int64 labels (rows,) for cross-entropy; order (steps, batch) of int32, or
    one for each network: the rows that a step visits, at least one, -1 where there is none. flat (networks, P),
    moments (networks, rule.moments, P) and the powers in rates (networks, RATES), of float64, are brought up to the
    last step; losses (networks, steps) are written. All are contiguous.
    """
    networks, steps = losses.shape
    places = _places(layers)
    loss, loss_grad = objective.loss[:2] if objective.loss else (None, None)
    by_triton(
        _train_kernel, (networks,),
        x, y, order, flat, moments, rates, losses,
        steps, order.shape[-1], order.stride(0) if order.dim() == 3 else 0,
        tuple(_in_registers(layer, places) for layer in layers),
        LOSS=loss, LOSS_GRAD=loss_grad, MEAN=objective.mean, STEP=rule.step, MOMENTS=rule.moments,
        PLACES=places, P=flat.shape[1], RATES=rates.shape[1], BLOCK=config.block,
        num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip


def _places(layers):
    """Where each parameter stands in the flat ones, what lies between them left out."""
    return tuple(
        place
        for layer in layers
        for first, count in ((layer.weight, layer.inputs * layer.outputs), (layer.bias, layer.outputs))
        if first is not None
        for place in range(first, first + count)
    )


def _in_registers(layer, places):
    """The layer of a network whose parameters are a tuple; all is part of the code but its activation's parameters."""
    return layer._replace(
        inputs=tl.constexpr(layer.inputs),
        outputs=tl.constexpr(layer.outputs),
        weight=tl.constexpr(places.index(layer.weight)),
        bias=None if layer.bias is None else tl.constexpr(places.index(layer.bias)),
        from_output=tl.constexpr(layer.from_output),
    )
