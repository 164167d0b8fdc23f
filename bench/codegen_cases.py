"""What the machine-code report compiles: each launcher at shapes that matter, and the least work of each.

A launcher here takes (chip, precision, *shape, **options), calls the kernels' launcher with tensors of the meta
device, and says how it was configured and what the formula's bytes and FLOPs are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedact.activations import ACTIVATIONS
from fusedact.kernels import activations as device
from fusedact.kernels import (
    bce,
    bias_activation,
    chain,
    cross_entropy,
    elementwise,
    linear,
    multilabel,
    nll,
    softmax,
    training,
    training_layers,
    training_single,
    training_tiny,
)
from fusedact.tuning import Chip, Problem, candidates
from fusedact.tuning.candidates import RATES, estimates


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


def cross_entropy_tensors(p, shape, options):
    """Logits, target, class weight and sample weight, for what of these is in the options."""
    rows = (shape[0], *shape[2:])
    probabilities = options.get("probabilities", False)
    target = p.empty(*shape) if probabilities else torch.empty(rows, dtype=torch.int64, device="meta")
    weight = p.empty(shape[1]) if options.get("weight") else None
    return p.empty(*shape), target, weight, p.empty(*rows) if options.get("sample_weight") else None


def cross_entropy_numbers(options):
    return tuple(options.get(name, 0.0) for name in ("smoothing", "z_loss", "softcap"))


def cross_entropy_forward(chip, p, *shape, reduction="mean", save=True, **options):
    x, *others = cross_entropy_tensors(p, shape, options)
    two_streams = "probabilities" in options or {"weight", "smoothing"} <= set(options)
    streams = 2 ** (two_streams + ("softcap" in options))
    config = cross_entropy.tile(
        shape[1], cross_entropy.rows_after(x), x.element_size(), streams, chip.target.warp_size
    )  # fmt: skip
    numbers = cross_entropy_numbers(options)
    loss, _, stats, _ = cross_entropy.forward(x, *others, -100, reduction, *numbers, False, config, save)
    tensors = (x, *others, loss, stats)
    return Work(config, sum(t.nbytes for t in tensors if t is not None))


def cross_entropy_backward(chip, p, *shape, **options):
    x, *others = cross_entropy_tensors(p, shape, options)
    config = cross_entropy.tile(shape[1], cross_entropy.rows_after(x), x.element_size(), 1, chip.target.warp_size)
    statistic = PRECISIONS["fp64" if p.dtype == torch.float64 else "fp32"].empty
    stats = statistic(3 if options.get("probabilities") or options.get("weight") else 2, x.numel() // shape[1])
    cross_entropy.backward(
        p.empty(), None, x, *others, stats, statistic(1), -100, *cross_entropy_numbers(options), True, False
    )
    return Work(config, sum(t.nbytes for t in (x, x, *others, stats) if t is not None))


def nll_forward(chip, p, *shape, reduction="mean"):
    config = nll.tile()
    x, target = p.empty(*shape), torch.empty((shape[0], *shape[2:]), dtype=torch.int64, device="meta")
    loss, _ = nll.forward(x, target, None, -100, reduction, config)
    return Work(config, target.numel() * p.dtype.itemsize + target.nbytes + loss.nbytes)


def nll_backward(chip, p, *shape):
    config = nll.tile()
    x, target = p.empty(*shape), torch.empty((shape[0], *shape[2:]), dtype=torch.int64, device="meta")
    nll.backward(p.empty(), x, target, p.empty(shape[1]), None, -100)
    return Work(config, x.nbytes + target.nbytes)


def binary_tensors(p, shape, labels=False, pos_weight=False, weight=False):
    """Input, target and, where asked for, weight and pos_weight of a number per class."""
    classes = p.empty(shape[-1])
    target = torch.empty(shape, dtype=torch.int64, device="meta") if labels else p.empty(*shape)
    return p.empty(*shape), target, classes if weight else None, classes if pos_weight else None


def bce_forward(chip, p, *shape, reduction="mean", loss="LOGITS", **options):
    tensors = binary_tensors(p, shape, **options)
    divisor = None if reduction == "none" else tensors[0].numel()
    config = bce.tile(p.dtype.itemsize)
    result = bce.forward(getattr(bce, loss), *tensors, divisor, config)
    return Work(config, sum(t.nbytes for t in (*tensors, result) if t is not None))


def bce_backward(chip, p, *shape, reduction="mean", loss="LOGITS", both=False, **options):
    tensors = binary_tensors(p, shape, **options)
    dloss = p.empty(*shape) if reduction == "none" else p.empty()
    formula = multilabel.SOFT_MARGIN if loss == "SOFT_MARGIN" else getattr(bce, loss)
    config = bce.tile(p.dtype.itemsize)
    gradients = bce.backward(formula, dloss, *tensors, tensors[0].numel(), True, both, config)
    return Work(config, sum(t.nbytes for t in (dloss, *tensors, *gradients) if t is not None))


def multilabel_rows(chip, p, N, C, **options):
    x, target, weight, _ = binary_tensors(p, (N, C), **options)
    config = multilabel.tile(C, p.dtype.itemsize)
    loss = multilabel.forward_rows(x, target, weight, config)
    return Work(config, sum(t.nbytes for t in (x, target, weight, loss) if t is not None))


def softmax_forward(chip, p, *shape, dim=-1, kind="softmax", dtype=None):
    """A row too wide for the registers is read twice; what is counted is once."""
    dim, dtype = dim % len(shape), dtype or p.dtype
    x = p.empty(*shape)
    itemsize = 8 if torch.float64 in (p.dtype, dtype) else 4
    config = softmax.tile(x.shape, x.stride(), dim, itemsize, 1, chip.target.warp_size)
    y = softmax.forward(x, dim, dtype, kind == "log_softmax", kind == "softmin", config)
    return Work(config, x.nbytes + y.nbytes)


def softmax_backward(chip, p, *shape, dim=-1, kind="softmax"):
    """A row too wide for the registers is read twice; what is counted is once."""
    dim = dim % len(shape)
    dy, y = p.empty(*shape), p.empty(*shape)
    config = softmax.tile(y.shape, y.stride(), dim, max(4, p.dtype.itemsize), 2, chip.target.warp_size)
    dx = softmax.backward(dy, y, dim, p.dtype, kind == "log_softmax", kind == "softmin", config)
    return Work(config, dy.nbytes + y.nbytes + dx.nbytes)


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


# Cases

SPLIT = ("sm_80", "sm_90", "sm_100")  # where float32 products are made of three


@dataclass(frozen=True)
class Case:
    launcher: Callable[..., Work]
    precision: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    chips: tuple[str, ...] = tuple(RATES)  # that it is for

    def __str__(self) -> str:
        options = (f"{name}={value}" for name, value in self.options.items())
        return " ".join((self.launcher.__name__, self.precision, "x".join(map(str, self.shape)), *options))


def cases_of_tiles(launcher, task):
    """Every tile that the copy engine or three tf32 products make, whatever the rule chooses.

    Of those whose warps specialize only one compiles on every Triton.
    """
    shape = (8192, 8192, 8192)
    chips = {}
    for kind in RATES:
        there = Chip(kind, 227 * 1024, 32, multiprocessors=132)
        for precision in ("bf16", "tf32", "tf32x3"):
            p = PRECISIONS[precision]
            asked = "tf32" if p.dot == "tf32" else "ieee"
            for name, tile in candidates(Problem(task, *shape, p.dtype, asked, True, there)).items():
                if (
                    tile is None
                    or tile.precision != p.dot
                    or (tile.specialized and (tile.block_m, kind) != (64, "sm_90"))
                ):
                    continue
                if tile.programs or tile.precision == "tf32x3":
                    chips.setdefault((precision, name), []).append(kind)
    return tuple(Case(launcher, precision, shape, {"tile": name}, tuple(on)) for (precision, name), on in chips.items())


CASES = (
    *cases_of_tiles(linear_forward, "forward"),
    *cases_of_tiles(chain_backward, "backward"),
    Case(linear_forward, "tf32x3", (8192, 8192, 8192), chips=SPLIT),
    Case(linear_forward, "tf32x3", (8192, 8192, 8192), {"activation": "gelu", "save_z": True}, SPLIT),
    Case(linear_forward, "tf32x3", (8190, 8190, 8190), chips=SPLIT),
    Case(linear_dx, "tf32x3", (8192, 8192, 8192), chips=SPLIT),
    Case(linear_dw, "tf32x3", (8192, 8192, 8192), chips=SPLIT),
    Case(linear_dx, "tf32x3", (8190, 8190, 8190), chips=SPLIT),
    Case(linear_dw, "tf32x3", (8190, 8190, 8190), chips=SPLIT),
    Case(chain_backward, "bf16", (8192, 8192, 8192), {"activation": "gelu", "from_output": False}),
    Case(chain_backward, "bf16", (8192, 8192, 8192), {"activation": "prelu", "from_output": False}),
    Case(chain_backward, "tf32x3", (8192, 8192, 8192), {"activation": "mish", "from_output": False}, SPLIT),
    Case(chain_backward, "bf16", (100, 256, 784)),
    Case(linear_forward, "bf16", (8190, 8190, 8190)),
    Case(linear_forward, "bf16", (8192, 8192, 8192)),
    Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": "gelu", "save_z": True}),
    Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": "tanh"}),
    Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": "prelu", "save_z": True}),
    Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": "mish", "save_z": True}),
    Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": "elu", "save_z": True}),
    Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": "logsigmoid", "save_z": True}),
    Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": "tanhshrink", "save_z": True}),
    Case(linear_forward, "bf16", (1024, 1024, 1024)),
    Case(linear_forward, "bf16", (1024, 512, 1024)),
    Case(linear_forward, "bf16", (100, 256, 784)),
    Case(linear_forward, "bf16", (64, 1, 3), {"activation": "sigmoid"}),
    Case(linear_forward, "fp16", (8192, 8192, 8192)),
    Case(linear_forward, "tf32", (8192, 8192, 8192)),
    Case(linear_forward, "tf32", (1024, 1024, 1024)),
    Case(linear_forward, "tf32", (100, 256, 784)),
    Case(linear_forward, "fp32", (8192, 8192, 8192)),
    Case(linear_forward, "fp32", (1024, 1024, 1024)),
    Case(linear_forward, "fp32", (100, 256, 784)),
    Case(linear_forward, "fp64", (1024, 1024, 1024)),
    Case(linear_dx, "bf16", (8192, 8192, 8192)),
    Case(linear_dx, "bf16", (100, 256, 784)),
    Case(linear_dx, "tf32", (8192, 8192, 8192)),
    Case(linear_dx, "fp32", (8192, 8192, 8192)),
    Case(linear_dx, "fp64", (1024, 1024, 1024)),
    Case(linear_dw, "bf16", (8192, 8192, 8192)),
    Case(linear_dw, "bf16", (100, 256, 784)),
    Case(linear_dw, "tf32", (8192, 8192, 8192)),
    Case(linear_dw, "fp32", (8192, 8192, 8192)),
    Case(linear_dw, "fp64", (1024, 1024, 1024)),
    Case(bias_activation_backward, "bf16", (8192, 8192)),
    Case(bias_activation_backward, "bf16", (8192, 8192), {"db": False}),
    Case(bias_activation_backward, "bf16", (8192, 8192), {"activation": "gelu"}),
    Case(bias_activation_backward, "bf16", (8192, 8192), {"activation": "mish"}),
    Case(bias_activation_backward, "bf16", (8192, 8192), {"activation": "prelu"}),
    Case(bias_activation_backward, "bf16", (8192, 8192), {"activation": "prelu", "slopes": 1}),
    Case(bias_activation_backward, "bf16", (100, 10)),
    Case(bias_activation_backward, "fp32", (8192, 8192)),
    Case(bias_activation_backward, "fp64", (1024, 1024), {"activation": "prelu"}),
    Case(bias_activation_backward, "fp64", (1024, 1024), {"activation": "gelu"}),
    Case(channels_forward, "bf16", (64, 256, 56, 56)),
    Case(channels_forward, "bf16", (64, 256, 56, 56), {"channels_last": True}),
    Case(channels_forward, "bf16", (64, 256, 56, 56), {"activation": "mish", "in_place": False}),
    Case(channels_forward, "bf16", (64, 256, 56, 56), {"activation": "prelu", "in_place": False}),
    Case(channels_forward, "fp32", (16, 120, 28, 28)),
    Case(channels_forward, "fp64", (16, 128, 28, 28), {"activation": "gelu", "in_place": False}),
    Case(channels_backward, "bf16", (64, 256, 56, 56)),
    Case(channels_backward, "bf16", (64, 256, 56, 56), {"channels_last": True}),
    Case(channels_backward, "bf16", (64, 256, 56, 56), {"activation": "mish", "from_output": False}),
    Case(channels_backward, "bf16", (64, 256, 56, 56), {"activation": "prelu", "from_output": False}),
    Case(channels_backward, "bf16", (64, 256, 56, 56), {"activation": "prelu", "slopes": 1, "channels_last": True}),
    Case(channels_backward, "fp32", (16, 120, 28, 28)),
    Case(channels_backward, "fp64", (16, 128, 28, 28), {"activation": "gelu", "from_output": False}),
    Case(activation_forward, "bf16", (2**26,)),
    Case(activation_forward, "bf16", (2**26,), {"activation": "softsign"}),
    Case(activation_forward, "bf16", (64, 256, 56, 56), {"activation": "prelu"}),
    Case(activation_forward, "bf16", (64, 256, 56, 56), {"activation": "prelu", "channels_last": True}),
    Case(activation_forward, "fp32", (2**26,), {"activation": "tanhshrink"}),
    Case(activation_forward, "fp64", (2**22,), {"activation": "gelu"}),
    Case(activation_backward, "bf16", (2**26,), {"activation": "squared_relu"}),
    Case(activation_backward, "bf16", (2**26,), {"activation": "mish"}),
    Case(activation_backward, "bf16", (2**26,), {"activation": "prelu", "slopes": 1}),
    Case(activation_backward, "bf16", (64, 256, 56, 56), {"activation": "prelu"}),
    Case(activation_backward, "bf16", (64, 256, 56, 56), {"activation": "prelu", "channels_last": True}),
    Case(activation_backward, "bf16", (8192, 8192), {"activation": "prelu"}),
    Case(activation_backward, "fp32", (2**26,), {"activation": "softsign"}),
    Case(activation_backward, "fp32", (8192, 8192), {"activation": "prelu"}),
    Case(activation_backward, "fp64", (1024, 1024), {"activation": "prelu", "slopes": 1}),
    Case(cross_entropy_forward, "bf16", (32768, 10)),
    Case(cross_entropy_forward, "bf16", (32768, 1000)),
    Case(cross_entropy_forward, "bf16", (4096, 32000)),
    Case(cross_entropy_forward, "bf16", (4096, 32000), {"reduction": "none"}),
    Case(cross_entropy_forward, "bf16", (4096, 128256)),
    Case(cross_entropy_forward, "bf16", (4096, 128256), {"reduction": "none", "save": False}),
    Case(cross_entropy_forward, "fp32", (4096, 1000)),
    Case(cross_entropy_forward, "fp32", (4096, 32000)),
    Case(cross_entropy_forward, "fp32", (4096, 128256)),
    Case(cross_entropy_forward, "fp64", (4096, 8192)),
    Case(cross_entropy_backward, "bf16", (32768, 10)),
    Case(cross_entropy_backward, "bf16", (32768, 1000)),
    Case(cross_entropy_backward, "bf16", (4096, 128256)),
    Case(cross_entropy_backward, "fp32", (4096, 32000)),
    Case(cross_entropy_backward, "fp64", (4096, 8192)),
    Case(cross_entropy_forward, "bf16", (16, 21, 65536)),
    Case(cross_entropy_forward, "bf16", (16, 150, 65536), {"weight": True, "smoothing": 0.1}),
    Case(cross_entropy_forward, "bf16", (4096, 32000), {"smoothing": 0.1}),
    Case(cross_entropy_forward, "bf16", (4096, 32000), {"weight": True, "smoothing": 0.1}),
    Case(cross_entropy_forward, "bf16", (4096, 32000), {"z_loss": 1e-4, "softcap": 30.0, "sample_weight": True}),
    Case(cross_entropy_forward, "bf16", (4096, 128256), {"z_loss": 1e-4, "softcap": 30.0}),
    Case(cross_entropy_forward, "bf16", (4096, 128256), {"smoothing": 0.1}),
    Case(cross_entropy_forward, "bf16", (32768, 1000), {"probabilities": True, "smoothing": 0.1}),
    Case(cross_entropy_forward, "fp32", (4096, 16384), {"probabilities": True, "weight": True}),
    Case(cross_entropy_forward, "bf16", (4096, 32000), {"probabilities": True}),
    Case(cross_entropy_backward, "bf16", (16, 21, 65536)),
    Case(cross_entropy_backward, "bf16", (4096, 32000), {"weight": True, "smoothing": 0.1}),
    Case(cross_entropy_backward, "bf16", (4096, 128256), {"z_loss": 1e-4, "softcap": 30.0}),
    Case(cross_entropy_backward, "bf16", (32768, 1000), {"probabilities": True, "smoothing": 0.1}),
    Case(nll_forward, "bf16", (32768, 1000)),
    Case(nll_forward, "fp32", (16, 21, 65536), {"reduction": "none"}),
    Case(nll_backward, "bf16", (32768, 1000)),
    Case(nll_backward, "fp32", (16, 21, 65536)),
    Case(bce_forward, "bf16", (2**26,)),
    Case(bce_forward, "bf16", (2**26,), {"reduction": "none"}),
    Case(bce_forward, "fp32", (2**26,)),
    Case(bce_forward, "fp64", (2**20,)),
    Case(bce_backward, "bf16", (2**26,)),
    Case(bce_backward, "fp32", (2**26,), {"reduction": "none"}),
    Case(bce_forward, "bf16", (65536, 1024), {"weight": True, "pos_weight": True}),
    Case(bce_forward, "fp32", (65536, 1024), {"weight": True, "pos_weight": True, "reduction": "none"}),
    Case(bce_forward, "fp64", (1024, 1024), {"weight": True, "pos_weight": True}),
    Case(bce_forward, "bf16", (2**26,), {"loss": "PROBABILITIES"}),
    Case(bce_forward, "fp32", (65536, 1024), {"loss": "PROBABILITIES", "weight": True}),
    Case(bce_backward, "bf16", (65536, 1024), {"weight": True, "pos_weight": True, "both": True}),
    Case(bce_backward, "fp64", (1024, 1024), {"weight": True, "pos_weight": True, "both": True}),
    Case(bce_backward, "bf16", (2**26,), {"loss": "PROBABILITIES", "both": True}),
    Case(bce_backward, "fp32", (65536, 1024), {"loss": "SOFT_MARGIN", "weight": True}),
    Case(multilabel_rows, "bf16", (65536, 1024)),
    Case(multilabel_rows, "fp32", (65536, 1024), {"weight": True}),
    Case(multilabel_rows, "fp64", (1024, 1024), {"labels": True}),
    Case(softmax_forward, "bf16", (32768, 10)),
    Case(softmax_forward, "bf16", (32768, 1000)),
    Case(softmax_forward, "bf16", (32768, 1000), {"kind": "log_softmax"}),
    Case(softmax_forward, "bf16", (32768, 1000), {"kind": "softmin", "dtype": torch.float32}),
    Case(softmax_forward, "bf16", (4096, 32000)),
    Case(softmax_forward, "bf16", (4096, 128256)),
    Case(softmax_forward, "bf16", (16, 21, 65536), {"dim": 1}),
    Case(softmax_forward, "bf16", (16, 4096, 1024), {"dim": 1}),
    Case(softmax_forward, "fp32", (4096, 32000)),
    Case(softmax_forward, "fp32", (4096, 128256), {"kind": "log_softmax"}),
    Case(softmax_forward, "fp32", (16, 1000, 1024), {"dim": 1}),
    Case(softmax_forward, "fp64", (4096, 4096)),
    Case(softmax_forward, "fp64", (4096, 8192)),
    Case(softmax_backward, "bf16", (32768, 10)),
    Case(softmax_backward, "bf16", (32768, 1000)),
    Case(softmax_backward, "bf16", (32768, 1000), {"kind": "log_softmax"}),
    Case(softmax_backward, "bf16", (4096, 16384)),
    Case(softmax_backward, "bf16", (4096, 32000)),
    Case(softmax_backward, "bf16", (4096, 128256), {"kind": "log_softmax"}),
    Case(softmax_backward, "bf16", (16, 21, 65536), {"dim": 1}),
    Case(softmax_backward, "bf16", (16, 4096, 1024), {"dim": 1}),
    Case(softmax_backward, "fp32", (4096, 16384)),
    Case(softmax_backward, "fp32", (4096, 32000)),
    Case(softmax_backward, "fp64", (4096, 2048)),
    Case(softmax_backward, "fp64", (4096, 8192)),
    Case(training_tiny_train, "fp32", (64, 3, 1)),
    Case(training_tiny_train, "fp32", (64, 3, 1), {"rule": "ADAM"}),
    Case(training_tiny_train, "fp32", (64, 2, 1)),
    Case(training_tiny_train, "fp32", (64, 2, 1), {"rule": "ADAM"}),
    Case(training_tiny_train, "fp32", (64, 2, 2, 1)),
    Case(training_tiny_train, "fp32", (64, 2, 2, 1), {"rule": "ADAM"}),
    Case(training_tiny_train, "fp32", (4, 2, 2, 1), {"loss": "LOGITS", "last": "identity"}),
    Case(training_tiny_train, "fp32", (64, 2, 8, 1), {"rule": "ADAM", "hidden": "gelu"}),
    Case(training_tiny_train, "fp32", (128, 3, 4, 3), {"rule": "NESTEROV", "last": "identity", "loss": None}),
    Case(training_layers_train, "fp32", (100, 784, 256, 256, 10)),
    Case(training_layers_train, "tf32", (100, 784, 256, 256, 10)),
    Case(training_layers_train, "bf16", (100, 784, 256, 256, 10)),
    Case(training_layers_train, "fp32", (128, 300, 100, 32), {"rule": "SGD", "loss": "LOGITS"}),
    Case(training_layers_train, "fp32", (96, 784, 512, 256, 128, 10), {"hidden": "gelu", "from_output": False}),
    Case(training_single_train, "fp32", (100, 10, 784)),
    Case(training_single_train, "tf32", (100, 10, 784)),
    Case(training_single_train, "fp32", (64, 1, 1024), {"rule": "SGD", "loss": "LOGITS"}),
    Case(training_single_train, "fp32", (128, 32, 4096), {"rule": "ADAMW"}),
    Case(training_single_train, "fp32", (128, 16, 8192), {"loss": "LOGITS"}),
    Case(training_single_train, "fp32", (160, 7, 1001), {"rule": "SGD", "loss": "PROBABILITIES", "last": "sigmoid"}),
)  # fmt: skip

EVERY_ACTIVATION = tuple(
    case
    for name in ACTIVATIONS
    for case in (
        Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": name}),
        Case(linear_forward, "fp32", (8192, 8192, 8192), {"activation": name}),
        Case(bias_activation_backward, "bf16", (8192, 8192), {"activation": name}),
    )
)
