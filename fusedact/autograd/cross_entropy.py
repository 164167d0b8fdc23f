"""log-softmax + NLL of a class index, on logits. Saves the logits by reference and two numbers a row."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import backend
from fusedact.autograd.doors import Op


def _config(logits: Tensor):
    from fusedact.kernels import cross_entropy

    return cross_entropy.tile(logits.shape[1], logits.element_size(), backend.chip(logits.device)[1])


def _launch(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from fusedact.kernels import cross_entropy

    with backend.on_device(logits):
        loss, stats, count = cross_entropy.forward(logits, target, ignore_index, reduction, _config(logits), save)
    absent = [logits.new_empty(0) if t is None else t for t in (stats, count)]
    return loss, *absent


def _fake(logits, target, ignore_index, reduction, save):
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    reduced = reduction != "none"
    loss = logits.new_empty(() if reduced else logits.shape[:1])
    stats = logits.new_empty((2, logits.shape[0]), dtype=wide) if save else logits.new_empty(0)
    count = logits.new_empty(1, dtype=wide) if reduced else logits.new_empty(0)
    return loss, stats, count


def _backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    count: Tensor,
    ignore_index: int,
    reduction: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    from fusedact.kernels import cross_entropy

    with backend.on_device(logits):
        dx = cross_entropy.backward(
            dloss,
            logits,
            target,
            stats.contiguous(),
            count if reduction == "mean" else None,
            ignore_index,
            _config(logits),
        )
    return dx, logits.new_empty(0)


def _backward_fake(dloss, logits, *_):
    return logits.new_empty(logits.shape), logits.new_empty(0)


def _composite(logits, target, ignore_index, reduction):
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)


_TENSORS = "Tensor logits, Tensor target"
_OPTIONS = "int ignore_index, str reduction"

cross_entropy = Op(
    name="cross_entropy",
    tensors=2,
    schema=f"({_TENSORS}, {_OPTIONS}, bool save) -> (Tensor, Tensor, Tensor)",
    launch=_launch,
    fake=_fake,
    extras=lambda output, options: output[1:],
    backward_schema=f"(Tensor dloss, {_TENSORS}, Tensor stats, Tensor count, {_OPTIONS}, bool[] wanted)"
    " -> (Tensor, Tensor)",
    backward=_backward,
    backward_fake=_backward_fake,
    composite=_composite,
).register()
