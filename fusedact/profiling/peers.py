"""Others' losses, to stand beside ours: of the packages that the `bench` extra names, and torch 2.13's own chunks.

A package is imported when it is measured. What is not installed, or does not run, is left out with its reason.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact.activations import ACTIVATIONS
from fusedact.profiling.cases import Case
from fusedact.profiling.contenders import Contender


@dataclass(frozen=True)
class Peer:
    """build(case) imports it and gives its function of (x, target, *parameters).

    overwrites: the gradient goes where x was, so that it is given an x of its own.
    early: gradients are made in forward, so that a backward alone says nothing.
    waits: it looks at the device's values meanwhile, which no graph can capture.
    """

    build: Callable[[Case], Callable[..., Tensor]]
    overwrites: bool = False
    early: bool = False
    waits: bool = False

    def contender(self, case: Case, stock: Contender) -> Contender:
        """On stock's arguments."""
        x, *others = stock.args
        own = x.detach().clone().requires_grad_() if self.overwrites else x
        parameters = tuple(arg for arg in stock.wanted if arg is not x)
        return Contender(self.build(case), (own, *others, *parameters), (own, *parameters))


def _liger_cross_entropy(case: Case) -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()


def _liger_head(case: Case) -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, target, w: loss(w, x, target)


def _cut_head(case: Case) -> Callable[..., Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, target, w: linear_cross_entropy(x, w, target)


def _torch_chunks(case: Case) -> Callable[..., Tensor]:
    options = torch.nn.LinearCrossEntropyOptions()  # torch 2.13 or newer
    return lambda x, target, w: F.linear_cross_entropy(x, w, target, options=options)


def _attorch_layer(case: Case) -> Callable[..., Tensor]:
    """Which holds Wᵀ: it is given stock's weight as a view."""
    import attorch

    layer = attorch.Linear(case.shape[2], case.shape[1], act_func=case.activation)
    del layer.weight, layer.bias

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        layer.weight, layer.bias = w.T, b
        return layer(x)

    return function


def _attorch_activation(case: Case) -> Callable[..., Tensor]:
    import attorch

    activation = ACTIVATIONS[case.activation]
    if activation.module is None:
        raise ValueError(f"attorch has no {activation.name}")
    return getattr(attorch, activation.module.__name__)(**dict(activation.defaults))


def _attorch(name: str, *args: int) -> Callable[[Case], Callable[..., Tensor]]:
    """attorch's class of that name, made of these arguments."""

    def build(case: Case) -> Callable[..., Tensor]:
        import attorch

        return getattr(attorch, name)(*args)

    return build


PEERS = {
    "cross_entropy": {
        "Liger": Peer(_liger_cross_entropy, overwrites=True, early=True, waits=True),
        "attorch": Peer(_attorch("CrossEntropyLoss")),
    },
    "linear_cross_entropy": {
        "Liger": Peer(_liger_head, early=True, waits=True),
        "cut-cross-entropy": Peer(_cut_head, waits=True),
        "torch's chunks": Peer(_torch_chunks, early=True),
    },
    "linear_act": {"attorch": Peer(_attorch_layer)},
    "nll_loss": {"attorch": Peer(_attorch("NLLLoss"))},
    "softmax": {"attorch": Peer(_attorch("Softmax", 1))},
    "log_softmax": {"attorch": Peer(_attorch("LogSoftmax", 1))},
    "activation": {"attorch": Peer(_attorch_activation)},
}
