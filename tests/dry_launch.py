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


def bce(shape, dtype=torch.float32, **options):
    target = torch.zeros(shape, dtype=dtype)
    return functools.partial(loss, F.binary_cross_entropy_with_logits, shape, target, dtype, **options)


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
    "10 classes": cross_entropy(100, 10),
    "one row of one class": cross_entropy(1, 1),
    "1,000 classes": cross_entropy(64, 1000, torch.bfloat16, reduction="none"),
    "128,256 classes": cross_entropy(2, 128_256, torch.bfloat16, reduction="sum", ignore_index=1),
    "float64 classes": cross_entropy(3, 20, torch.float64),
    "bce of one": bce((1,)),
    "bce": bce((64, 100), torch.bfloat16),
    "bce, no reduction": bce((64, 100), torch.float64, reduction="none"),
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
