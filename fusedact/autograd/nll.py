"""NLL of a class index on log-probabilities. Saves, by reference, what it was given and, for a mean, its divisor."""

import torch.nn.functional as F
from torch import Tensor

from fusedact import backend
from fusedact.autograd.doors import Op


def _launch(
    logp: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, save: bool
) -> tuple[Tensor, Tensor | None]:
    from fusedact.kernels import nll

    return nll.forward(logp, target, weight, ignore_index, reduction, nll.tile())


def _fake(logp, target, weight, ignore_index, reduction, save):
    if reduction == "none":
        return logp.new_empty(target.shape), None
    return logp.new_empty(()), logp.new_empty(1, dtype=backend.wide(logp.dtype))


def _backward(
    dloss: Tensor,
    logp: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    ignore_index: int,
    reduction: str,
    wanted: list[bool],
) -> tuple[Tensor, None, None]:
    from fusedact.kernels import nll

    dlogp = nll.backward(dloss, logp, target, weight, total if reduction == "mean" else None, ignore_index)
    return dlogp, None, None


def _backward_fake(dloss, logp, *_):
    return logp.new_empty(logp.shape), None, None


def _composite(logp, target, weight, ignore_index, reduction):
    return F.nll_loss(logp, target, weight, ignore_index=ignore_index, reduction=reduction)


_TENSORS = "Tensor logp, Tensor target, Tensor? weight"
_OPTIONS = "int ignore_index, str reduction"

nll_loss = Op(
    name="nll_loss",
    tensors=3,
    schema=f"({_TENSORS}, {_OPTIONS}, bool save) -> (Tensor, Tensor)",
    launch=_launch,
    fake=_fake,
    extras=lambda output, options: output[1:],
    backward_schema=f"(Tensor dloss, {_TENSORS}, Tensor total, {_OPTIONS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    backward=_backward,
    backward_fake=_backward_fake,
    composite=_composite,
).register()
