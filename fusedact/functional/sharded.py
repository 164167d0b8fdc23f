"""What the ops do with DTensors: run on the local tensors, so that every door, kernel and gradient stays as it is.

A rule names the dimensions of an op's tensors as an einsum does. Along a mesh dimension the first tensor that is split
by a name decides: whatever has that name is split by it, whatever has not is whole there and its gradient a sum over
the ranks. A dimension named None is never split. A tensor that is placed otherwise is redistributed first.

Each function gives NotImplemented where no rule covers the tensors: some are plain, on another mesh, or split in
strides. torch's own operations on the DTensors then answer, or refuse.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedact import autograd, backend
from fusedact.backend import is_sharded
from fusedact.functional.checks import class_dim
from fusedact.functional.layouts import CLASSES, Layout, Names, layout_of, sizes_of


def _along(
    run: Callable[..., Tensor], tensors: Sequence[Tensor | None], names: Sequence[Names], result: Names
) -> Tensor:
    """run(*tensors), whose result has those names, on the local tensors."""
    layout = layout_of(tensors, names)
    if layout is None:
        return NotImplemented
    y = run(*map(layout.local, tensors, names))
    return layout.whole(y, result, sizes_of(tensors, names))


def _of(t: Tensor | None, names: Names) -> Names:
    """The names of a tensor that broadcasts to those: a dimension of one element is never split."""
    if t is None:
        return ()
    ends = (None,) * (t.dim() - len(names)) + names[max(len(names) - t.dim(), 0) :]
    return tuple(None if size == 1 else name for name, size in zip(ends, t.shape, strict=True))


def linear(
    run: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None, slope: Tensor | None
) -> Tensor:
    """run(input, weight, bias, slope) of rows that are split, or of outputs."""
    rows = tuple(range(input.dim() - 1))
    of_result = *rows, "outputs"
    of_slope = _channels(slope, of_result[1] if rows else None)  # torch's channel is dim 1
    names = (*rows, None), ("outputs", None), _of(bias, of_result), of_slope
    return _along(run, (input, weight, bias, slope), names, of_result)


def is_row_parallel(input: Tensor, weight: Tensor) -> bool:
    """Whether both are split by the features, of which torch makes a sum over the ranks."""
    if not is_sharded(weight) or input.dim() < 2 or weight.dim() != 2:
        return False
    pairs = zip(input.placements, weight.placements, strict=False)  # type: ignore[attr-defined]
    return any(x.is_shard(input.dim() - 1) and w.is_shard(1) for x, w in pairs)


def with_whole_gradients(*tensors: Tensor | None) -> list:
    """The tensors, whose gradients come as they are placed, not as sums over the ranks."""
    return [t.redistribute(t.device_mesh, t.placements) if is_sharded(t) else t for t in tensors]  # type: ignore


def _channels(slope: Tensor | None, name: Hashable) -> Names:
    if slope is None:
        return ()
    return (name,) if slope.dim() == 1 and slope.numel() > 1 else (None,) * slope.dim()


def activation(run: Callable[..., Tensor], input: Tensor, slope: Tensor | None) -> Tensor:
    """run(input, slope), element by element, the slope that of dimension 1."""
    names = tuple(range(input.dim()))
    return _along(run, (input, slope), (names, _channels(slope, 1)), names)


def gated(run: Callable[..., Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """run(gate, up), element by element."""
    names = tuple(range(gate.dim()))
    return _along(run, (gate, up), (names, names), names) if gate.shape == up.shape else NotImplemented


def softmax(run: Callable[..., Tensor], input: Tensor, dim: int) -> Tensor:
    """run(input), whose dimension `dim` is never split."""
    names = tuple(None if at == dim % max(input.dim(), 1) else at for at in range(input.dim()))
    return _along(run, (input,), (names,), names)


def convolution(
    run: Callable[..., Tensor],
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    dims: int,
    transposed: bool,
    groups: int,
) -> Tensor:
    """run(input, weight, bias, slope) of a batch that is split, or of outputs where there is one group.

    torch has no convolution to no output: these are split where every rank has some.
    """
    input, weight, bias, slope = tensors
    if input.dim() != dims + 2 or weight.dim() != dims + 2:
        return NotImplemented
    ranks, channels = input.device_mesh.size(), weight.shape[int(transposed)]  # type: ignore[attr-defined]
    outputs = "outputs" if groups == 1 and (ranks - 1) * -(-channels // ranks) < channels else None
    inside = (None,) * dims
    of_weight = (None, outputs) if transposed else (outputs, None)
    names = ("batch", None, *inside), (*of_weight, *inside), _channels(bias, outputs), _channels(slope, outputs)
    return _along(run, tensors, names, ("batch", outputs, *inside))


def binary_loss(
    run: Callable[..., Tensor], tensors: tuple[Tensor | None, ...], reduction: str, *, of_rows: bool = False
) -> Tensor:
    """run(input, target, *weights, reduction), the loss of elements, or of rows along the last dimension."""
    input, target, *weights = tensors
    if input is None or target is None or target.shape != input.shape or (of_rows and not input.dim()):
        return NotImplemented
    names: Names = tuple(range(input.dim()))
    result = names
    if of_rows:
        result, names = names[:-1], (*names[:-1], None)
    of_all = names, names, *(_of(weight, names) for weight in weights)
    return _mean_of_elements(run, tensors, of_all, result, reduction, 0)


def linear_binary_loss(
    run: Callable[..., Tensor], tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Any, Any], reduction: str
) -> Tensor:
    """run(input, linear_weight, linear_bias, target, weight, pos_weight, reduction) of rows that are split."""
    input, linear_weight, _, target, weight, pos_weight = tensors
    if not input.dim() or linear_weight.dim() != 2 or target.shape != (*input.shape[:-1], 1):
        return NotImplemented
    rows = tuple(range(input.dim() - 1))
    result = *rows, None
    names = (*rows, None), (None, None), (None,), result, _of(weight, result), _of(pos_weight, result)
    return _mean_of_elements(run, tensors, names, result, reduction, 3)


def _mean_of_elements(
    run: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    names: Sequence[Names],
    result: Names,
    reduction: str,
    counted: int,
) -> Tensor:
    """A mean is that of each rank, times what it has of all the elements of tensors[counted]."""
    layout = layout_of(tensors, names)
    if layout is None:
        return NotImplemented
    locals_ = list(map(layout.local, tensors, names))
    if reduction == "none" or not layout.splits_rows:
        return layout.whole(run(*locals_, reduction), result if reduction == "none" else (), sizes_of(tensors, names))
    own, of_all = (t[counted].numel() for t in (locals_, tensors))  # type: ignore[union-attr]
    y = run(*locals_, reduction if own else "sum")
    share = y.to(backend.wide(y.dtype))
    if reduction == "mean":
        share = share * (own / of_all if of_all else math.nan)
    return layout.whole(share, (), {}).to(y.dtype)


def cross_entropy(
    run: Callable[..., Any],
    of_slice: Callable[..., Any] | None,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    ignore_index: int,
    reduction: str,
) -> Any:
    """run(input, target, weight, sample_weight, reduction), with what it gives beside the loss, a number for each row.

    of_slice takes the same of a slice of the classes, and then the name of the process group, the first class of this
    rank and the number of all; None where nothing does.
    """
    input, target, weight, sample_weight = tensors
    dim = class_dim(input)
    rows: Names = tuple(at for at in range(input.dim()) if at != dim)
    probabilities = target.is_floating_point()
    shape = input.shape if probabilities else [input.shape[at] for at in rows if isinstance(at, int)]
    if list(target.shape) != list(shape) or 0 in input.shape[dim : dim + 1]:
        return NotImplemented
    rows, classes = _splittable(rows, of_slice, target, weight, sample_weight)
    whole = *rows[:dim], None, *rows[dim:]
    of_input = *rows[:dim], classes, *rows[dim:]
    names = of_input, whole if probabilities else rows, (None,), rows
    return _loss_of_rows(run, of_slice, tensors, names, rows, input.shape[dim], ignore_index, reduction)


def linear_cross_entropy(
    run: Callable[..., Any],
    of_slice: Callable[..., Any] | None,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None],
    ignore_index: int,
    reduction: str,
) -> Any:
    """run(input, linear_weight, linear_bias, target, weight, sample_weight, reduction), otherwise as cross_entropy."""
    input, linear_weight, _, target, *weights = tensors
    probabilities = target.is_floating_point()
    lead = input.shape[:-1]
    if linear_weight.dim() != 2 or target.shape != ((*lead, len(linear_weight)) if probabilities else lead):
        return NotImplemented
    rows, classes = _splittable(tuple(range(len(lead))), of_slice, target, *weights)
    of_target = (*rows, None) if probabilities else rows
    names = (*rows, None), (classes, None), (classes,), of_target, (None,), rows
    return _loss_of_rows(run, of_slice, tensors, names, rows, len(linear_weight), ignore_index, reduction)


def _splittable(rows: Names, of_slice: Any, target: Tensor, *weights: Tensor | None) -> tuple[Names, Hashable]:
    """The names of rows and classes. No rank alone has the gradient of weights, which a mean divides by."""
    if torch.is_grad_enabled() and any(weight is not None and weight.requires_grad for weight in weights):
        return (None,) * len(rows), None
    return rows, None if of_slice is None or target.is_floating_point() else CLASSES


def _loss_of_rows(
    run: Callable[..., Any],
    of_slice: Callable[..., Any] | None,
    tensors: Sequence[Tensor | None],
    names: Sequence[Names],
    rows: Names,
    classes: int,
    ignore_index: int,
    reduction: str,
) -> Any:
    """The last three tensors are target, weight and sample_weight. A mean weighs rows by what all of them weigh."""
    layout = layout_of(tensors, names)
    if layout is None:
        return NotImplemented
    if of_slice is not None and CLASSES in layout.split:
        run = partial(_of_slice, of_slice, *layout.slice_of(classes))
    locals_: list[Any] = list(map(layout.local, tensors, names))
    *inputs, target, weight, sample_weight = locals_
    sizes = sizes_of(tensors, names)
    summed, total = reduction != "none" and layout.splits_rows, None
    if summed and reduction == "mean":
        wide, reduction = backend.wide(inputs[0].dtype), "sum"
        total, sample_weight = _weighed(layout, names[-3], target, weight, sample_weight, ignore_index, wide)
    results = run(*inputs, target, weight, sample_weight, reduction)
    loss, *others = results if isinstance(results, tuple) else (results,)
    dtype = loss.dtype
    if summed:
        loss = loss.to(backend.wide(dtype))
        loss = loss if total is None else loss + 0.0 / total  # NaN of nothing
    loss = layout.whole(loss, rows if reduction == "none" else (), sizes).to(dtype)
    return (loss, *(layout.whole(other, rows, sizes) for other in others)) if others else loss


def _of_slice(run: Callable[..., Any], group: str, first: int, classes: int, *args: Any) -> Any:
    return run(*args, group, first, classes)


def _weighed(
    layout: Layout,
    of_target: Names,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What a mean over all ranks divides by, and the share of it that each row of this one has."""
    one = target.select(of_target.index(None), 0) if target.is_floating_point() else target.long()
    flat = sample_weight if sample_weight is None else sample_weight.reshape(-1)
    total = autograd.total_weight(one.reshape(-1), weight, flat, ignore_index, dtype).detach()
    total = layout.whole(total.view(()), (), {}).to_local()  # type: ignore[attr-defined]
    total = total.masked_fill(total == 0, math.nan)
    if sample_weight is None:
        return total, (1 / total).expand(one.shape)
    return total, sample_weight / total
