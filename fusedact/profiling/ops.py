"""Per op what runs: its module, its formula, its least bytes and FLOPs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedact
from fusedact import functional
from fusedact.activations import ACTIVATIONS
from fusedact.profiling.cases import Case

PHASES = ("forward", "backward", "both")
EARLY = ("no_grad", "both")  # where gradients are made with the value, a backward alone does what no training does


@dataclass(frozen=True)
class Work:
    """The least a phase can do: every input read once, every output written once; one FLOP per operation."""

    bytes: int
    flops: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Op:
    """module(nn, case) on `torch.nn` or `fusedact.nn`; inputs(case), the first of which wants a gradient where
    input_gradient says so, as the parameters do; formula(case)(*inputs, *parameters) is the same in torch's functions,
    for the compiler and for the truth.
    """

    module: Callable[[ModuleType, Case], torch.nn.Module]
    inputs: Callable[[Case], tuple[Tensor, ...]]
    formula: Callable[[Case], Callable[..., Tensor]]
    forward: Callable[[Case], Work]
    backward: Callable[[Case], Work]
    phases: tuple[str, ...] = PHASES
    input_gradient: bool = True


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


def _convolution_module(nn: ModuleType, case: Case) -> torch.nn.Module:
    _, inputs, outputs, *sizes, kernel = case.shape
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sizes) - 1]
    return nn.Sequential(layer(inputs, outputs, kernel, padding="same"), ACTIVATIONS[case.activation].build())


def _convolution_inputs(case: Case) -> tuple[Tensor]:
    N, channels, _, *sizes, _ = case.shape
    return (torch.randn(N, channels, *sizes, dtype=case.torch_dtype),)


def _convolution_formula(case: Case) -> Callable[..., Tensor]:
    activation = ACTIVATIONS[case.activation]
    parameters = activation.parameters({})
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(case.shape) - 5]
    return lambda x, w, b: activation.reference(convolution(x, w, b, padding="same"), *parameters)


def _convolution_work(passes: int, products: int) -> Callable[[Case], Work]:
    """Passes over x, W and y each, with b, and products as torch takes them."""

    def work(case: Case) -> Work:
        N, inputs, outputs, *sizes, kernel = case.shape
        places, weights = N * prod(sizes), inputs * outputs * kernel ** len(sizes)
        elements = passes * (places * (inputs + outputs) + weights) + outputs
        return Work(elements * case.torch_dtype.itemsize, products * 2 * places * weights)

    return work


class GatedPair(torch.nn.Module):
    """function(gate, up), of which up is a parameter here, so that both get their gradient."""

    def __init__(self, function: Callable[..., Tensor], up: Tensor):
        super().__init__()
        self.function, self.up = function, torch.nn.Parameter(up)

    def forward(self, gate: Tensor) -> Tensor:
        return self.function(gate, self.up)


def _gated_module(nn: ModuleType, case: Case) -> torch.nn.Module:
    fused = partial(functional.gated, activation=case.activation)
    return GatedPair(_gated_formula(case) if nn is torch.nn else fused, _logits(case))


def _gated_formula(case: Case) -> Callable[..., Tensor]:
    activation = ACTIVATIONS[case.activation]
    parameters = activation.parameters({})
    return lambda gate, up: activation.reference(gate, *parameters) * up


class GatedBlock(torch.nn.Module):
    """down(act(gate x) * up x), written on torch.nn as someone else would."""

    def __init__(self, case: Case):
        super().__init__()
        _, features, hidden = case.shape
        self.gate, self.up = (torch.nn.Linear(features, hidden, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(hidden, features, bias=False)
        self.act = ACTIVATIONS[case.activation].build()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def _fused_block_module(nn: ModuleType, case: Case) -> torch.nn.Module:
    block = GatedBlock(case)
    return block if nn is torch.nn else fusedact.fuse(block)


def _fused_block_formula(case: Case) -> Callable[..., Tensor]:
    pair = _gated_formula(case)
    return lambda x, gate, up, down: F.linear(pair(F.linear(x, gate), F.linear(x, up)), down)


def _fused_block_work(hidden: int, products: int) -> Callable[[Case], Work]:
    """Passes over what is hidden features wide, over x or its gradient and y or its, and over the three weights."""

    def work(case: Case) -> Work:
        M, K, N = case.shape
        elements = hidden * M * N + 2 * M * K + 3 * N * K
        return Work(elements * case.torch_dtype.itemsize, products * 2 * M * N * K)

    return work


class Alone(torch.nn.Module):
    """function(x), of an activation that has no class."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _activation_module(nn: ModuleType, case: Case) -> torch.nn.Module:
    activation = ACTIVATIONS[case.activation]
    if activation.module is None:
        fused = partial(functional.activate, activation=activation.name)
        return Alone(activation.reference if nn is torch.nn else fused)
    options = {} if activation.approximate is None else {"approximate": activation.approximate}
    return getattr(nn, activation.module.__name__)(**dict(activation.defaults), **options)


def _activation_formula(case: Case) -> Callable[..., Tensor]:
    activation = ACTIVATIONS[case.activation]
    parameters = activation.parameters({})
    return lambda x: activation.reference(x, *parameters)


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


class StockHead(torch.nn.Module):
    """A linear layer, then a loss; older torch has neither head."""

    def __init__(self, linear: torch.nn.Linear, loss: torch.nn.Module):
        super().__init__()
        self.linear, self.loss = linear, loss

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.linear(x), target)


def _head_module(nn: ModuleType, case: Case) -> torch.nn.Module:
    _, features, classes = case.shape
    if nn is torch.nn:
        return StockHead(nn.Linear(features, classes, bias=False), nn.CrossEntropyLoss())
    options = SimpleNamespace(batch_chunk_size=case.chunk) if case.chunk else None  # older torch has no class for it
    return nn.LinearCrossEntropyLoss(features, classes, options=options)


def _head_inputs(case: Case) -> tuple[Tensor, Tensor]:
    rows, features, classes = case.shape
    return torch.randn(rows, features, dtype=case.torch_dtype), torch.randint(classes, (rows,))


def _head_formula(case: Case) -> Callable[..., Tensor]:
    return lambda x, target, w: F.cross_entropy(F.linear(x, w), target)


def _head_work(passes: int, products: int) -> Callable[[Case], Work]:
    """Passes over x and W each, with labels, and products as torch takes them; logits need no memory."""

    def work(case: Case) -> Work:
        rows, features, classes = case.shape
        moved = passes * (rows + classes) * features * case.torch_dtype.itemsize + 8 * rows
        return Work(moved, products * 2 * rows * features * classes)

    return work


def _binary_head_module(nn: ModuleType, case: Case) -> torch.nn.Module:
    features = case.shape[1]
    if nn is torch.nn:
        return StockHead(nn.Linear(features, 1), nn.BCEWithLogitsLoss())
    return nn.LinearBCEWithLogitsLoss(features)


def _binary_head_inputs(case: Case) -> tuple[Tensor, Tensor]:
    return _logits(case), torch.rand(case.shape[0], 1, dtype=case.torch_dtype)


def _binary_head_formula(case: Case) -> Callable[..., Tensor]:
    return lambda x, target, w, b: F.binary_cross_entropy_with_logits(F.linear(x, w, b), target)


def _binary_head_work(reads: int, flops: int) -> Callable[[Case], Work]:
    """Reads of x, and operations on each of its elements, with a target a row; all but these is small."""

    def work(case: Case) -> Work:
        rows, features = case.shape
        return Work((reads * features + 1) * rows * case.torch_dtype.itemsize, flops * rows * features)

    return work


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
    "convolution_act": Op(
        module=_convolution_module,
        inputs=_convolution_inputs,
        formula=_convolution_formula,
        forward=_convolution_work(1, products=1),
        backward=_convolution_work(2, products=2),  # reads dy, y, x and W, writes dx, dW and db
    ),
    "cross_entropy": Op(
        module=lambda nn, case: nn.CrossEntropyLoss(),
        inputs=_labelled,
        formula=lambda case: F.cross_entropy,
        forward=_loss_work(1, 0, flops=4, label_bytes=8),  # maximum, difference, exponential, sum
        backward=_loss_work(1, 1, flops=4, label_bytes=8),  # difference, exponential, two products
    ),
    "cross_entropy_grad_in_forward": Op(
        module=lambda nn, case: nn.CrossEntropyLoss(**{} if nn is torch.nn else {"grad_in_forward": True}),
        inputs=_labelled,
        formula=lambda case: F.cross_entropy,
        forward=_loss_work(1, 0, flops=4, label_bytes=8),
        backward=_loss_work(0, 1, flops=4),  # from the row that is there
        phases=EARLY,
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
    "linear_cross_entropy": Op(
        module=_head_module,
        inputs=_head_inputs,
        formula=_head_formula,
        forward=_head_work(1, products=1),
        backward=_head_work(2, products=2),  # reads x and W, writes dx and dW
        phases=EARLY,
    ),
    "linear_bce": Op(
        module=_binary_head_module,
        inputs=_binary_head_inputs,
        formula=_binary_head_formula,
        forward=_binary_head_work(1, flops=2),
        backward=_binary_head_work(0, flops=2),  # dW, from the row that is there
        phases=EARLY,
        input_gradient=False,  # it is data
    ),
    "gated": Op(
        module=_gated_module,
        inputs=lambda case: (_logits(case),),
        formula=_gated_formula,
        forward=_loss_work(2, 1, flops=5),  # exponential, sum, quotient, two products
        backward=_loss_work(3, 2, flops=10),
    ),
    "fused_block": Op(
        module=_fused_block_module,
        inputs=lambda case: (torch.randn(case.shape[:2], dtype=case.torch_dtype),),
        formula=_fused_block_formula,
        forward=_fused_block_work(6, products=3),  # three writes, three reads
        backward=_fused_block_work(12, products=6),
    ),
    "activation": Op(
        module=_activation_module,
        inputs=lambda case: (_logits(case),),
        formula=_activation_formula,
        forward=_loss_work(1, 1, flops=4),  # softsign's, with |x|, and about as many as its derivative's
        backward=_loss_work(2, 1, flops=4),
    ),
    "prelu": Op(
        module=lambda nn, case: nn.PReLU(case.shape[1]),
        inputs=lambda case: (_logits(case),),
        formula=lambda case: F.prelu,
        forward=_loss_work(1, 1, flops=2),
        backward=_loss_work(2, 1, flops=3),
    ),
}


def work(case: Case, phase: str) -> Work:
    op = OPS[case.op]
    if phase == "both":
        return op.forward(case) + op.backward(case)
    return op.backward(case) if phase == "backward" else op.forward(case)
