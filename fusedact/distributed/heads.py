"""A classifier's last layer together with its loss, the classes spread over the ranks of a group."""

from typing import Any

import torch
from torch import Tensor, nn

from fusedact import autograd, backend
from fusedact.distributed.losses import check_tensors, check_weight, checked_smoothing, checked_target
from fusedact.distributed.slices import OfGroup, Slice, check_own, checked_slice, slice_of
from fusedact.functional.checks import cast, checked_reduction
from fusedact.functional.heads import logits_shape
from fusedact.functional.losses import check_classes, check_extensions


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    group: Any = None,
    classes: int | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    sample_weight: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """functional.linear_cross_entropy of a layer whose classes are spread over the ranks of a group.

    input (K) or (N, K), target () or (N,) int64 of all classes, weight (C,) and sample_weight, as target: each whole
    and the same on every rank. linear_weight (C_local, K) and linear_bias (C_local,) are this rank's: of C classes over
    p ranks, rank r has ceil(C / p), or what is left, from r ceil(C / p) on, as torch.chunk and DTensor's Shard split
    them, maybe none. -> () for 'mean' and 'sum', as target for 'none', in input's dtype (float32 under autocast), the
    same bits on every rank. The gradient of input is whole on every rank; those of linear_weight and linear_bias are
    this rank's.

    group: of torch.distributed, None the default one, or this process alone where none was started. classes: C; of one
    rank None is as many as it has. chunk_rows: the rows whose logits are there at a time, of two chunks at once; None:
    by what a device has room for. The other options as in `functional.linear_cross_entropy`.

    A chunk of rows is one all-gather of 3 numbers a row (5 with label smoothing) in float32 or wider, on its way while
    the next is multiplied, and, where input wants a gradient, one all-reduce of its dx in float32 or wider. Every rank
    makes the same calls, so all of the group must call with the same arguments and want the same gradients. They are
    made with the loss where it is a mean or a sum, except in float16: there, and of 'none', by backward from logits
    taken once more, which exchanges nothing again but dx.

    Raises functional.linear_cross_entropy's errors; TypeError for probabilities as the target and for a DTensor;
    ValueError for a slice that is not torch.chunk's, for several ranks without `classes` and for a process outside the
    group; RuntimeError where a weight wants a gradient, and where a second derivative or a functorch transform is asked
    for. Each rank checks its own arguments before it sends: one that is alone in its error leaves the others waiting,
    until the group's timeout or until torchrun ends them.
    Source: torch.distributed.tensor.parallel.loss_parallel, and Megatron-LM (arXiv:1909.08053), section 3.
    """
    check_tensors(input, target, weight, sample_weight)
    _check_layer(input, linear_weight, linear_bias)
    check_extensions(input, z_loss, softcap, sample_weight)
    part = checked_slice("linear_weight", linear_weight, 0, classes, group)
    target = checked_target(input, target)
    low, dtype, single = backend.autocast_dtype(input), input.dtype, input.dim() == 1
    if low is not None:
        input, linear_weight = cast(input, low), cast(linear_weight, low)
        linear_bias = linear_bias if linear_bias is None else cast(linear_bias, low)
        weight = weight if weight is None else cast(weight, torch.float32)
    _check_dtypes(input, linear_weight, linear_bias)
    check_weight(weight, part.classes, input.dtype if low is None else backend.wide(input.dtype))
    numbers = checked_smoothing(label_smoothing), float(z_loss), float(softcap or 0.0)
    reduction = checked_reduction(None, None, reduction)
    if chunk_rows is not None and (type(chunk_rows) is not int or chunk_rows < 1):
        raise ValueError(f"chunk_rows must be a positive integer or None, got {chunk_rows!r}")
    if backend.looks_at_values(target):
        check_classes(target, ignore_index, part.classes)
    if single:
        input, target = input[None], target[None]
        sample_weight = sample_weight if sample_weight is None else sample_weight[None]
    tensors = input, linear_weight, linear_bias, target, weight, sample_weight
    place = chunk_rows or 0, part.group, part.first, part.classes
    loss = autograd.vocab_parallel_linear_cross_entropy(*tensors, ignore_index, reduction, *numbers, *place)
    loss = loss[0] if single and reduction == "none" else loss
    return loss if low is not None else loss.to(dtype)


def _check_layer(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """That its tensors are this process's and on one device, and that it has logits."""
    check_own({"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}, "linear_bias")
    logits_shape(input, linear_weight, linear_bias)
    if linear_weight.dim() != 2:
        raise RuntimeError(f"expected linear_weight with dimensionality 2, got {linear_weight.dim()}")


def _check_dtypes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    for name, t in {"linear_weight": linear_weight, "linear_bias": linear_bias}.items():
        if t is not None and t.dtype != input.dtype:
            raise RuntimeError(f"expected {name} to have input's dtype, {input.dtype}, but got {t.dtype}")


class VocabParallelLinearCrossEntropyLoss(OfGroup):
    """nn.LinearCrossEntropyLoss whose classes are spread over the ranks of a group.

    The layer is `linear`, of which `linear.weight` (C_local, in_features) and `linear.bias` (C_local,) are this rank's
    slice; see `vocab_parallel_linear_cross_entropy`. Every rank draws the whole layer, as nn.Linear does, and keeps its
    slice: from one seed come the parameters of the layer that is not sharded. So the whole is there while the module is
    made; of device="meta" nothing is.

    state_dict holds the slice. For torch.distributed.checkpoint, of any number of ranks, save and load
    DTensor.from_local(weight, mesh, [Shard(0)], shape=(C, in_features), stride=(in_features, 1)) in its place.

    Shapes: input (in_features) or (N, in_features), target () or (N), sample_weight as target -> () or as target.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        chunk_rows: int | None = None,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.group = group
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.chunk_rows = chunk_rows
        self.linear = _own_rows(nn.Linear(in_features, num_classes, bias, device, dtype), slice_of(num_classes, group))

    def forward(self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        return vocab_parallel_linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            group=self.group,
            classes=self.num_classes,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            sample_weight=sample_weight,
            chunk_rows=self.chunk_rows,
        )

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, reduction={self.reduction!r}, ignore_index={self.ignore_index}"


def _own_rows(linear: nn.Linear, part: Slice) -> nn.Linear:
    """The layer with the rows of that slice alone, in memory of their own."""
    for name, parameter in list(linear.named_parameters()):
        own = parameter.detach()[part.first : part.end].clone()
        setattr(linear, name, nn.Parameter(own))
    linear.out_features = part.own
    return linear
