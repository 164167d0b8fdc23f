"""The last layer of a classifier together with its loss."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import autograd, backend
from fusedact.functional import sharded
from fusedact.functional.checks import PLAIN, STRIDED, cast, checked_reduction, on_triton, refuse_meta
from fusedact.functional.losses import check_classes, check_extensions, cross_entropy, smooths, wants_gradient

SMALL = 2**26  # bytes of logits that may as well be whole where no kernel runs


class _Head(NamedTuple):
    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    sample_weight: Tensor | None


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), its logits alive for a chunk of rows at a time.

    input (K) or (N, K), linear_weight (C, K), linear_bias (C,), target () or (N,) int64, or probabilities (C) or (N, C)
    of input's dtype -> () for 'mean' and 'sum', as input without K for 'none'. linear_weight (C, d1, ..., K) gives
    every class as many logits more; these are whole. Of `options`, torch.nn.LinearCrossEntropyOptions, what is read is
    batch_chunk_size, the rows of a chunk. weight, reduction, ignore_index (None: -100), label_smoothing, z_loss,
    softcap and sample_weight as in `cross_entropy`.

    Gradients that are wanted of a mean or a sum are made with the loss, and a backward hands them over; a second one
    through the same graph (retain_graph) makes them anew. Without a reduction, and in float16, backward makes them from
    logits taken once more. create_graph takes torch's own formula, whose logits are whole. Where none are wanted,
    Triton stores no logits of a class target. Without Triton the chunks are torch's own operations, from 64 MB of
    logits on. Where `fusedact tune --head` found torch's own chunks faster, these run, which have no second derivative.
    Checkpointed, a head would make its gradients twice and hold the first.

    Raises torch.nn.functional.linear_cross_entropy's errors, whether this torch has it or not, and cross_entropy's.
    Source: torch.nn.functional.linear_cross_entropy.
    """
    shape = logits_shape(input, linear_weight, linear_bias)
    if target.shape == shape and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    ignore_index = -100 if ignore_index is None else ignore_index
    if backend.is_sharded(input):
        check_extensions(input, z_loss, softcap, sample_weight)
        head = _Head(input, linear_weight, linear_bias, target, weight, sample_weight)
        others = label_smoothing, options, z_loss, softcap
        loss = _sharded(head, ignore_index, checked_reduction(None, None, reduction), *others)
        if loss is not NotImplemented:
            return loss
    if linear_weight.dim() == 2:
        check_extensions(input, z_loss, softcap, sample_weight)
        head = _Head(input, linear_weight, linear_bias, target, weight, sample_weight)
        low = backend.autocast_dtype(input)
        cast_head = head if low is None else _autocast(head, low)
        logits_bytes = math.prod(shape) * cast_head.input.element_size()
        fused = on_triton(*head) or (_in_eager(head) and (options is not None or logits_bytes > SMALL))
        if fused and _fits(cast_head, ignore_index, label_smoothing, low is not None):
            numbers = float(label_smoothing), float(z_loss), float(softcap or 0.0)
            chunk = getattr(options, "batch_chunk_size", None) or 0
            if options is None and _in_eager(head):
                chunk = autograd.measured_chunk(cast_head.input, linear_weight)
                extended = any(numbers) or sample_weight is not None or target.is_floating_point() or low is not None
                if chunk is None and not extended:
                    return F.linear_cross_entropy(
                        input,
                        linear_weight,
                        target,
                        linear_bias=linear_bias,
                        weight=weight,
                        reduction=reduction,
                        ignore_index=ignore_index,
                        options=torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True),
                    )
            loss = _loss(cast_head, ignore_index, checked_reduction(None, None, reduction), *numbers, chunk or 0)
            return loss if low is not None else loss.to(input.dtype)
    return cross_entropy(
        _whole_logits(input, linear_weight, linear_bias, shape),
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        sample_weight=sample_weight,
    )


def logits_shape(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> tuple[int, ...]:
    """The shape of the logits; torch's errors where the layer has none."""
    if input.dim() not in (1, 2):
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    outputs = tuple(linear_weight.shape[:-1])
    if linear_bias is not None and tuple(linear_bias.shape) != outputs:
        raise RuntimeError(f"expected linear_bias shape {outputs}, got {tuple(linear_bias.shape)}")
    if input.dim() == 1 < len(outputs):
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )
    return (*input.shape[:-1], *outputs)


def _whole_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    refuse_meta(input, linear_weight)
    if linear_weight.dim() == 2:
        return F.linear(input, linear_weight, linear_bias)
    linear_bias = linear_bias if linear_bias is None else linear_bias.flatten()
    return F.linear(input, linear_weight.flatten(end_dim=-2), linear_bias).reshape(shape)


def _sharded(
    head: _Head,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    options: Any,
    z_loss: float,
    softcap: float | None,
) -> Tensor:
    """The loss of DTensors."""
    low = backend.autocast_dtype(head.input)

    def run(x, linear_weight, linear_bias, target, weight, sample_weight, reduction) -> Tensor:
        return linear_cross_entropy(
            x, linear_weight, target,
            linear_bias=linear_bias, weight=weight, reduction=reduction,
            ignore_index=None if target.is_floating_point() else ignore_index, label_smoothing=label_smoothing,
            options=options, z_loss=z_loss, softcap=softcap, sample_weight=sample_weight,
        )  # fmt: skip

    def of_slice(*args) -> Tensor:
        *tensors, reduction, group, first, classes = args
        part = _Head(*tensors)
        chunk = getattr(options, "batch_chunk_size", None) or 0
        numbers = float(label_smoothing), float(z_loss), float(softcap or 0.0), chunk
        part = part if low is None else _autocast(part, low)
        loss = _loss(part, ignore_index, reduction, *numbers, place=(group, first, classes))
        return loss if low is not None else loss.to(head.input.dtype)

    cast_head = head if low is None else _autocast(head, low)
    fits = head.linear_weight.dim() == 2 and _fits(cast_head, ignore_index, label_smoothing, low is not None)
    return sharded.linear_cross_entropy(run, of_slice if fits else None, head, ignore_index, reduction)


def _autocast(head: _Head, low: torch.dtype) -> _Head:
    """As autocast has it: the product in the low precision, the loss in float32."""
    x, linear_weight, linear_bias, target, weight, sample_weight = head
    return _Head(
        cast(x, low),
        cast(linear_weight, low),
        linear_bias if linear_bias is None else cast(linear_bias, low),
        cast(target, torch.float32),
        weight if weight is None else cast(weight, torch.float32),
        sample_weight,
    )


def _in_eager(head: _Head) -> bool:
    """Whether torch's own operations may be recorded as one: on plain tensors, when nothing traces or transforms."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or backend.transforming() or backend.dispatching():
        return False
    device = head.input.device
    tensors = [t for t in head if t is not None]
    plain = all(type(t) in PLAIN and t.layout is STRIDED and not (t.is_nested or t.is_neg()) for t in tensors)
    return plain and device.type in ("cpu", "cuda") and all(t.device == device for t in tensors)


def _fits(head: _Head, ignore_index: int, label_smoothing: float, autocast: bool) -> bool:
    """Whether the op takes these; torch answers for all others, or refuses them."""
    x, linear_weight, linear_bias, target, weight, sample_weight = head
    dtype, (classes, features) = x.dtype, linear_weight.shape
    if dtype not in backend.KERNEL_DTYPES or linear_weight.dtype is not dtype or not classes * features:
        return False
    if linear_bias is not None and linear_bias.dtype is not dtype:
        return False
    of_loss = torch.float32 if autocast and dtype is not torch.float64 else dtype
    if weight is not None and (weight.shape != (classes,) or weight.dtype is not of_loss):
        return False
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63 or not smooths(label_smoothing):
        return False
    if wants_gradient(target, weight, sample_weight):
        return False
    if target.is_floating_point():
        return target.shape == (*x.shape[:-1], classes) and target.dtype is of_loss and ignore_index < 0
    return target.dtype == torch.int64 and target.shape == x.shape[:-1]


def _loss(
    head: _Head, ignore_index: int, reduction: str, *others: Any, place: tuple[str, int, int] | tuple[()] = ()
) -> Tensor:
    """The loss, in float32 or wider, of rows or of one; of a slice of classes whose place among all is given."""
    x, linear_weight, linear_bias, target, weight, sample_weight = head
    if not target.is_floating_point() and backend.looks_at_values(target):
        check_classes(target, ignore_index, place[2] if place else len(linear_weight))
    single = x.dim() == 1
    if single:
        x, target = x[None], target[None]
        sample_weight = sample_weight if sample_weight is None else sample_weight[None]
    tensors = x, linear_weight, linear_bias, target, weight, sample_weight
    op = autograd.vocab_parallel_linear_cross_entropy if place else autograd.linear_cross_entropy
    loss = op(*tensors, ignore_index, reduction, *others, *place)
    return loss[0] if single and reduction == "none" else loss
