"""Cross-entropy of logits whose classes are spread over processes: the parts of each, and the op made of them.

Each process reads its slice of the logits once. What leaves it are a row's numbers over that slice: the maximum, the
sum of exponentials, the target's logit or 0 and, with smoothing, Σ k (x - m) and Σ k. One all-gather gives every
process the numbers of all, which each combines in the order of ranks: the loss has the same bits everywhere, and the
gradient of a slice needs no other.

Where a kernel cannot be compiled, torch's formula takes the place of that part alone, so that this process still comes
to the collectives that the others wait in.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedact import backend
from fusedact.autograd.cross_entropy import streams
from fusedact.autograd.doors import Op
from fusedact.autograd.given_up import guarded, kind_of


def statistics(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    first: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> Tensor:
    """Of each row over this slice, the classes from `first` on: m, Σ exp(x - m) and the target's logit, (3, rows).

    logits (C_local), (N, C_local) or (N, C_local, d1, ...), target as it without classes, int64, of all classes;
    weight of all classes. The logit is 0 where the slice does not have the target or the row is ignored. With smoothing
    (5, rows): m, Σ exp(x - m), Σ k (x - m), Σ k and the target's logit, k being the class's weight or 1. In float32,
    float64 of float64.
    """
    run = _statistics if backend.uses_triton(logits) else _statistics_by_torch
    return run(logits, target, weight, first, ignore_index, label_smoothing, softcap)


def _statistics_by_kernel(logits, target, weight, first, ignore_index, label_smoothing, softcap):
    from fusedact.kernels import class_shards, cross_entropy

    config = cross_entropy.tile(
        logits.shape[min(1, logits.dim() - 1)],
        cross_entropy.rows_after(logits),
        logits.element_size(),
        streams(target, weight, label_smoothing, softcap),
        backend.chip(logits.device).warp_size,
    )
    return class_shards.statistics(logits, target, weight, first, ignore_index, bool(label_smoothing), softcap, config)


def _statistics_by_torch(logits, target, weight, first, ignore_index, label_smoothing, softcap):
    x, target = _by_rows(logits, softcap), target.reshape(-1)
    classes = x.shape[1]
    if classes == 0:
        nothing = x.new_zeros((5 if label_smoothing else 3, len(x)))
        nothing[0].fill_(-torch.inf)
        return nothing
    m = x.amax(1)
    own = (target != ignore_index) & (target >= first) & (target < first + classes)
    x_target = x.gather(1, torch.where(own, target - first, 0)[:, None])[:, 0]
    base = _finite_or_0(m)[:, None]
    above = x.sub_(base) if softcap or x.dtype != logits.dtype else x - base
    numbers = [torch.where(own, x_target, 0)]
    if label_smoothing:
        k = x.new_ones(classes) if weight is None else weight[first : first + classes].to(x.dtype)
        kx = torch.mv(above, k, out=x.new_empty(len(x)))  # not above @ k, which autocast has in low precision
        numbers = [kx, k.sum().expand(len(x)), *numbers]
    return torch.stack([m, above.exp_().sum(1), *numbers])


def combined(
    gathered: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    classes: int,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    want_lse: bool,
    save: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Of the slices' numbers (p, 3 or 5, rows): loss, lse, stats and total, as kernels.cross_entropy.forward has them.

    loss () or as target, in that dtype, else as the numbers; lse as target or None; stats (2, rows), with weight
    (3, rows), or None; total (1,), what a mean divides by, or None where nothing is reduced.
    """
    dtype = dtype or gathered.dtype
    if target.numel() == 0:
        return _of_no_rows(gathered, target, weight, reduction, want_lse, save, dtype)
    numbers = ignore_index, reduction, label_smoothing, z_loss, want_lse, save, dtype
    run = _combined if backend.uses_triton(gathered) else _combined_by_torch
    return run(gathered, target, weight, sample_weight, classes, *numbers)


def _of_no_rows(gathered, target, weight, reduction, want_lse, save, dtype):
    reduced = reduction != "none"
    return (
        gathered.new_full(() if reduced else target.shape, torch.nan if reduction == "mean" else 0.0, dtype=dtype),
        gathered.new_empty(target.shape) if want_lse else None,
        gathered.new_empty((2 if weight is None else 3, 0)) if save else None,
        gathered.new_zeros(1) if reduced else None,
    )


def _combined_by_kernel(*args):
    from fusedact.kernels import class_shards

    return class_shards.combined(*args)


def _combined_by_torch(
    gathered, target, weight, sample_weight, classes, ignore_index, reduction, smoothing, z_loss, want_lse, save, dtype
):
    shape, target = target.shape, target.reshape(-1)
    slice_m, x_target = gathered[:, 0], gathered[:, -1].sum(0)
    m = slice_m.amax(0)
    base = _finite_or_0(m)
    s = (gathered[:, 1] * (slice_m - base).exp()).sum(0)
    log_s, counts = s.log(), target != ignore_index
    in_range = (target >= 0) & (target < classes)
    w = torch.ones_like(s)
    if weight is not None:
        w = torch.where(in_range, weight.to(s.dtype)[torch.where(in_range, target, 0)], 0)
    loss, k_sum = (log_s - (x_target - m)) * w, w
    if smoothing:
        share, slice_k = smoothing / max(classes, 1), gathered[:, 3]
        k = slice_k.sum(0)
        kx = (gathered[:, 2] + (_finite_or_0(slice_m) - base) * slice_k).sum(0)
        loss = loss * (1 - smoothing) + (log_s * k - kx) * share
        k_sum = k * share + w * (1 - smoothing)
    loss = torch.where(in_range, loss, torch.nan)
    lse = log_s + base
    if z_loss:
        loss = loss + z_loss * lse.square()
    if sample_weight is not None:
        factor = sample_weight.reshape(-1).to(s.dtype)
        loss, w = loss * factor, w * factor
    loss, w = torch.where(counts, loss, 0), torch.where(counts, w, 0)
    stats = torch.stack([base, s] if weight is None else [base, s, k_sum]) if save else None
    total = None if reduction == "none" else w.sum(0, keepdim=True)
    loss = loss.view(shape) if reduction == "none" else loss.sum()
    if reduction == "mean":
        total = total.masked_fill(total == 0, torch.nan)
        loss = loss / total.view(())
    return loss.to(dtype), lse.view(shape) if want_lse else None, stats, total


def gradient(
    dloss: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    stats: Tensor,
    total: Tensor | None,
    first: int,
    classes: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    into: Tensor | None = None,
) -> Tensor:
    """Of this slice's logits, as they are. dloss () or as target, dlse as target, either None; total for a mean.

    into: a tensor as logits that takes it, the logits themselves if they have rows of neighbours.
    """
    numbers = first, classes, ignore_index, label_smoothing, z_loss, softcap, into
    run = _gradient if backend.uses_triton(logits) else _gradient_by_torch
    return run(dloss, dlse, logits, target, weight, sample_weight, stats, total, *numbers)


def _gradient_by_kernel(
    dloss, dlse, logits, target, weight, sample_weight, stats, total,
    first, classes, ignore_index, label_smoothing, z_loss, softcap, into,
):  # fmt: skip
    from fusedact.kernels import cross_entropy

    return cross_entropy.backward(
        dloss, dlse, logits, target, weight, sample_weight, stats, total,
        ignore_index, label_smoothing, z_loss, softcap, True, False, first, classes, into,
    )[0]  # fmt: skip


def _gradient_by_torch(
    dloss, dlse, logits, target, weight, sample_weight, stats, total,
    first, classes, ignore_index, smoothing, z_loss, softcap, into,
):  # fmt: skip
    """p (Σ k + 2 z lse) - k of each row, times its dloss, and p times its dlse."""
    x, target = _by_rows(logits, softcap), target.reshape(-1)
    base, s = stats[0], stats[1]
    over = not softcap and (into is logits or x.dtype != logits.dtype)  # x is then not read again
    p = x.sub_(base[:, None]) if over else x - base[:, None]
    p.exp_()
    counts = target != ignore_index
    row = _row_gradients(dloss, target, sample_weight, total, classes, p)
    own = (target >= first) & (target < first + x.shape[1])
    k_target = torch.ones_like(s) if weight is None else weight.to(s.dtype)[target.clamp(0, classes - 1)]
    k_sum = 1 if weight is None else stats[2]
    lse_factor = 2 * z_loss * (s.log() + base) if z_loss else 0
    factor = (row * (k_sum + lse_factor) / s)[:, None]
    dx = p.mul_(factor) if dlse is None else p * factor
    if smoothing:
        k = x.new_ones(x.shape[1]) if weight is None else weight[first : first + x.shape[1]].to(x.dtype)
        dx.addr_(row, k, alpha=-smoothing / max(classes, 1))
    if x.shape[1]:
        hit = torch.where(own, row * k_target * (smoothing - 1), 0)
        dx.scatter_add_(1, torch.where(own, target - first, 0)[:, None], hit[:, None])
    if dx.is_cuda or not counts.all():
        dx.masked_fill_(~counts[:, None], 0)
    if dlse is not None:
        dx += p.mul_((dlse.reshape(-1).to(p.dtype) / s)[:, None])
    if softcap:  # 0 of an ignored row, whatever its logits
        dx.mul_(x.div_(softcap).square_().neg_().add_(1).masked_fill_(dx == 0, 1))
    return _as_logits(dx, logits, into)


def _row_gradients(dloss, target, sample_weight, total, classes, like):
    """What each row's loss is multiplied by; NaN of a class out of range."""
    row = like.new_zeros(len(target)) if dloss is None else dloss.to(like.dtype).reshape(-1).expand(len(target))
    row = row if total is None else row / total
    row = row if sample_weight is None else row * sample_weight.reshape(-1).to(like.dtype)
    return torch.where((target >= 0) & (target < classes), row, torch.nan)


def _by_rows(logits: Tensor, softcap: float) -> Tensor:
    """(rows, C_local) in float32, float64 of float64, capped."""
    x = logits.movedim(min(1, logits.dim() - 1), -1)
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(backend.wide(logits.dtype))
    return (x / softcap).tanh_().mul_(softcap) if softcap else x


def _as_logits(dx: Tensor, logits: Tensor, into: Tensor | None) -> Tensor:
    """(rows, C_local) as the logits are laid out."""
    dim = min(1, logits.dim() - 1)
    dx = dx.view(*logits.shape[:dim], *logits.shape[dim + 1 :], logits.shape[dim]).movedim(-1, dim)
    if into is None and dx.dtype == logits.dtype and dx.is_contiguous():
        return dx
    return (logits.new_empty(logits.shape) if into is None else into).copy_(dx)


def _finite_or_0(m: Tensor) -> Tensor:
    """0 in place of -inf, so that a row of nothing but -inf sums to 0 rather than to NaN on the way."""
    return m.masked_fill(m == -torch.inf, 0)


def _guarded(name: str, run: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    return guarded(run, instead, lambda *args: kind_of(name, args))


_statistics = _guarded("class_shards.statistics", _statistics_by_kernel, _statistics_by_torch)
_combined = _guarded("class_shards.combined", _combined_by_kernel, _combined_by_torch)
_gradient = _guarded("class_shards.gradient", _gradient_by_kernel, _gradient_by_torch)


class Exchange:
    """Numbers under way to all processes; wait() gives those of all, (p, n, rows), in the order of ranks."""

    def __init__(self, work: Any, numbers: Tensor, gathered: Tensor) -> None:
        self._work, self._gathered = work, gathered
        self._numbers = numbers  # held until it is sent

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._gathered


def exchange(numbers: Tensor, group_name: str, async_op: bool = False) -> Any:
    """numbers (n, rows) of all processes of the group, (p, n, rows), by one all-gather; async_op: an Exchange.

    Neither a group of one, nor the name "" of none, nor no rows start a collective.
    """
    group = backend.process_group(group_name) if group_name else None
    processes = 1 if group is None else group.size()
    work, gathered = None, numbers[None]
    if processes > 1:
        gathered = numbers.new_empty((processes, *numbers.shape))
        if numbers.numel():
            work = _all_gather(gathered.view(-1), numbers.view(-1), group=group, async_op=True)
    started = Exchange(work, numbers, gathered)
    return started if async_op else started.wait()


def _all_gather(into: Tensor, numbers: Tensor, **options: Any) -> Any:
    """Newer torch has this under another name, and warns of the older one."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(into, numbers, **options)


def _launch(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    return_lse: bool,
    group: str,
    first: int,
    classes: int,
    save: bool,
) -> tuple[Tensor | None, ...]:
    gathered = exchange(statistics(logits, target, weight, first, ignore_index, label_smoothing, softcap), group)
    rows = target, weight, sample_weight, classes, ignore_index, reduction, label_smoothing, z_loss
    return combined(gathered, *rows, return_lse, save, logits.dtype)


def _fake(logits, target, weight, sample_weight, ignore_index, reduction, smoothing, z_loss, softcap, *others):
    return_lse, _, _, _, save = others
    wide, reduced = backend.wide(logits.dtype), reduction != "none"
    return (
        logits.new_empty(() if reduced else target.shape),
        logits.new_empty(target.shape, dtype=wide) if return_lse else None,
        logits.new_empty((2 if weight is None else 3, target.numel()), dtype=wide) if save else None,
        logits.new_empty(1, dtype=wide) if reduced else None,
    )


def _backward(
    dloss: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    stats: Tensor,
    total: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    return_lse: bool,
    group: str,
    first: int,
    classes: int,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    total_or_none = total if reduction == "mean" else None
    rows = dloss, dlse, logits, target, weight, sample_weight, stats.contiguous(), total_or_none
    numbers = first, classes, ignore_index, label_smoothing, z_loss, softcap
    return gradient(*rows, *numbers) if wanted[0] else None, None, None, None


def _backward_fake(dloss, dlse, logits, *others):
    return logits.new_empty(logits.shape) if others[-1][0] else None, None, None, None


def refuse(*args: Any) -> Any:
    raise RuntimeError(
        "a loss whose classes are spread over processes has a first derivative alone: no create_graph, no transform of"
        " torch.func or forward-mode AD, and no gradients in a batch"
    )


_TENSORS = "Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight"
_OPTIONS = (
    "int ignore_index, str reduction, float label_smoothing, float z_loss, float softcap, bool return_lse, str group,"
    " int first, int classes"
)

vocab_parallel_cross_entropy = Op(
    name="vocab_parallel_cross_entropy",
    tensors=4,
    schema=f"({_TENSORS}, {_OPTIONS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    launch=_launch,
    fake=_fake,
    extras=lambda output, options: output[2:],
    backward_schema=f"(Tensor? dloss, Tensor? dlse, {_TENSORS}, Tensor stats, Tensor total, {_OPTIONS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    backward=_backward,
    backward_fake=_backward_fake,
    composite=refuse,
    results=lambda options: 2 if options[5] else 1,
    most_results=2,
).register()
