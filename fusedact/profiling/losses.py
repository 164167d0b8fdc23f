"""The losses, softmax and heads among the ops: what runs over rows of classes, or of yes and no."""

from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact.distributed import VocabParallelCrossEntropyLoss
from fusedact.profiling.cases import Case
from fusedact.profiling.op import EARLY, Op, Work, logits, passes_over


def _labelled(case: Case) -> tuple[Tensor, Tensor]:
    rows = (case.shape[0], *case.shape[2:])
    return logits(case), torch.randint(case.shape[1], rows)


def _halved(case: Case) -> tuple[Tensor, Tensor]:
    """Logits, and how likely each is."""
    return logits(case), torch.rand(case.shape, dtype=case.torch_dtype)


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
    return logits(case), torch.rand(case.shape[0], 1, dtype=case.torch_dtype)


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


LOSSES = {
    "cross_entropy": Op(
        module=lambda nn, case: nn.CrossEntropyLoss(),
        inputs=_labelled,
        formula=lambda case: F.cross_entropy,
        forward=passes_over(1, 0, flops=4, label_bytes=8),  # maximum, difference, exponential, sum
        backward=passes_over(1, 1, flops=4, label_bytes=8),  # difference, exponential, two products
    ),
    "cross_entropy_grad_in_forward": Op(
        module=lambda nn, case: nn.CrossEntropyLoss(**{} if nn is torch.nn else {"grad_in_forward": True}),
        inputs=_labelled,
        formula=lambda case: F.cross_entropy,
        forward=passes_over(1, 0, flops=4, label_bytes=8),
        backward=passes_over(0, 1, flops=4),  # from the row that is there
        phases=EARLY,
    ),
    "vocab_parallel_cross_entropy": Op(  # of one process: what each of several does, but for the exchange
        module=lambda nn, case: nn.CrossEntropyLoss() if nn is torch.nn else VocabParallelCrossEntropyLoss(),
        inputs=_labelled,
        formula=lambda case: F.cross_entropy,
        forward=passes_over(1, 0, flops=4, label_bytes=8),
        backward=passes_over(1, 1, flops=4, label_bytes=8),
    ),
    "bce_with_logits": Op(
        module=lambda nn, case: nn.BCEWithLogitsLoss(),
        inputs=_halved,
        formula=lambda case: F.binary_cross_entropy_with_logits,
        forward=passes_over(2, 0, flops=8),  # 1 - t, product, |x|, exponential, logarithm, minimum, two sums
        backward=passes_over(2, 1, flops=5),  # exponential, sum, quotient, difference, product
    ),
    "cross_entropy_smoothed": Op(
        module=lambda nn, case: nn.CrossEntropyLoss(_class_weights(case), label_smoothing=0.1),
        inputs=_labelled,
        formula=_with_weights(F.cross_entropy, "weight", label_smoothing=0.1),
        forward=passes_over(1, 0, flops=6, label_bytes=8),
        backward=passes_over(1, 1, flops=6, label_bytes=8),
    ),
    "cross_entropy_probabilities": Op(
        module=lambda nn, case: nn.CrossEntropyLoss(),
        inputs=lambda case: (logits(case), logits(case).softmax(1)),
        formula=lambda case: F.cross_entropy,
        forward=passes_over(2, 0, flops=6),
        backward=passes_over(2, 1, flops=5),
    ),
    "nll_loss": Op(
        module=lambda nn, case: nn.NLLLoss(),
        inputs=_labelled,
        formula=lambda case: F.nll_loss,
        forward=passes_over(0, 0, flops=0, label_bytes=8),
        backward=passes_over(0, 1, flops=0, label_bytes=8),
    ),
    "softmax": Op(
        module=lambda nn, case: nn.Softmax(1),
        inputs=lambda case: (logits(case),),
        formula=lambda case: partial(F.softmax, dim=1),
        forward=passes_over(1, 1, flops=5),
        backward=passes_over(2, 1, flops=4),
    ),
    "log_softmax": Op(
        module=lambda nn, case: nn.LogSoftmax(1),
        inputs=lambda case: (logits(case),),
        formula=lambda case: partial(F.log_softmax, dim=1),
        forward=passes_over(1, 1, flops=5),
        backward=passes_over(2, 1, flops=4),
    ),
    "bce_with_logits_weighted": Op(
        module=lambda nn, case: nn.BCEWithLogitsLoss(pos_weight=_class_weights(case)),
        inputs=_halved,
        formula=_with_weights(F.binary_cross_entropy_with_logits, "pos_weight"),
        forward=passes_over(2, 0, flops=10),
        backward=passes_over(2, 1, flops=7),
    ),
    "bce": Op(
        module=lambda nn, case: nn.BCELoss(),
        inputs=lambda case: (torch.rand(case.shape, dtype=case.torch_dtype), _halved(case)[1]),
        formula=lambda case: F.binary_cross_entropy,
        forward=passes_over(2, 0, flops=8),
        backward=passes_over(2, 1, flops=5),
    ),
    "multilabel_soft_margin": Op(
        module=lambda nn, case: nn.MultiLabelSoftMarginLoss(),
        inputs=lambda case: (logits(case), torch.randint(2, case.shape).to(case.torch_dtype)),
        formula=lambda case: F.multilabel_soft_margin_loss,
        forward=passes_over(2, 0, flops=8),
        backward=passes_over(2, 1, flops=5),
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
}
