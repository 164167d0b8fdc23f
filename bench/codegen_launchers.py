"""What the machine-code report calls: each launcher of products, activations and trainers, and the least work of each.

A launcher here takes (chip, precision, *shape, **options), calls the kernels' launcher with tensors of the meta
device, and says how it was configured and what the formula's bytes and FLOPs are.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedact.activations import ACTIVATIONS
from fusedact.kernels import activations as device
from fusedact.kernels import (
    bce,
    bias_activation,
    chain,
    elementwise,
    gated,
    linear,
    scale,
    training,
    training_layers,
    training_single,
    training_tiny,
)
from fusedact.tuning import Chip, Problem, candidates
from fusedact.tuning.candidates import estimates


@dataclass(frozen=True)
class Precision:
    """An element type and the way its products are taken."""

    dtype: torch.dtype
    dot: str
    flops_per_s: float

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")


PRECISIONS = {
    "bf16": Precision(torch.bfloat16, "ieee", 790e12),
    "fp16": Precision(torch.float16, "ieee", 790e12),
    "tf32": Precision(torch.float32, "tf32", 395e12),
    "tf32x3": Precision(torch.float32, "tf32x3", 395e12 / 3),
    "fp32": Precision(torch.float32, "ieee", 52e12),
    "fp64": Precision(torch.float64, "ieee", 67e12),  # the data sheet's
}


class Work(NamedTuple):
    """How a launcher was configured, and the least it can do.

    bytes: what it takes and gives, each once. flops: of its matrix product, without elementwise arithmetic.
    """

    config: Any
    bytes: int
    flops: int = 0


def parameters(activation: str, slope: Tensor) -> tuple[tuple[float, ...], Tensor | None]:
    entry = ACTIVATIONS[activation]
    return entry.parameters({}), slope if entry.learned else None


def product_tile(chip, p, task, a, b, name=None):
    """The tile of that name, or the rule's, the library's product left out, for a (M, K) and b (N, K)."""
    (M, K), N = a.shape, b.shape[0]
    kind = chip.target.arch if chip.target.backend == "hip" else f"sm_{chip.target.arch}"
    there = Chip(kind, chip.shared_memory, chip.target.warp_size, multiprocessors=132)
    aligned = linear.is_aligned(a) and linear.is_aligned(b)
    problem = Problem(task, M, N, K, p.dtype, "tf32" if p.dot == "tf32" else "ieee", aligned, there)
    tiles = candidates(problem)
    if name:
        return tiles[name]
    times = {n: s for n, s in estimates(problem).items() if tiles[n] is not None and tiles[n].precision == p.dot}
    return tiles[min(times, key=times.__getitem__)]


def linear_forward(chip, p, M, N, K, activation="relu", save_z=False, tile=None):
    x, w = p.empty(M, K), p.empty(N, K)
    config = product_tile(chip, p, "forward", x, w, tile)
    act_params, slope = parameters(activation, p.empty(N))
    act = getattr(device, activation)
    linear.forward(x, w, p.empty(N), act, act_params, slope, config, save_z)
    elements = M * K + N * K + N + M * N * (2 if save_z else 1)
    return Work(config, elements * p.dtype.itemsize, 2 * M * N * K)


def linear_product(chip, p, task, a, b, tile):
    (M, K), N = a.shape, b.shape[1]
    config = product_tile(chip, p, task, a, b.t(), tile)
    linear.product(a, b, config)
    return Work(config, (M * K + K * N + M * N) * p.dtype.itemsize, 2 * M * N * K)


def linear_dx(chip, p, M, N, K, tile=None):
    return linear_product(chip, p, "dx", p.empty(M, N), p.empty(N, K), tile)


def linear_dw(chip, p, M, N, K, tile=None):
    return linear_product(chip, p, "dw", p.empty(M, N).t(), p.empty(M, K), tile)


def chain_backward(chip, p, M, N, K, activation="relu", from_output=True, tile=None):
    """dz_next (M, K) by W (K, N)."""
    dz_next, w, saved = p.empty(M, K), p.empty(K, N), p.empty(M, N)
    config = product_tile(chip, p, "backward", dz_next, w.t(), tile)
    act_params, slope = parameters(activation, p.empty(N))
    act, act_grad = getattr(device, activation), getattr(device, f"{activation}_grad")
    wanted = True, slope is not None
    chain.backward(dz_next, w, saved, act, act_grad, act_params, slope, from_output, *wanted, config, None)
    elements = M * K + K * N + M * N * (2 if from_output else 3) + N
    return Work(config, elements * p.dtype.itemsize, 2 * M * N * K)


def bias_activation_backward(chip, p, M, N, activation="relu", db=True, slopes=None):
    config = bias_activation.tile(M, N, p.dtype.itemsize)
    act_params, slope = parameters(activation, p.empty(slopes or N))
    act_grad = getattr(device, f"{activation}_grad")
    dy, saved = p.empty(M, N), p.empty(M, N)
    bias_activation.backward(dy, saved, act_grad, act_params, slope, db, slope is not None, config)
    elements = 3 * M * N + (N if db else 0) + (0 if slope is None else 2 * slope.numel())
    return Work(config, elements * p.dtype.itemsize)


def images(p, N, C, H, W, activation, slopes, channels_last):
    """A product of that shape, its bias, and the activation's parameters and slope."""
    act_params, slope = parameters(activation, p.empty(slopes or C))
    x = p.empty(N, C, H, W).to(memory_format=torch.channels_last if channels_last else torch.preserve_format)
    return x, p.empty(C), act_params, slope


def channels_forward(chip, p, *shape, activation="relu", slopes=None, channels_last=False, in_place=True):
    config = elementwise.tile(p.dtype.itemsize)
    x, bias, act_params, slope = images(p, *shape, activation, slopes, channels_last)
    act = getattr(device, activation)
    bias_activation.forward_channels(x, bias, act, act_params, slope, config, in_place)
    return Work(config, 2 * x.nbytes)


def channels_backward(chip, p, *shape, activation="relu", slopes=None, channels_last=False, from_output=True):
    config = elementwise.tile(p.dtype.itemsize)
    x, bias, act_params, slope = images(p, *shape, activation, slopes, channels_last)
    act_grad = getattr(device, f"{activation}_grad")
    wanted = True, True, slope is not None
    dy = torch.empty_like(x)
    bias_activation.backward_channels(dy, x, bias, act_grad, act_params, slope, from_output, wanted, config)
    return Work(config, 3 * x.nbytes)


def activation_forward(chip, p, *shape, activation="relu", slopes=None, channels_last=False):
    config = elementwise.tile(p.dtype.itemsize)
    act_params, slope = parameters(activation, p.empty(slopes or shape[-1 if len(shape) == 1 else 1]))
    x = p.empty(*shape).to(memory_format=torch.channels_last if channels_last else torch.preserve_format)
    elementwise.forward(x, getattr(device, activation), act_params, slope, config)
    return Work(config, 2 * x.nbytes)


def activation_backward(chip, p, *shape, activation="relu", slopes=None, channels_last=False):
    config = elementwise.tile(p.dtype.itemsize)
    act_params, slope = parameters(activation, p.empty(slopes or shape[-1 if len(shape) == 1 else 1]))
    x = p.empty(*shape).to(memory_format=torch.channels_last if channels_last else torch.preserve_format)
    act_grad = getattr(device, f"{activation}_grad")
    elementwise.backward(torch.empty_like(x), x, act_grad, act_params, slope, True, slope is not None, config)
    return Work(config, 3 * x.nbytes)


def gated_pair(p, rows, columns, halves):
    """gate and up, which may be the two halves of one tensor."""
    return p.empty(rows, 2 * columns).chunk(2, -1) if halves else (p.empty(rows, columns), p.empty(rows, columns))


def gated_forward(chip, p, *shape, activation="silu", halves=False):
    config = elementwise.tile(p.dtype.itemsize)
    gate, up = gated_pair(p, *shape, halves)
    gated.forward(gate, up, getattr(device, activation), parameters(activation, None)[0], config)
    return Work(config, 3 * gate.nbytes)


def gated_backward(chip, p, *shape, activation="silu", halves=False):
    config = elementwise.tile(p.dtype.itemsize)
    gate, up = gated_pair(p, *shape, halves)
    functions = getattr(device, activation), getattr(device, f"{activation}_grad"), parameters(activation, None)[0]
    gated.backward(torch.empty_like(gate), gate, up, *functions, True, True, config)
    return Work(config, 5 * gate.nbytes)


def scale_in_place(chip, p, n):
    x = p.empty(n)
    scale.in_place([x], p.empty(1))
    return Work(scale.tile(), 2 * x.nbytes)


def training_tiny_train(chip, p, batch, *widths, rule="SGD", hidden="sigmoid", last="sigmoid", loss="PROBABILITIES"):
    """A thousand steps on a thousand rows. loss: of bce, or None for cross-entropy."""
    names = [hidden] * (len(widths) - 2) + [last]
    places, size = training.places(widths, [True] * len(names))
    layers = tuple(
        training.Layer(inputs, outputs, *place, getattr(device, name), gradient_by_name(name), (), False)
        for place, inputs, outputs, name in zip(places, widths[:-1], widths[1:], names, strict=True)
    )
    y = torch.empty(1000, dtype=torch.int64, device="meta") if loss is None else p.empty(1000, widths[-1])
    order = torch.empty(1000, batch, dtype=torch.int32, device="meta")
    rates = torch.empty(1, training.RATES, dtype=torch.float64, device="meta")
    step = getattr(training, rule)
    state = p.empty(1, size), p.empty(1, step.moments, size), rates
    tensors = p.empty(1000, widths[0]), y, order, *state, p.empty(1, 1000)
    objective = training.Objective(loss and getattr(bce, loss), mean=True)
    config = training_tiny.tile(batch)
    training_tiny.train(*tensors, layers, objective, step, config)
    return Work(config, sum(t.nbytes for t in (*tensors, *state)))


def training_layers_train(chip, p, batch, *widths, rule="ADAM", hidden="relu", from_output=True, loss=None):
    """An epoch of sixty thousand rows on an H200's multiprocessors. loss: of bce, or None for cross-entropy."""
    names = [hidden] * (len(widths) - 2) + ["identity"]
    places, size = training.places(widths, [True] * len(names))
    layers = tuple(
        training.Layer(inputs, outputs, *place, getattr(device, name), gradient_by_name(name), (), from_output)
        for place, inputs, outputs, name in zip(places, widths[:-1], widths[1:], names, strict=True)
    )
    steps = 60000 // batch
    x, row = PRECISIONS["fp32"].empty(60000, widths[0]), PRECISIONS["fp32"].empty
    y = torch.empty(60000, dtype=torch.int64, device="meta") if loss is None else row(60000, widths[-1])
    order, failed = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((steps, batch), (1,)))
    step = getattr(training, rule)
    state = row(size), row(step.moments, size), PRECISIONS["fp64"].empty(training.RATES)
    tensors = x, y, order, *state, row(steps), failed
    objective = training.Objective(loss and getattr(bce, loss), mean=True)
    precision = "bf16" if p.dtype == torch.bfloat16 else p.dot
    config = training_layers.tile(layers, batch, precision, 132, chip.target.warp_size, chip.target.arch == 80)
    training_layers.train(*tensors, layers, objective, step, precision, config)
    products = sum(layer.inputs * layer.outputs for layer in layers)
    flops = 2 * steps * batch * (3 * products - layers[0].inputs * layers[0].outputs)
    return Work(config, sum(t.nbytes for t in (*tensors, *state)), flops)


def training_single_train(
    chip, p, batch, outputs, inputs, rule="ADAM", last="identity", loss=None, rows=1000, multiprocessors=128
):
    """A pass over the rows. loss: of bce, or None for cross-entropy."""
    ((place,), size) = training.places((inputs, outputs), (True,))
    layer = training.Layer(inputs, outputs, *place, getattr(device, last), gradient_by_name(last), (), False)
    y = torch.empty(rows, dtype=torch.int64, device="meta") if loss is None else p.empty(rows, outputs)
    order = torch.empty(rows // batch, batch, dtype=torch.int32, device="meta")
    rates = torch.empty(training.RATES, dtype=torch.float64, device="meta")
    step = getattr(training, rule)
    state = p.empty(size), p.empty(step.moments, size), rates
    tensors = (
        p.empty(rows, inputs),
        y,
        order,
        *state,
        p.empty(len(order)),
        torch.empty(1, dtype=torch.int32, device="meta"),
    )
    objective = training.Objective(loss and getattr(bce, loss), mean=True)
    config = training_single.tile(inputs, outputs, batch, multiprocessors, chip.target.warp_size)
    training_single.train(*tensors, (layer,), objective, step, p.dot, config)
    return Work(config, sum(t.nbytes for t in (*tensors, *state)), 4 * order.numel() * inputs * outputs)


def gradient_by_name(name):
    return training.identity_grad if name == "identity" else getattr(device, f"{name}_grad")
