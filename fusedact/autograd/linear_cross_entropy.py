"""A head, x Wᵀ + b and cross-entropy, whose logits are there for a chunk of rows at a time. Saves its inputs alone.

With gradients a chunk takes three products: its logits; and, of the logits' gradient that takes their place, dx and a
part of dW, which is added up in float32 or wider, as db is. A loss alone takes one, where Triton runs without logits.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import backend, tuning
from fusedact.autograd import linear
from fusedact.autograd.cross_entropy import cross_entropy_formula, streams
from fusedact.autograd.early import EarlyOp
from fusedact.autograd.given_up import guarded, kind_of

CHUNK_BYTES = {"cuda": 2**28, "cpu": 2**26}  # of a chunk's logits
LEAST_ROWS = {"cuda": 2048, "cpu": 1}  # whatever their bytes: fewer would leave the products waiting for W
WHOLE_ROWS = 128  # of which a chunk is a multiple


def chunk_rows(x: Tensor, classes: int, asked: int, alive: int = 1) -> int:
    """Rows of a chunk: as many as are asked for, else by rule."""
    if asked or not len(x):
        return asked or 1
    return rows_by_rule(len(x), classes, x.element_size(), "cuda" if x.is_cuda else "cpu", alive)


def rows_by_rule(rows: int, classes: int, itemsize: int, kind: str, alive: int = 1) -> int:
    """Of a chunk, where chunks are equal and `alive` of them within the device's bytes."""
    most = max(LEAST_ROWS[kind], CHUNK_BYTES[kind] // (alive * classes * itemsize))
    equal = -(-rows // -(-rows // most))
    return min(most, -(-equal // WHOLE_ROWS) * WHOLE_ROWS)


def measured_chunk(x: Tensor, linear_weight: Tensor) -> int | None:
    """The rows of a chunk that were fastest on this GPU; 0 by rule, None where torch's own chunks were."""
    if backend.get_backend() != "auto":
        return 0
    (classes, features), dtype = linear_weight.shape, x.dtype
    precision, chip = backend.dot_precision(dtype), backend.chip(x.device)
    return tuning.choose(tuning.HEAD, x.shape[:-1].numel(), classes, features, dtype, precision, False, chip)


def _launch(
    kernels: bool,
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
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    tensors = x, linear_weight, linear_bias, target, weight, sample_weight
    numbers = label_smoothing, z_loss, softcap
    if late_only(tensors, (ignore_index, reduction)):
        wanted = [False] * 3
    if not any(wanted) and kernels and backend.uses_triton(x) and not target.is_floating_point():
        return _without_logits(*tensors, ignore_index, reduction, *numbers), None, None, None
    total: Tensor | None = None
    if reduction == "mean":
        total = mean_divisor(target, weight, sample_weight, ignore_index, backend.wide(x.dtype))
    losses, *gradients = _by_chunks(kernels, *tensors, total, ignore_index, *numbers, chunk, wanted)
    loss = losses if reduction == "none" else losses.sum()
    return loss if total is None else loss / total.view(()), *gradients


def late_only(tensors, options):
    """Whether gradients wait for dloss: it has a number for each row; or it alone keeps sums of float16 in range."""
    return options[1] == "none" or tensors[0].dtype == torch.float16


def _late(kernels, dloss, x, linear_weight, linear_bias, target, weight, sample_weight, ignore_index, *others):
    """The gradients for that dloss, which multiplies a row's loss as its sample weight does."""
    reduction, *numbers = others
    dlosses = dloss_of_rows(dloss, x, target, weight, sample_weight, ignore_index, reduction)
    rows = target, weight, dlosses, None, ignore_index
    return _by_chunks(kernels, x, linear_weight, linear_bias, *rows, *numbers)[1:]


def dloss_of_rows(
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """What multiplies each row's loss, (M,): dloss, over what a mean divides by, times the row's sample weight."""
    dlosses = dloss.to(backend.wide(x.dtype)).expand(len(x))
    if reduction == "mean":
        dlosses = dlosses / mean_divisor(target, weight, sample_weight, ignore_index, dlosses.dtype)
        if not target.is_floating_point():
            dlosses = dlosses.masked_fill(target == ignore_index, 0)  # where no row counts it is NaN
    return dlosses.contiguous() if sample_weight is None else dlosses * sample_weight


def mean_divisor(
    target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """total_weight, NaN where it is 0: smoothed, the loss of classes of weight 0 is not 0, and has no mean."""
    total = total_weight(target, weight, sample_weight, ignore_index, dtype)
    return total.masked_fill(total == 0, torch.nan)


def total_weight(
    target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """(1,), the sum of the weights of the rows that count."""
    rows = target.new_ones(len(target), dtype=dtype) if sample_weight is None else sample_weight.to(dtype)
    if not target.is_floating_point():
        if weight is not None:  # of a class out of range no weight is read; its loss is NaN
            rows = rows * weight[target.clamp(0, len(weight) - 1)]
        rows = rows.masked_fill(target == ignore_index, 0)
    return rows.sum(0, keepdim=True)


def _without_logits(x, linear_weight, *others):
    from fusedact.kernels import linear_cross_entropy

    tile = linear.tile_for("loss", x, linear_weight, library=False)
    return linear_cross_entropy.forward(x, linear_weight, *others, tile)


def _by_chunks(
    kernels: bool,
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    total: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    chunk: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Losses (M,), each times its sample weight, and what is wanted of dx, dW and db, divided by `total`."""
    M, rows, dtype = len(x), chunk_rows(x, len(linear_weight), chunk), backend.wide(x.dtype)
    on_triton, (want_x, want_weight, want_bias) = kernels and backend.uses_triton(x), wanted
    numbers = ignore_index, label_smoothing, z_loss, softcap
    losses = x.new_empty(M, dtype=dtype)
    dx = x.new_empty(x.shape) if want_x else None
    several = rows < M
    dw = x.new_empty(linear_weight.shape, dtype=dtype if several else x.dtype) if want_weight else None
    db = x.new_zeros(len(linear_weight), dtype=dtype) if want_bias else None
    for first in range(0, M, rows):
        part = slice(first, first + rows)
        of_rows = target[part], weight, None if sample_weight is None else sample_weight[part], losses[part], total
        if on_triton:
            z = linear.bare(x[part], linear_weight, linear_bias)
            _overwrite(z, *of_rows, *numbers)
        else:
            z = _gradient_by_torch(F.linear(x[part], linear_weight, linear_bias), *of_rows, *numbers, any(wanted))
        if dx is not None:
            multiply("dx", z, linear_weight, dx[part], on_triton, first=True)
        if dw is not None:
            multiply("dw", z.t(), x[part], dw, on_triton, first=first == 0)
        if db is not None:
            db += z.sum(0, dtype=dtype)
        del z  # so that the next chunk's takes its memory
    if dw is not None:
        dw = dw.to(x.dtype) if M else dw.zero_()
    return losses, dx, dw, None if db is None else db.to(x.dtype)


def _overwrite(z, target, weight, sample_weight, losses, total, ignore_index, label_smoothing, z_loss, softcap):
    """z (rows, C) becomes its own gradient."""
    from fusedact.kernels import cross_entropy

    chip, (rows, classes) = backend.chip(z.device), z.shape
    numbers = streams(target, weight, label_smoothing, softcap)
    config = cross_entropy.gradient_tile(classes, rows, z.element_size(), numbers, chip.warp_size, chip.multiprocessors)
    cross_entropy.overwrite_with_gradient(
        z, target, weight, sample_weight, losses, total, ignore_index, label_smoothing, z_loss, softcap, config
    )


def _gradient_by_torch(z, target, weight, sample_weight, losses, total, ignore_index, *numbers_and_wanted):
    """The gradient of z (rows, C) where it is wanted; of classes without a softcap in the place of z."""
    *numbers, wanted = numbers_and_wanted
    if wanted and not target.is_floating_point() and not numbers[2]:
        return _gradient_of_classes(z, target, weight, sample_weight, losses, total, ignore_index, *numbers[:2])
    with backend.recording() if wanted else torch.no_grad():
        z.requires_grad_(wanted)
        loss = _wide_formula(z, target, weight, sample_weight, ignore_index, "none", *numbers)
    losses.copy_(loss.detach())
    if not wanted:
        return None
    dloss = torch.ones_like(loss) if total is None else (1 / total).expand_as(loss)
    if not target.is_floating_point():
        dloss = dloss.masked_fill(target == ignore_index, 0)  # where no row counts, total is NaN
    return torch.autograd.grad(loss, z, dloss)[0]


def _gradient_of_classes(logits, target, weight, sample_weight, losses, total, ignore_index, smoothing, z_loss):
    """By the formula of kernels/cross_entropy.py, p Σk - k for k = (1 - ε) w_t at the target and ε/C w everywhere."""
    z, counts = logits.to(losses.dtype), target != ignore_index
    weight = z.new_ones(z.shape[1]) if weight is None else weight.to(z.dtype)
    target = target.masked_fill(~counts, 0)[:, None]
    w_target, share = weight[target[:, 0]], smoothing / z.shape[1]
    m = z.amax(1, keepdim=True)
    z -= m
    loss, kz = -w_target * z.gather(1, target)[:, 0], None
    if smoothing:
        kz = torch.mv(z, weight, out=z.new_empty(len(z)))  # not z @ weight, which autocast has in low precision
    s = z.exp_().sum(1)
    log_s, k_sum = s.log(), w_target
    loss += log_s * w_target
    if smoothing:
        loss = loss * (1 - smoothing) + (log_s * weight.sum() - kz) * share
        k_sum = w_target * (1 - smoothing) + weight.sum() * share
    lse = log_s + m[:, 0]
    factor = torch.ones_like(loss) if sample_weight is None else sample_weight.to(z.dtype)
    losses.copy_(torch.where(counts, (loss + z_loss * lse.square()) * factor, 0))
    dloss = factor if total is None else factor / total
    z *= (dloss * (k_sum + 2 * z_loss * lse) / s)[:, None]
    if smoothing:
        z.addr_(dloss, weight, alpha=-share)
    z.scatter_add_(1, target, (dloss * w_target * (smoothing - 1))[:, None])
    if z.is_cuda or not counts.all():
        z.masked_fill_(~counts[:, None], 0)
    return z.to(logits.dtype)


def multiply(task: str, a: Tensor, b: Tensor, into: Tensor, on_triton: bool, first: bool) -> None:
    """into += a b, or a b in the place of what it held, in its own dtype."""
    beta = 0 if first else 1
    if a.dtype == into.dtype:
        tile = linear.tile_for(task, a, b.t()) if on_triton else None
        if tile is None:
            torch.addmm(into, a, b, beta=beta, out=into)
        elif first:
            into.copy_(linear.product(task, a, b))
        else:
            into += linear.product(task, a, b)
    elif a.is_cuda and torch.version.hip is None:
        torch.addmm(into, a, b, beta=beta, out_dtype=into.dtype, out=into)  # type: ignore[call-overload]
    else:
        torch.addmm(into, a.to(into.dtype), b.to(into.dtype), beta=beta, out=into)


def _wide_formula(z, target, weight, sample_weight, *options):
    """The loss of logits in float32 or wider, whatever they are in."""
    dtype = backend.wide(z.dtype)
    target = target.to(dtype) if target.is_floating_point() else target
    weight, sample_weight = (t if t is None else t.to(dtype) for t in (weight, sample_weight))
    return cross_entropy_formula(z.to(dtype), target, weight, sample_weight, *options, False)


def _formula(x, linear_weight, linear_bias, *tensors_and_options):
    *others, _ = tensors_and_options
    return _wide_formula(F.linear(x, linear_weight, linear_bias), *others)


def _fake(x, linear_weight, linear_bias, *others):
    *_, reduction, _, _, _, _, wanted = others
    early = not late_only((x,), (None, reduction))
    likes = zip((x, linear_weight, linear_bias), wanted, strict=True)
    return (
        x.new_empty(len(x) if reduction == "none" else (), dtype=backend.wide(x.dtype)),
        *(t.new_empty(t.shape) if want and early else None for t, want in likes),
    )


def _by_torch_at_need(run):
    """run, whose first argument is whether kernels may; where they cannot be compiled the chunks are torch's.

    EarlyOp's own guard, whose formula keeps all logits, is then never asked.
    """
    return guarded(
        partial(run, True), partial(run, False), lambda *args: kind_of("linear_cross_entropy by chunks", args)
    )


linear_cross_entropy = EarlyOp(
    name="linear_cross_entropy",
    tensors=6,
    learned=3,
    schema="Tensor x, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor? sample_weight,"
    " int ignore_index, str reduction, float label_smoothing, float z_loss, float softcap, int chunk",
    launch=_by_torch_at_need(_launch),
    fake=_fake,
    late=_by_torch_at_need(_late),
    composite=_formula,
    late_only=late_only,
).register()
