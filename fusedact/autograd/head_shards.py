"""A head whose classes are spread over the ranks of a group. Saves its inputs and, of late gradients, the statistics.

Each rank multiplies every row by its slice of W, a chunk of rows at a time. The statistics of a chunk are on their way
through the ranks while the next one is multiplied, so two chunks of logits are alive. What dx of a chunk has from each
slice is added up over the ranks, in float32 or wider, while dW and the products of the next chunk are taken. dW and db
stay where their slice is. In bytes a rank sends, of M rows and p ranks: 12 M (20 M with smoothing) to each other rank
and, where dx is wanted, what an all-reduce of M K float32 numbers sends.
"""

from typing import Any, NamedTuple

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fusedact import backend
from fusedact.autograd import class_shards, linear
from fusedact.autograd.early import EarlyOp
from fusedact.autograd.given_up import guarded, kind_of
from fusedact.autograd.linear_cross_entropy import chunk_rows, dloss_of_rows, late_only, mean_divisor, multiply

# Each product by itself falls back to torch's: a whole chunk taken again would exchange its statistics again, to which
# the other ranks have no counterpart.
_logits = guarded(linear.bare, F.linear, lambda *args: kind_of("vocab_parallel logits", args))
_multiplied = guarded(
    lambda task, a, b, into, first: multiply(task, a, b, into, True, first),
    lambda task, a, b, into, first: multiply(task, a, b, into, False, first),
    lambda *args: kind_of("vocab_parallel product", args),
)


def _ranks(group: str) -> int:
    return backend.process_group(group).size() if group else 1


class _Head(NamedTuple):
    """A call's arguments but for its reduction."""

    x: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    sample_weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    chunk: int
    group: str
    first: int
    classes: int

    def parts(self) -> list[slice]:
        """The rows of each chunk: alike on all ranks, whose slices differ by size."""
        largest = max(-(-self.classes // _ranks(self.group)), 1)
        rows = chunk_rows(self.x, largest, self.chunk, alive=2)
        return [slice(first, first + rows) for first in range(0, len(self.x), rows)]

    def on_triton(self) -> bool:
        return backend.uses_triton(self.x) and self.linear_weight.numel() > 0

    def logits(self, part: slice) -> Tensor:
        multiply_and_add = _logits if self.on_triton() else F.linear
        return multiply_and_add(self.x[part], self.linear_weight, self.linear_bias)

    def rows(self, part: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.target[part], self.weight, None if self.sample_weight is None else self.sample_weight[part]

    def start(self, part: slice) -> tuple[slice, Tensor, Any]:
        """The logits of a chunk, and the exchange of their statistics, which is under way."""
        z = self.logits(part)
        numbers = class_shards.statistics(
            z, self.target[part], self.weight, self.first, self.ignore_index, self.label_smoothing, self.softcap
        )
        return part, z, class_shards.exchange(numbers, self.group, async_op=True)

    def losses(self, part: slice, gathered: Tensor, save: bool) -> tuple[Tensor, Tensor | None]:
        """Of a chunk: each row's loss times its sample weight, and the statistics of whole rows."""
        rows, numbers = self.rows(part), (self.label_smoothing, self.z_loss)
        loss, _, stats, _ = class_shards.combined(
            gathered, *rows, self.classes, self.ignore_index, "none", *numbers, False, save
        )
        return loss, stats

    def gradient(self, part: slice, z: Tensor, dloss: Tensor, stats: Tensor, total: Tensor | None) -> Tensor:
        """The gradient of a chunk's logits, in their place."""
        options = self.ignore_index, self.label_smoothing, self.z_loss, self.softcap
        tensors = dloss, None, z, *self.rows(part), stats, total
        return class_shards.gradient(*tensors, self.first, self.classes, *options, into=z)


class _Gradients:
    """What is wanted of dx, dW and db, to which the gradients of chunks of logits are added.

    Of dx each rank has a part, all of which are added up while the next products are taken.
    """

    def __init__(self, head: _Head, several: bool, wanted: list[bool]) -> None:
        x, linear_weight, (want_x, want_weight, want_bias) = head.x, head.linear_weight, wanted
        self.head, self.dtype, self.first = head, backend.wide(x.dtype), True
        self.alone = _ranks(head.group) == 1
        self.dx = x.new_empty(x.shape) if want_x else None
        dtype = self.dtype if several else x.dtype
        self.dw = linear_weight.new_empty(linear_weight.shape, dtype=dtype) if want_weight else None
        self.db = linear_weight.new_zeros(len(linear_weight), dtype=self.dtype) if want_bias else None
        self.under_way: tuple[Any, slice, Tensor] | None = None

    def add(self, part: slice, dz: Tensor) -> None:
        x, linear_weight = self.head.x[part], self.head.linear_weight
        on_triton = self.head.on_triton()
        if self.dx is not None:
            own = self.dx[part] if self.alone or self.dx.dtype == self.dtype else x.new_empty(x.shape, dtype=self.dtype)
            _multiply("dx", dz, linear_weight, own, on_triton, True)
            if not self.alone:
                work = dist.all_reduce(own, group=backend.process_group(self.head.group), async_op=True)
                self._arrive()
                self.under_way = work, part, own
        if self.dw is not None:
            _multiply("dw", dz.t(), x, self.dw, on_triton, self.first)
        if self.db is not None:
            self.db += dz.sum(0, dtype=self.dtype)
        self.first = False

    def _arrive(self) -> None:
        """Waits for the sum over the ranks that is under way."""
        if self.under_way is not None and self.dx is not None:
            work, part, dx = self.under_way
            work.wait()
            if dx.dtype != self.dx.dtype:
                self.dx[part] = dx
        self.under_way = None

    def whole(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        self._arrive()
        dtype, dw = self.head.x.dtype, self.dw
        if dw is not None:
            dw = dw.zero_().to(dtype) if self.first else dw.to(dtype)
        return self.dx, dw, None if self.db is None else self.db.to(dtype)


def _launch(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    chunk: int,
    group: str,
    first: int,
    classes: int,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    numbers = ignore_index, label_smoothing, z_loss, softcap
    tensors = x, linear_weight, linear_bias, target, weight, sample_weight
    head = _Head(*tensors, *numbers, chunk, group, first, classes)
    parts, dtype, late, save = head.parts(), backend.wide(x.dtype), late_only((x,), (None, reduction)), any(wanted)
    total = mean_divisor(target, weight, sample_weight, ignore_index, dtype) if reduction == "mean" else None
    losses, one = x.new_empty(len(x), dtype=dtype), x.new_ones((), dtype=dtype)
    kept = x.new_empty((2 if weight is None else 3, len(x)), dtype=dtype) if save and late else None
    gradients = _Gradients(head, len(parts) > 1, [want and not late for want in wanted])
    ahead = None
    for following in (*parts, None):
        behind, ahead = ahead, None if following is None else head.start(following)
        if behind is None:
            continue
        part, z, exchange = behind
        losses[part], stats = head.losses(part, exchange.wait(), save)
        if kept is not None:
            kept[:, part] = stats
        elif save:
            gradients.add(part, head.gradient(part, z, one, stats, total))
        del behind, z  # so that the next chunk's take its memory
    loss = losses if reduction == "none" else losses.sum()
    return loss if total is None else loss / total.view(()), *gradients.whole(), kept


def _late(dloss, kept, x, linear_weight, linear_bias, target, weight, sample_weight, ignore_index, *others):
    """The gradients for that dloss, from logits taken once more; what the ranks exchanged was kept."""
    reduction, *numbers, wanted = others
    dlosses = dloss_of_rows(dloss, x, target, weight, sample_weight, ignore_index, reduction)
    head = _Head(x, linear_weight, linear_bias, target, weight, None, ignore_index, *numbers)
    parts = head.parts()
    gradients = _Gradients(head, len(parts) > 1, wanted)
    for part in parts:
        gradients.add(part, head.gradient(part, head.logits(part), dlosses[part], kept[:, part].contiguous(), None))
    return gradients.whole()


def _multiply(task: str, a: Tensor, b: Tensor, into: Tensor, on_triton: bool, first: bool) -> None:
    if on_triton:
        _multiplied(task, a, b, into, first)
    else:
        multiply(task, a, b, into, False, first)


def _fake(x, linear_weight, linear_bias, target, weight, *others):
    reduction, wanted = others[2], others[-1]
    dtype, late = backend.wide(x.dtype), late_only((x,), (None, reduction))
    likes = zip((x, linear_weight, linear_bias), wanted, strict=True)
    keeps = late and any(wanted)
    return (
        x.new_empty(len(x) if reduction == "none" else (), dtype=dtype),
        *(t.new_empty(t.shape) if want and not late else None for t, want in likes),
        x.new_empty((2 if weight is None else 3, len(x)), dtype=dtype) if keeps else None,
    )


vocab_parallel_linear_cross_entropy = EarlyOp(
    name="vocab_parallel_linear_cross_entropy",
    tensors=6,
    learned=3,
    schema="Tensor x, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor? sample_weight,"
    " int ignore_index, str reduction, float label_smoothing, float z_loss, float softcap, int chunk, str group,"
    " int first, int classes",
    launch=_launch,
    fake=_fake,
    late=_late,
    composite=class_shards.refuse,
    late_only=late_only,
    kept=1,
).register()
