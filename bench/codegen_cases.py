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
from fusedact.kernels import bce, bias_activation, cross_entropy, linear


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


def linear_forward(chip, p, M, N, K, activation="relu", save_z=False):
    config = linear.tile(M, N, K, p.dtype.itemsize, chip.shared_memory)
    act_params, slope = parameters(activation, p.empty(N))
    act = getattr(device, activation)
    linear.forward(p.empty(M, K), p.empty(N, K), p.empty(N), act, act_params, slope, p.dot, config, save_z)
    elements = M * K + N * K + N + M * N * (2 if save_z else 1)
    return Work(config, elements * p.dtype.itemsize, 2 * M * N * K)


def linear_product(chip, p, a, b):
    (M, K), N = a.shape, b.shape[1]
    config = linear.tile(M, N, K, p.dtype.itemsize, chip.shared_memory)
    linear.product(a, b, p.dot, config)
    return Work(config, (M * K + K * N + M * N) * p.dtype.itemsize, 2 * M * N * K)


def linear_dx(chip, p, M, N, K):
    return linear_product(chip, p, p.empty(M, N), p.empty(N, K))


def linear_dw(chip, p, M, N, K):
    return linear_product(chip, p, p.empty(M, N).t(), p.empty(M, K))


def bias_activation_backward(chip, p, M, N, activation="relu", db=True, slopes=None):
    config = bias_activation.tile(M, N, p.dtype.itemsize)
    act_params, slope = parameters(activation, p.empty(slopes or N))
    act_grad = getattr(device, f"{activation}_grad")
    dy, saved = p.empty(M, N), p.empty(M, N)
    bias_activation.backward(dy, saved, act_grad, act_params, slope, db, slope is not None, config)
    elements = 3 * M * N + (N if db else 0) + (0 if slope is None else 2 * slope.numel())
    return Work(config, elements * p.dtype.itemsize)


def cross_entropy_forward(chip, p, N, C, reduction="mean", save=True):
    config = cross_entropy.tile(C, p.dtype.itemsize, chip.target.warp_size)
    target = torch.empty(N, dtype=torch.int64, device="meta")
    _, stats, _ = cross_entropy.forward(p.empty(N, C), target, -100, reduction, config, save)
    losses = N if reduction == "none" else 1
    saved = stats.nbytes if save else 0
    return Work(config, (N * C + losses) * p.dtype.itemsize + target.nbytes + saved)


def cross_entropy_backward(chip, p, N, C):
    config = cross_entropy.tile(C, p.dtype.itemsize, chip.target.warp_size)
    target = torch.empty(N, dtype=torch.int64, device="meta")
    statistic = PRECISIONS["fp64" if p.dtype == torch.float64 else "fp32"].empty
    stats, count = statistic(2, N), statistic(1)
    cross_entropy.backward(p.empty(), p.empty(N, C), target, stats, count, -100, config)
    return Work(config, 2 * N * C * p.dtype.itemsize + target.nbytes + stats.nbytes)


def bce_forward(chip, p, n, reduction="mean"):
    config = bce.tile()
    bce.forward(p.empty(n), p.empty(n), reduction, config)
    return Work(config, (2 * n + (n if reduction == "none" else 1)) * p.dtype.itemsize)


def bce_backward(chip, p, n, reduction="mean"):
    config = bce.tile()
    dloss = p.empty(n) if reduction == "none" else p.empty()
    bce.backward(dloss, p.empty(n), p.empty(n), reduction, config)
    return Work(config, (3 * n + dloss.numel()) * p.dtype.itemsize)


# Cases


@dataclass(frozen=True)
class Case:
    launcher: Callable[..., Work]
    precision: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = (f"{name}={value}" for name, value in self.options.items())
        return " ".join((self.launcher.__name__, self.precision, "x".join(map(str, self.shape)), *options))


CASES = (
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
    Case(bce_forward, "bf16", (2**26,)),
    Case(bce_forward, "bf16", (2**26,), {"reduction": "none"}),
    Case(bce_forward, "fp32", (2**26,)),
    Case(bce_forward, "fp64", (2**20,)),
    Case(bce_backward, "bf16", (2**26,)),
    Case(bce_backward, "fp32", (2**26,), {"reduction": "none"}),
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
