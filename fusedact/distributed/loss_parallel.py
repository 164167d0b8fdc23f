"""For those who call torch's cross-entropy, or a stock model that does, on logits whose classes are in shards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusedact.backend import is_sharded
from fusedact.functional import cross_entropy
from fusedact.functional.checks import class_dim


@contextmanager
def loss_parallel() -> Iterator[None]:
    """Inside, torch.nn.functional.cross_entropy of a DTensor whose classes are in shards gathers no logits.

    It is torch.distributed.tensor.parallel.loss_parallel by another import: logits (C), (N, C) or (N, C, d1, ...) with
    Shard(class dimension) on one dimension of the mesh, target of class indices placed as the logits without classes;
    a plain target where these are replicated, a plain weight anywhere. torch.nn.CrossEntropyLoss calls it. Beyond
    torch's: label_smoothing, 'mean' on a mesh of several dimensions, shards of uneven size, placements of the target
    other than the logits', and a backward outside. Not here: log_softmax and nll_loss called apart, which stay torch's.

    What each rank sends forward are a row's numbers, 12 bytes (20 with label_smoothing) in one all-gather; backward
    nothing. The loss is a DTensor: () replicated, or as the target for 'none'. It has no second derivative.

    Raises what torch's raises: ValueError for a plain target of rows that are in shards; and RuntimeError for
    create_graph. Source:
    torch.distributed.tensor.parallel.loss_parallel.
    """
    with _LossParallel():
        yield


class _LossParallel(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.cross_entropy:
            return func(*args, **kwargs)
        return _cross_entropy(*args, **kwargs)


def _cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    if not (is_sharded(input) and any(p.is_shard(class_dim(input)) for p in input.placements)):  # type: ignore[attr-defined]
        return F.cross_entropy(input, target, weight, *args, **kwargs)
    if isinstance(target, Tensor) and not is_sharded(target):
        split = [p for p in input.placements if p.is_shard() and not p.is_shard(class_dim(input))]  # type: ignore[attr-defined]
        if split:
            raise ValueError(f"target must be a DTensor where the logits' rows are in shards, {split}, got a Tensor")
        target = _replicated(target, input)
    if isinstance(weight, Tensor) and not is_sharded(weight):
        weight = _replicated(weight, input)
    return cross_entropy(input, target, weight, *args, **kwargs)


def _replicated(t: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(t, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
