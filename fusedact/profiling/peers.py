"""Others' losses, to stand beside ours: of the packages that the `bench` extra names, and torch 2.13's own chunks.

A package is imported when it is measured. What is not installed, or does not run, is left out with its reason.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact.profiling.cases import Case
from fusedact.profiling.contenders import Contender


@dataclass(frozen=True)
class Peer:
    """build(case) imports it and gives its function of (x, target, *parameters).

    overwrites: the gradient goes where x was, so that it is given an x of its own.
    """

    build: Callable[[Case], Callable[..., Tensor]]
    overwrites: bool = False

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


PEERS = {
    "cross_entropy": {"Liger": Peer(_liger_cross_entropy, overwrites=True)},
    "linear_cross_entropy": {
        "Liger": Peer(_liger_head),
        "cut-cross-entropy": Peer(_cut_head),
        "torch's chunks": Peer(_torch_chunks),
    },
}
