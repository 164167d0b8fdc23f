"""Per op what runs: its module, its formula, its least bytes and FLOPs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedact
from fusedact import functional
from fusedact.activations import ACTIVATIONS
from fusedact.profiling.cases import Case
from fusedact.profiling.losses import LOSSES
from fusedact.profiling.op import EARLY as EARLY
from fusedact.profiling.op import PHASES as PHASES
from fusedact.profiling.op import Op as Op
from fusedact.profiling.op import Work as Work
from fusedact.profiling.op import logits, passes_over


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
    return GatedPair(_gated_formula(case) if nn is torch.nn else fused, logits(case))


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
    **LOSSES,
    "gated": Op(
        module=_gated_module,
        inputs=lambda case: (logits(case),),
        formula=_gated_formula,
        forward=passes_over(2, 1, flops=5),  # exponential, sum, quotient, two products
        backward=passes_over(3, 2, flops=10),
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
        inputs=lambda case: (logits(case),),
        formula=_activation_formula,
        forward=passes_over(1, 1, flops=4),  # softsign's, with |x|, and about as many as its derivative's
        backward=passes_over(2, 1, flops=4),
    ),
    "prelu": Op(
        module=lambda nn, case: nn.PReLU(case.shape[1]),
        inputs=lambda case: (logits(case),),
        formula=lambda case: F.prelu,
        forward=passes_over(1, 1, flops=2),
        backward=passes_over(2, 1, flops=3),
    ),
}


def work(case: Case, phase: str) -> Work:
    op = OPS[case.op]
    if phase == "both":
        return op.forward(case) + op.backward(case)
    return op.backward(case) if phase == "backward" else op.forward(case)
