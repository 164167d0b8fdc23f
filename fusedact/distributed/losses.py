"""The loss of logits whose classes are spread over processes."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fusedact import autograd, backend
from fusedact.distributed.slices import OfGroup, check_own, checked_slice
from fusedact.functional.checks import cast, checked_reduction, class_dim
from fusedact.functional.losses import check_classes, check_extensions, wants_gradient


@overload
def vocab_parallel_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, *, group: Any = None, classes: int | None = None,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, sample_weight: Tensor | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def vocab_parallel_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, *, group: Any = None, classes: int | None = None,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, sample_weight: Tensor | None = None, return_lse: bool,
) -> Any: ...  # fmt: skip
def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: Any = None,
    classes: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    sample_weight: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """`cross_entropy` of all classes, of whose logits each process has a slice; equal to the unsharded loss.

    logits (C_local), (N, C_local) or (N, C_local, d1, ...), this process's slice: of C classes over p processes rank r
    has ceil(C / p), or what is left, from r ceil(C / p) on, as torch.chunk and DTensor's Shard split them, maybe none;
    target without classes, int64 (or uint8), indices of all classes; weight (C,) and sample_weight, as target, whole
    -> () for 'mean' and 'sum', as target for 'none', in logits' dtype; with return_lse (loss, lse), lse as target in
    float32 or wider. `group`: the processes, a torch.distributed group, None for the default one, or for this process
    alone where none was started. `classes`: C; None: of one process, as many as it has. All else as in `cross_entropy`.
    Each process gets the gradient of its logits; what is a sum over processes, the gradient of the layer's input say,
    is the caller's to add up.

    One all-gather of 12 bytes a row (20 with smoothing, twice that of float64) in forward, none in backward. It is a
    gather since a maximum and a sum are no one reduction. Every process must call it, with the same arguments but for
    the logits.

    Raises cross_entropy's errors; TypeError for class probabilities as the target and for a DTensor, whose to_local()
    is such a slice; ValueError for a slice that is not torch.chunk's and for several processes without `classes`;
    RuntimeError where a weight wants a gradient, and where a second derivative or a functorch transform is asked for.
    Each process checks its own arguments before it sends: one that is alone in its error leaves the others waiting,
    until the group's timeout or until torchrun ends them. Source: torch.distributed.tensor.parallel.loss_parallel, and
    Megatron-LM (arXiv:1909.08053), section 3.
    """
    check_tensors(logits, target, weight, sample_weight)
    check_extensions(logits, z_loss, softcap, sample_weight)
    own = checked_slice("logits", logits, class_dim(logits), classes, group)
    target = checked_target(logits, target)
    if backend.autocast_dtype(logits) is not None:
        logits = cast(logits, torch.float32)
        weight = weight if weight is None else cast(weight, torch.float32)
    check_weight(weight, own.classes, logits.dtype)
    smoothing = checked_smoothing(label_smoothing)
    reduction = checked_reduction(None, None, reduction)
    if backend.looks_at_values(target):
        check_classes(target, ignore_index, own.classes)
    tensors = logits, target, weight, sample_weight
    numbers = smoothing, float(z_loss), float(softcap or 0.0)
    place = own.group, own.first, own.classes
    return autograd.vocab_parallel_cross_entropy(*tensors, ignore_index, reduction, *numbers, return_lse, *place)


def check_tensors(logits: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None) -> None:
    named = {"logits": logits, "target": target, "weight": weight, "sample_weight": sample_weight}
    check_own(named, "weight", "sample_weight")
    if target.is_floating_point():
        raise TypeError("target must be class indices where the classes are spread over processes, got probabilities")
    if wants_gradient(weight, sample_weight):
        raise RuntimeError("weight and sample_weight get no gradient where the classes are spread over processes")
    if logits.dim() == 0:
        raise RuntimeError("logits must have a dimension of classes, got a tensor of none")
    if logits.dtype not in backend.KERNEL_DTYPES:
        raise NotImplementedError(f"vocab_parallel_cross_entropy is not implemented for {logits.dtype}")


def checked_target(logits: Tensor, target: Tensor) -> Tensor:
    """As int64. torch's errors for another dtype or shape."""
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {target.dtype}")
    dim = class_dim(logits)
    rows = logits.shape[:dim] + logits.shape[dim + 1 :]
    if target.shape != rows:
        if dim and target.dim() and target.shape[0] != logits.shape[0]:
            sizes = f"input batch_size ({logits.shape[0]}) to match target batch_size ({target.shape[0]})"
            raise ValueError(f"Expected {sizes}.")
        raise RuntimeError(f"Expected target size {list(rows)}, got {list(target.shape)}")
    return target.long()


def check_weight(weight: Tensor | None, classes: int, dtype: torch.dtype) -> None:
    if weight is None:
        return
    if weight.shape != (classes,):
        wanted = f"all {classes} classes or no classes but got weight tensor of shape: {list(weight.shape)}"
        raise RuntimeError(f"weight tensor should be defined either for {wanted}")
    if weight.dtype != dtype:
        raise RuntimeError(f"expected scalar type {dtype} but found {weight.dtype}")


def checked_smoothing(label_smoothing: float) -> float:
    """At most 1; a negative one is none, as to torch."""
    if not label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    return max(float(label_smoothing), 0.0)


class VocabParallelCrossEntropyLoss(OfGroup):
    """The loss of logits whose classes are spread over processes; see vocab_parallel_cross_entropy.

    weight (classes,), whole, is a buffer, as torch.nn.CrossEntropyLoss has it. Shapes: logits (C_local), (N, C_local)
    or (N, C_local, d1, ...), target without classes -> () or as target. Source: torch.nn.CrossEntropyLoss.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        group: Any = None,
        classes: int | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        return_lse: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.group = group
        self.classes = classes
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.return_lse = return_lse

    def forward(self, logits: Tensor, target: Tensor, *, sample_weight: Tensor | None = None) -> Any:
        return vocab_parallel_cross_entropy(
            logits,
            target,
            self.weight,
            group=self.group,
            classes=self.classes,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            sample_weight=sample_weight,
            return_lse=self.return_lse,
        )
