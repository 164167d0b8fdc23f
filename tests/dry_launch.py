"""Every launch's host side without a GPU: arguments specialized as on one, kernels compiled, nothing run.

Run as its own process, since the interpreter that the tests use replaces triton.jit. A driver that says it is a
Hopper takes the place of CUDA's: what Triton would refuse on a GPU (an argument's type, a size of 1 that becomes a
constant, a program over the chip's limits) it refuses here. Prints the launches of each case, forward or backward.
"""

import functools
import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

import fusedact
from fusedact import backend, nn
from fusedact import functional as F
from fusedact.activations import ACTIVATIONS
from fusedact.distributed import vocab_parallel_cross_entropy
from fusedact.tuning.records import REFERENCE_CHIPS

SHARED_MEMORY = 227 * 1024
LAUNCHED = []


class Launcher:
    def __init__(self, src, metadata):
        self.name = metadata.name

    def __call__(self, grid_x, grid_y, grid_z, *rest):
        assert 0 < grid_x < 2**31 and 0 < grid_y < 2**16 and 0 < grid_z < 2**16
        LAUNCHED.append(self.name)


class Hopper:
    launcher_cls = Launcher
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY},
        load_binary=lambda *args: (object(), 0, 0, 0, 1024),
    )

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def linear(activation, M, K, N, dtype=torch.float32, bias=True, slope=None, **parameters):
    x, weight, dy = (torch.zeros(shape, dtype=dtype) for shape in ((M, K), (N, K), (M, N)))
    tensors = [x, weight, torch.zeros(N, dtype=dtype) if bias else None]
    slope = None if slope is None else torch.zeros(slope, dtype=dtype)
    for t in (*tensors, slope):
        if t is not None:
            t.requires_grad_()
    F.linear(*tensors, activation=activation, slope=slope, **parameters).backward(dy)


def as_on_hopper(*shape, **options):
    """Choices as on the chip itself: the library's products among them, and the copy engine."""
    played = backend.chip
    backend.chip = lambda device, library=True: REFERENCE_CHIPS["sm_90"]
    try:
        linear(*shape, **options)
    finally:
        backend.chip = played


def alone(function, shape, *options, dtype=torch.float32, slopes=None, memory_format=torch.preserve_format):
    x = torch.zeros(shape, dtype=dtype).to(memory_format=memory_format).requires_grad_()
    slope = [] if slopes is None else [torch.zeros(slopes, dtype=dtype, requires_grad=True)]
    y = function(x, *slope, *options)
    y.backward(torch.zeros_like(y))


def gated(shape, dtype, activation, **parameters):
    gate, up = torch.zeros(shape, dtype=dtype, requires_grad=True).chunk(2, -1)
    F.gated(gate, up, activation, **parameters).sum().backward()


def every_function():
    for name, activation in ACTIVATIONS.items():
        x = torch.zeros(40, 8, requires_grad=True)
        slope = torch.zeros(8, requires_grad=True) if activation.learned else None
        F.activate(x, name, slope=slope).sum().backward()


def loss(function, shape, target, dtype=torch.float32, **options):
    x = torch.zeros(shape, dtype=dtype).requires_grad_()
    value = function(x, target, **options)
    value.backward(torch.zeros_like(value))


def every_activation():
    for name, activation in ACTIVATIONS.items():
        linear(name, 32, 16, 32, slope=1 if activation.learned else None)


def network():
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10, activation="gelu"))
    nn.CrossEntropyLoss()(model(torch.zeros(100, 784)), torch.zeros(100, dtype=torch.int64)).backward()


def cross_entropy(N, C, dtype=torch.float32, **options):
    return functools.partial(loss, F.cross_entropy, (N, C), torch.zeros(N, dtype=torch.int64), dtype, **options)


def images(options, function=F.cross_entropy, probabilities=False):
    """A class for each pixel, with class weights and those options."""
    shape = (2, 21, 40, 50)
    target = torch.zeros(shape) if probabilities else torch.zeros((2, 40, 50), dtype=torch.int64)
    return functools.partial(loss, function, shape, target, weight=torch.ones(21), **options)


def slices(x, _, **options):
    """As one process launches that has all classes."""
    target = torch.zeros((len(x), *x.shape[2:]), dtype=torch.int64)
    return vocab_parallel_cross_entropy(x, target, **options)


def bce(shape, dtype=torch.float32, function=F.binary_cross_entropy_with_logits, **options):
    """A weight or pos_weight is given by its shape."""
    target = torch.zeros(shape, dtype=dtype, requires_grad=dtype == torch.float64)
    for name in {"weight", "pos_weight"} & set(options):
        options[name] = torch.zeros(options[name], dtype=dtype)
    return functools.partial(loss, function, shape, target, dtype, **options)


CASES = {
    "S1": functools.partial(linear, "sigmoid", 64, 3, 1),
    "one of everything": functools.partial(linear, "relu", 1, 1, 1),
    "without bias": functools.partial(linear, "tanh", 100, 16, 32, bias=False),
    "one parameter": functools.partial(linear, "leaky_relu", 64, 48, 80, negative_slope=0.2),
    "two parameters": functools.partial(linear, "softplus", 64, 48, 80, beta=2.0),
    "one slope": functools.partial(linear, "prelu", 64, 48, 80, slope=1),
    "a slope per channel": functools.partial(linear, "prelu", 64, 48, 80, slope=80),
    "every activation": every_activation,
    "bfloat16": functools.partial(linear, "gelu", 256, 128, 512, torch.bfloat16),
    "float16": functools.partial(linear, "silu", 33, 65, 17, torch.float16),
    "float64": functools.partial(linear, "mish", 33, 65, 17, torch.float64),
    "network and loss": network,
    "large, described to the copy engine": functools.partial(as_on_hopper, "relu", 1024, 1024, 1024, torch.bfloat16),
    "large, of three products": functools.partial(as_on_hopper, "gelu", 1024, 1024, 1024),
    "large, of the library": functools.partial(as_on_hopper, "tanh", 512, 512, 512, torch.float64),
    "alone, one number": functools.partial(alone, F.relu, ()),
    "alone, one parameter": functools.partial(alone, F.leaky_relu, (8, 100), 0.2, dtype=torch.bfloat16),
    "alone, two parameters, float64": functools.partial(alone, F.softplus, (5, 7), 2.0, 20.0, dtype=torch.float64),
    "alone, one slope": functools.partial(alone, F.prelu, (100, 16), slopes=1),
    "alone, one slope of all": functools.partial(alone, F.prelu, (1,), slopes=()),
    "alone, a slope per column": functools.partial(alone, F.prelu, (100, 80), slopes=80, dtype=torch.float16),
    "alone, a slope per channel": functools.partial(alone, F.prelu, (4, 3, 56, 56), slopes=3),
    "alone, channels last": functools.partial(
        alone, F.prelu, (4, 16, 7, 7), slopes=16, memory_format=torch.channels_last
    ),
    "every activation alone": every_function,
    "gated": functools.partial(gated, (64, 1024), torch.bfloat16, "silu"),
    "gated, one number": functools.partial(gated, (2,), torch.float32, "gelu"),
    "gated, one parameter, float64": functools.partial(gated, (3, 5, 26), torch.float64, "elu", alpha=0.5),
    "softmax of one number": functools.partial(alone, F.softmax, (), 0),
    "softmax of one class": functools.partial(alone, F.softmax, (5, 1), 1),
    "softmax": functools.partial(alone, F.softmax, (64, 1000), -1, dtype=torch.bfloat16),
    "softmax, 128,256 classes": functools.partial(alone, F.softmax, (2, 128_256), 1),
    "softmax, from float64": functools.partial(
        alone, functools.partial(F.softmax, dtype=torch.float16), (40, 30), 0, dtype=torch.float64
    ),
    "log_softmax of pixels": functools.partial(alone, F.log_softmax, (2, 21, 40, 50), 1),
    "log_softmax, many classes of pixels": functools.partial(alone, F.log_softmax, (1, 1500, 40), 1),
    "log_softmax, channels last": functools.partial(
        alone, F.log_softmax, (2, 21, 4, 5), 1, memory_format=torch.channels_last
    ),
    "softmin, to float64": functools.partial(
        alone, functools.partial(F.softmin, dtype=torch.float64), (64, 100), 1, dtype=torch.bfloat16
    ),
    "10 classes": cross_entropy(100, 10),
    "one row of one class": cross_entropy(1, 1),
    "1,000 classes": cross_entropy(64, 1000, torch.bfloat16, reduction="none"),
    "128,256 classes": cross_entropy(2, 128_256, torch.bfloat16, reduction="sum", ignore_index=1),
    "float64 classes": cross_entropy(3, 20, torch.float64),
    "float64 classes, smoothed": cross_entropy(3, 20, torch.float64, label_smoothing=0.1, z_loss=1e-4, softcap=30.0),
    "wide classes, smoothed": cross_entropy(2, 40_000, label_smoothing=0.1, softcap=30.0),
    "classes of pixels": images({"label_smoothing": 0.1, "reduction": "none"}),
    "a slice of the classes": functools.partial(loss, slices, (64, 1000), None, torch.bfloat16),
    "a slice of the classes, everything": functools.partial(
        loss,
        slices,
        (3, 20),
        None,
        torch.float64,
        label_smoothing=0.1,
        z_loss=1e-4,
        softcap=30.0,
        weight=torch.ones(20, dtype=torch.float64),
        sample_weight=torch.ones(3),
        reduction="none",
    ),
    "a slice of the classes of pixels": functools.partial(loss, slices, (2, 21, 40, 50), None, reduction="sum"),
    "classes of pixels, sample weights": images({"sample_weight": torch.ones(2, 40, 50), "z_loss": 1e-4}),
    "class probabilities": images({"label_smoothing": 0.1}, probabilities=True),
    "classes, nll": images({}, F.nll_loss),
    "bce of one": bce((1,)),
    "bce": bce((64, 100), torch.bfloat16),
    "bce, no reduction": bce((64, 100), torch.float64, reduction="none"),
    "bce, weights of classes": bce((64, 100), torch.bfloat16, weight=(100,), pos_weight=(1,)),
    "bce, weights of rows": bce((64, 100), torch.float64, weight=(64, 1), pos_weight=()),
    "bce, weights in the middle": bce((4, 3, 5), weight=(3, 1), pos_weight=(4, 1, 5), reduction="none"),
    "bce, probabilities": bce((63, 100), function=F.binary_cross_entropy, weight=(63, 100)),
    "bce, probabilities, float64": bce((100,), torch.float64, F.binary_cross_entropy, reduction="none"),
    "bce, many labels": bce((64, 1000), torch.bfloat16, F.multilabel_soft_margin_loss),
    "bce, many labels in rows": bce((64, 10), function=F.multilabel_soft_margin_loss, weight=(10,), reduction="none"),
    "bce, one label": bce((1,), torch.float64, F.multilabel_soft_margin_loss, reduction="none"),
}


def main() -> None:
    assert not triton.knobs.runtime.interpret
    triton.runtime.driver.set_active(Hopper())
    backend._triton_problem = lambda device: None
    for name, case in CASES.items():
        LAUNCHED.clear()
        with fusedact.use_backend("triton"):
            case()
        print(f"{name}: {' '.join(launched.strip('_').split('_')[0] for launched in LAUNCHED)}")


if __name__ == "__main__":
    sys.exit(main())
