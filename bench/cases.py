"""The cases table, one line each, and per op what runs: its module, its formula, its least bytes and FLOPs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedact
from fusedact.activations import ACTIVATIONS
from fusedact.tuning.candidates import RATES, Chip, Problem, candidates

PHASES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype.

    shape: linear_act (M, N, K), linear_chain the same and a layer of K after it, conv2d_act (images, channels in,
        channels out, height and width, kernel), of classes (rows, classes, ...), of yes and no (elements,) or
        (rows, classes)
    precision: torch's float32 matmul precision
    threshold: the least ratio to stock eager, in device time of each phase and in wall time of both
    target: the ratio of both phases that a later version promises
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    activation: str = ""
    precision: str = "highest"
    threshold: float = 0.97
    target: float | None = None

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        high = self.precision if self.precision != "highest" else None
        return " ".join(filter(None, (self.op, self.activation, shape, self.dtype, high)))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def matrix_rate(self) -> str | None:
        """The ceiling that its FLOPs meet, or None where only bytes count."""
        if self.op not in ("linear_act", "linear_chain", "conv2d_act"):
            return None
        high = self.precision == "high" or self.op == "conv2d_act"  # cuDNN's default
        kind = "bf16" if self.torch_dtype.itemsize == 2 else "tf32" if high else "fp32"
        return f"{kind}, TFLOP/s"

    def work(self, phase: str) -> "Work":
        op = OPS[self.op]
        if phase == "both":
            return op.forward(self) + op.backward(self)
        return getattr(op, phase)(self)

    def tiny(self) -> "Case":
        """The same code at a shape for a dry run."""
        if self.op == "conv2d_act":  # in 16 bits torch rounds before it adds b on a GPU, but not on a CPU
            return replace(self, shape=tuple(min(n, 8) for n in self.shape), dtype="float32", target=None)
        return replace(self, shape=tuple(min(n, 40) for n in self.shape), target=None)


@dataclass(frozen=True)
class Step:
    """A whole training step of a trainer, optimizer included, on stock and on fused layers."""

    system: str
    trainer: str
    threshold: float = 0.97

    @property
    def name(self) -> str:
        return f"{self.system} {self.trainer}"


@dataclass(frozen=True)
class Work:
    """The least a phase can do: every input read once, every output written once; one FLOP per operation."""

    bytes: int
    flops: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Op:
    """module(nn, case) on `torch.nn` or `fusedact.nn`; inputs(case), the first of which wants a gradient;
    formula(case)(*inputs, *parameters) is the same in torch's functions, for the compiler and for the truth.
    """

    module: Callable[[ModuleType, Case], torch.nn.Module]
    inputs: Callable[[Case], tuple[Tensor, ...]]
    formula: Callable[[Case], Callable[..., Tensor]]
    forward: Callable[[Case], Work]
    backward: Callable[[Case], Work]


def _linear_module(nn: ModuleType, case: Case) -> torch.nn.Module:
    _, N, K = case.shape
    return nn.Sequential(nn.Linear(K, N), ACTIVATIONS[case.activation].build())


def _linear_formula(case: Case) -> Callable[..., Tensor]:
    activation = ACTIVATIONS[case.activation]
    parameters = activation.parameters({})
    return lambda x, w, b: activation.reference(F.linear(x, w, b), *parameters)


def _linear_forward(case: Case) -> Work:
    """Reads x, W and b, writes y, and z where the derivative is taken from it."""
    M, N, K = case.shape
    activation = ACTIVATIONS[case.activation]
    results = 1 if activation.from_output(case.torch_dtype, *activation.parameters({})) else 2
    return Work((M * K + N * K + N + results * M * N) * case.torch_dtype.itemsize, 2 * M * N * K)


def _linear_backward(case: Case) -> Work:
    """Reads dy, y or z, x and W, writes dx, dW and db."""
    M, N, K = case.shape
    return Work((2 * M * N + 2 * M * K + 2 * N * K + N) * case.torch_dtype.itemsize, 4 * M * N * K)


def _chain_module(nn: ModuleType, case: Case) -> torch.nn.Module:
    _, N, K = case.shape
    activation = ACTIVATIONS[case.activation]
    return nn.Sequential(nn.Linear(K, N), activation.build(), nn.Linear(N, K), activation.build())


def _chain_formula(case: Case) -> Callable[..., Tensor]:
    first = _linear_formula(case)
    return lambda x, w1, b1, w2, b2: first(first(x, w1, b1), w2, b2)


def _chain_forward(case: Case) -> Work:
    """Two layers, of which the second reads what the first wrote."""
    M, N, K = case.shape
    return _linear_forward(case) + _linear_forward(replace(case, shape=(M, K, N)))


def _chain_backward(case: Case) -> Work:
    """As two layers, of which neither writes nor reads the dy between them."""
    M, N, K = case.shape
    saved = Work(-2 * M * N * case.torch_dtype.itemsize, 0)
    return _linear_backward(case) + _linear_backward(replace(case, shape=(M, K, N))) + saved


def _conv2d_module(nn: ModuleType, case: Case) -> torch.nn.Module:
    _, inputs, outputs, _, kernel = case.shape
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding="same"), ACTIVATIONS[case.activation].build())


def _conv2d_inputs(case: Case) -> tuple[Tensor]:
    N, channels, _, size, _ = case.shape
    return (torch.randn(N, channels, size, size, dtype=case.torch_dtype),)


def _conv2d_formula(case: Case) -> Callable[..., Tensor]:
    activation = ACTIVATIONS[case.activation]
    parameters = activation.parameters({})
    return lambda x, w, b: activation.reference(F.conv2d(x, w, b, padding="same"), *parameters)


def _conv2d_work(passes: int, products: int) -> Callable[[Case], Work]:
    """Passes over x, W and y each, with b, and products as torch takes them."""

    def work(case: Case) -> Work:
        N, inputs, outputs, size, kernel = case.shape
        places, weights = N * size**2, inputs * outputs * kernel**2
        elements = passes * (places * (inputs + outputs) + weights) + outputs
        return Work(elements * case.torch_dtype.itemsize, products * 2 * places * weights)

    return work


def _loss_work(reads: int, writes: int, flops: int, label_bytes: int = 0) -> Callable[[Case], Work]:
    """Passes over the logits' shape and operations on each element, with a label a row."""

    def work(case: Case) -> Work:
        elements = prod(case.shape)
        moved = (reads + writes) * elements * case.torch_dtype.itemsize
        return Work(moved + label_bytes * (elements // case.shape[1] if label_bytes else 0), flops * elements)

    return work


def _logits(case: Case) -> Tensor:
    return torch.randn(case.shape, dtype=case.torch_dtype)


def _labelled(case: Case) -> tuple[Tensor, Tensor]:
    rows = (case.shape[0], *case.shape[2:])
    return _logits(case), torch.randint(case.shape[1], rows)


def _halved(case: Case) -> tuple[Tensor, Tensor]:
    """Logits, and how likely each is."""
    return _logits(case), torch.rand(case.shape, dtype=case.torch_dtype)


def _class_weights(case: Case) -> Tensor:
    return torch.linspace(0.5, 1.5, case.shape[-1] if case.op.startswith("bce") else case.shape[1])


def _with_weights(
    function: Callable[..., Tensor], name: str, **options: Any
) -> Callable[[Case], Callable[..., Tensor]]:
    def formula(case: Case) -> Callable[..., Tensor]:
        weights = _class_weights(case)
        return lambda x, target: function(x, target, **{name: weights.to(x)}, **options)

    return formula


OPS = {
    "linear_act": Op(
        module=_linear_module,
        inputs=lambda case: (torch.randn(case.shape[0], case.shape[2], dtype=case.torch_dtype),),
        formula=_linear_formula,
        forward=_linear_forward,
        backward=_linear_backward,
    ),
    "linear_chain": Op(
        module=_chain_module,
        inputs=lambda case: (torch.randn(case.shape[0], case.shape[2], dtype=case.torch_dtype),),
        formula=_chain_formula,
        forward=_chain_forward,
        backward=_chain_backward,
    ),
    "conv2d_act": Op(
        module=_conv2d_module,
        inputs=_conv2d_inputs,
        formula=_conv2d_formula,
        forward=_conv2d_work(1, products=1),
        backward=_conv2d_work(2, products=2),  # reads dy, y, x and W, writes dx, dW and db
    ),
    "cross_entropy": Op(
        module=lambda nn, case: nn.CrossEntropyLoss(),
        inputs=_labelled,
        formula=lambda case: F.cross_entropy,
        forward=_loss_work(1, 0, flops=4, label_bytes=8),  # maximum, difference, exponential, sum
        backward=_loss_work(1, 1, flops=4, label_bytes=8),  # difference, exponential, two products
    ),
    "bce_with_logits": Op(
        module=lambda nn, case: nn.BCEWithLogitsLoss(),
        inputs=_halved,
        formula=lambda case: F.binary_cross_entropy_with_logits,
        forward=_loss_work(2, 0, flops=8),  # 1 - t, product, |x|, exponential, logarithm, minimum, two sums
        backward=_loss_work(2, 1, flops=5),  # exponential, sum, quotient, difference, product
    ),
    "cross_entropy_smoothed": Op(
        module=lambda nn, case: nn.CrossEntropyLoss(_class_weights(case), label_smoothing=0.1),
        inputs=_labelled,
        formula=_with_weights(F.cross_entropy, "weight", label_smoothing=0.1),
        forward=_loss_work(1, 0, flops=6, label_bytes=8),
        backward=_loss_work(1, 1, flops=6, label_bytes=8),
    ),
    "cross_entropy_probabilities": Op(
        module=lambda nn, case: nn.CrossEntropyLoss(),
        inputs=lambda case: (_logits(case), _logits(case).softmax(1)),
        formula=lambda case: F.cross_entropy,
        forward=_loss_work(2, 0, flops=6),
        backward=_loss_work(2, 1, flops=5),
    ),
    "nll_loss": Op(
        module=lambda nn, case: nn.NLLLoss(),
        inputs=_labelled,
        formula=lambda case: F.nll_loss,
        forward=_loss_work(0, 0, flops=0, label_bytes=8),
        backward=_loss_work(0, 1, flops=0, label_bytes=8),
    ),
    "softmax": Op(
        module=lambda nn, case: nn.Softmax(1),
        inputs=lambda case: (_logits(case),),
        formula=lambda case: partial(F.softmax, dim=1),
        forward=_loss_work(1, 1, flops=5),
        backward=_loss_work(2, 1, flops=4),
    ),
    "log_softmax": Op(
        module=lambda nn, case: nn.LogSoftmax(1),
        inputs=lambda case: (_logits(case),),
        formula=lambda case: partial(F.log_softmax, dim=1),
        forward=_loss_work(1, 1, flops=5),
        backward=_loss_work(2, 1, flops=4),
    ),
    "bce_with_logits_weighted": Op(
        module=lambda nn, case: nn.BCEWithLogitsLoss(pos_weight=_class_weights(case)),
        inputs=_halved,
        formula=_with_weights(F.binary_cross_entropy_with_logits, "pos_weight"),
        forward=_loss_work(2, 0, flops=10),
        backward=_loss_work(2, 1, flops=7),
    ),
    "bce": Op(
        module=lambda nn, case: nn.BCELoss(),
        inputs=lambda case: (torch.rand(case.shape, dtype=case.torch_dtype), _halved(case)[1]),
        formula=lambda case: F.binary_cross_entropy,
        forward=_loss_work(2, 0, flops=8),
        backward=_loss_work(2, 1, flops=5),
    ),
    "multilabel_soft_margin": Op(
        module=lambda nn, case: nn.MultiLabelSoftMarginLoss(),
        inputs=lambda case: (_logits(case), torch.randint(2, case.shape).to(case.torch_dtype)),
        formula=lambda case: F.multilabel_soft_margin_loss,
        forward=_loss_work(2, 0, flops=8),
        backward=_loss_work(2, 1, flops=5),
    ),
    "prelu": Op(
        module=lambda nn, case: nn.PReLU(case.shape[1]),
        inputs=lambda case: (_logits(case),),
        formula=lambda case: F.prelu,
        forward=_loss_work(1, 1, flops=2),
        backward=_loss_work(2, 1, flops=3),
    ),
}

# In order of worth: where time is short, the last are skipped.
# fmt: off
CASES = (
    Case("linear_act", (4096, 4096, 4096), "bfloat16", "relu"),
    Case("linear_act", (4096, 4096, 4096), "float32", "relu", threshold=1.8),
    Case("cross_entropy", (4096, 32000), "bfloat16", target=2.0),
    Case("cross_entropy", (4096, 32000), "float32", target=2.0),
    Case("bce_with_logits", (2**26,), "float32", target=3.9),
    Case("linear_act", (100, 256, 784), "float32", "relu"),
    Case("linear_act", (64, 1, 3), "float32", "sigmoid"),
    Case("linear_act", (8192, 8192, 8192), "bfloat16", "relu"),
    Case("linear_act", (4096, 4096, 4096), "float32", "relu", "high"),
    Case("linear_act", (4096, 4096, 4096), "bfloat16", "gelu"),
    Case("linear_act", (4096, 4096, 4096), "bfloat16", "silu"),
    Case("linear_act", (4096, 4096, 4096), "bfloat16", "sigmoid"),
    Case("linear_chain", (4096, 4096, 4096), "bfloat16", "relu"),
    Case("linear_chain", (4096, 4096, 4096), "bfloat16", "gelu"),
    Case("linear_act", (2048, 1024, 1024), "bfloat16", "relu"),
    Case("linear_act", (2048, 1024, 1024), "float32", "relu"),
    Case("linear_act", (100, 256, 784), "bfloat16", "relu"),
    Case("linear_act", (64, 1, 3), "bfloat16", "sigmoid"),
    Case("linear_act", (1, 4096, 4096), "bfloat16", "relu"),
    Case("linear_act", (4096, 4096, 4096), "float16", "relu"),
    Case("linear_act", (4090, 4090, 4090), "bfloat16", "relu"),
    Case("linear_act", (4090, 4090, 4090), "float32", "relu"),
    Case("linear_chain", (4096, 1024, 1024), "float32", "relu"),
    Case("linear_chain", (100, 256, 784), "float32", "relu"),
    Case("cross_entropy", (4096, 128256), "bfloat16", target=2.0),
    Case("cross_entropy", (4096, 128256), "float32", target=2.0),
    Case("cross_entropy", (32768, 1000), "bfloat16", target=2.0),
    Case("cross_entropy", (32768, 1000), "float32", target=2.0),
    Case("cross_entropy", (32768, 32000), "bfloat16", target=2.0),
    Case("cross_entropy", (4096, 10), "float32"),
    Case("cross_entropy", (4096, 10), "bfloat16"),
    Case("cross_entropy", (4096, 1000), "float32"),
    Case("cross_entropy", (4096, 1000), "bfloat16"),
    Case("cross_entropy", (32768, 10), "float32"),
    Case("cross_entropy", (32768, 10), "bfloat16"),
    Case("bce_with_logits", (2**26,), "bfloat16", target=3.9),
    Case("bce_with_logits", (2**12,), "float32"),
    Case("bce_with_logits", (2**12,), "bfloat16"),
    Case("cross_entropy", (32768, 32000), "float32", target=2.0),
    Case("cross_entropy", (32768, 128256), "bfloat16", target=2.0),
    Case("cross_entropy", (32768, 128256), "float32", target=2.0),
    Case("linear_act", (8192, 8192, 8192), "float32", "relu", "high"),
    Case("linear_act", (8192, 8192, 8192), "float32", "relu", threshold=1.8),
    Case("cross_entropy_smoothed", (4096, 32000), "bfloat16", target=2.0),
    Case("cross_entropy_smoothed", (32768, 1000), "float32", target=2.0),
    Case("cross_entropy_probabilities", (32768, 1000), "bfloat16", target=2.0),
    Case("cross_entropy", (16, 21, 65536), "bfloat16", target=2.0),
    Case("nll_loss", (32768, 1000), "float32"),
    Case("softmax", (4096, 32000), "bfloat16"),
    Case("softmax", (32768, 1000), "float32"),
    Case("log_softmax", (4096, 32000), "bfloat16"),
    Case("bce_with_logits_weighted", (2**16, 1000), "float32", target=3.9),
    Case("bce", (2**26,), "float32"),
    Case("multilabel_soft_margin", (2**16, 1000), "float32", target=3.9),
    Case("prelu", (2**15, 1024), "bfloat16"),
    Case("conv2d_act", (64, 64, 256, 56, 1), "bfloat16", "relu"),
    Case("conv2d_act", (16, 50, 120, 28, 7), "float32", "relu"),
)
# fmt: on

# Against max-autotune as well, which takes its time to compile.
AUTOTUNED = (
    Case("linear_act", (4096, 4096, 4096), "bfloat16", "relu"),
    Case("linear_act", (4096, 4096, 4096), "float32", "relu", threshold=1.8),
    Case("linear_act", (8192, 8192, 8192), "bfloat16", "relu"),
    Case("linear_act", (4096, 4096, 4096), "float32", "relu", "high"),
    Case("linear_act", (2048, 1024, 1024), "bfloat16", "relu"),
)

STEPS = (Step("S1", "binary"), Step("S3", "xor"), Step("S5", "mnist-softmax"), Step("S6", "mnist-mlp"))


@dataclass(frozen=True)
class Contender:
    """A function, the arguments it is called with, and those of them that want a gradient."""

    function: Callable[..., Tensor]
    args: tuple[Tensor, ...]
    wanted: tuple[Tensor, ...]

    def forward(self) -> Tensor:
        return self.function(*self.args)

    def gradients(self, y: Tensor, dy: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.wanted, dy, retain_graph=retain_graph)

    def call(self, phase: str, dy: Tensor) -> Callable[[], object]:
        """The phase as a call without arguments; for the backward alone, forward runs here."""
        if phase == "forward":
            return self.forward
        if phase == "both":
            return lambda: self.gradients(self.forward(), dy)
        y = self.forward()
        return lambda: self.gradients(y, dy, retain_graph=True)


def contenders(case: Case, seed: int, compiled: Callable[..., Tensor] | None = None) -> dict[str, Contender]:
    """Stock and fused modules, and the compiled formula, over the same fresh inputs and parameters.

    Everything lands on torch's default device.
    """
    torch.manual_seed(seed)
    op = OPS[case.op]
    x, *others = op.inputs(case)
    inputs = (x.requires_grad_(), *others)
    stock, fused = (op.module(nn, case).to(case.torch_dtype) for nn in (torch.nn, fusedact.nn))
    fused.load_state_dict(stock.state_dict(), assign=True)
    parameters = tuple(stock.parameters())
    runs = {
        "stock": Contender(stock, inputs, (x, *parameters)),
        "fusedact": Contender(fused, inputs, (x, *fused.parameters())),
    }
    if compiled is not None:
        runs["compile"] = Contender(compiled, (*inputs, *parameters), (x, *parameters))
    return runs


def every_tile(task: str, dtypes: list[torch.dtype]) -> dict[str, tuple[torch.dtype, Any]]:
    """(dtype, tile) of all chips' candidates, each once. The interpreter tells neither warps nor stages apart."""
    found: dict[Any, tuple[str, torch.dtype, Any]] = {}
    for kind in RATES:
        chip = Chip(kind, shared_memory=227 * 1024, warp_size=32, multiprocessors=3)
        for dtype in dtypes:
            for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
                for name, tile in candidates(Problem(task, 1024, 1024, 1024, dtype, precision, True, chip)).items():
                    interpreted = tile and tile._replace(num_warps=4, num_stages=1, specialized=False)
                    key = tile if torch.cuda.is_available() else interpreted
                    found.setdefault((dtype, key), (f"{dtype} {name}", dtype, tile))
    return {name: (dtype, tile) for name, dtype, tile in found.values()}


def output_gradient(y: Tensor) -> Tensor:
    """dy: 1 for a loss, as training has it, else random."""
    return torch.randn_like(y) if y.dim() else torch.ones_like(y)
